"""Speech as the flow and the speech LM see it: codes, mel and speaker embedding of every utterance, on the GPU.

A library is computed at a stage's start (some seconds for 48 h) from the finished tokenizer and speaker encoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from recipes.embedded.data import Speech, distort, normalised_fbank
from recipes.embedded.features import CODE_HOP, SAMPLE_RATE, mel_24k, resample, whisper_log_mel
from recipes.embedded.networks import SpeakerEncoder, SpeechTokenizer, code_digits
from recipes.embedded.training import load_average


def load_tokenizer(path: Path, device: torch.device) -> SpeechTokenizer:
    """The averaged tokenizer of stage a."""
    return load_average(path, SpeechTokenizer(), "tokenizer.").to(device)


def load_speaker_encoder(path: Path, device: torch.device) -> SpeakerEncoder:
    """The averaged encoder of stage b."""
    return load_average(path, SpeakerEncoder(), "encoder.").to(device)


class Library:
    """One rendering of all utterances of `speech`.

    Args:
        ratio: played so many times faster, which makes it another voice.
        gain: decibels, the range from which each utterance's gain is drawn.
        distorted: share of the distortions that the tokenizer hears (`distort`); the mel stays clean.
        shift: samples at 24 kHz cut off at the start, so that the codes' frames fall elsewhere.
        tail: samples of silence added at the end.

    Attributes:
        codes: int16 [all codes]; start, count: int64 [utterances], where an utterance's codes are.
        mel: float16 [2 * all codes, 80], or None; embedding: float32 [utterances, 192], or None.
    """

    def __init__(
        self,
        speech: Speech,
        tokenizer: SpeechTokenizer,
        encoder: SpeakerEncoder | None = None,
        *,
        ratio: float = 1.0,
        gain: tuple[float, float] = (0.0, 0.0),
        distorted: float = 0.0,
        shift: int = 0,
        tail: int = 0,
    ) -> None:
        device = speech.device
        self.count = ((speech.length - shift + tail) / ratio).long() // CODE_HOP
        self.start = self.count.cumsum(0) - self.count
        total = int(self.count.sum())
        self.codes = torch.zeros(total, dtype=torch.int16, device=device)
        self.mel = torch.zeros(2 * total, 80, dtype=torch.float16, device=device) if encoder else None
        self.embedding = torch.zeros(len(speech), 192, device=device) if encoder else None
        limit = 40_000_000 if device.type == "cuda" else 1_000_000
        with torch.inference_mode(), torch.backends.cudnn.flags(benchmark=False, allow_tf32=True):
            for rows in speech.batches(limit):
                self._add(speech, rows, tokenizer, encoder, ratio, gain, distorted, shift)

    def _add(
        self,
        speech: Speech,
        rows: Tensor,
        tokenizer: SpeechTokenizer,
        encoder: SpeakerEncoder | None,
        ratio: float,
        gain: tuple[float, float],
        distorted: float,
        shift: int,
    ) -> None:
        count = self.count[rows]
        longest = -(-int(count.max()) // 25) * 25
        source = round(longest * CODE_HOP * ratio)
        decibels = torch.empty(len(rows), 1, device=rows.device).uniform_(*gain)
        wav = speech.waveform(rows, shift, source) * 10 ** (decibels / 20)
        heard = resample(wav, longest * 640)
        if distorted:
            heard = distort(heard, distorted)
        samples = count * 640
        codes = tokenizer(whisper_log_mel(heard, samples), samples // 160)
        inside = torch.arange(longest, device=rows.device) < count[:, None]
        place = (self.start[rows, None] + torch.arange(longest, device=rows.device))[inside]
        self.codes[place] = codes[:, :longest][inside].to(torch.int16)
        if encoder:
            mel = mel_24k(resample(wav, longest * CODE_HOP)).transpose(1, 2).unflatten(1, (longest, 2))
            self.mel.view(-1, 2, 80)[place] = mel[inside].half()
            shortest = min(int(samples.min()), 6 * 16000)
            self.embedding[rows] = encoder(normalised_fbank(heard[:, :shortest])).float()

    def seconds(self) -> float:
        return len(self.codes) * CODE_HOP / SAMPLE_RATE


def structured_embedding(features: Tensor, width: int, deviation: float) -> Tensor:
    """Start values [entries, width] for an embedding whose entries share `features` [entries, features]: what they have
    in common they start with in common."""
    factors = torch.randn(features.shape[1], width)
    shared = features.float() @ factors
    shared = shared / shared.std().clamp(min=1e-6)
    return deviation * (0.9 * shared + 0.45 * torch.randn_like(shared))


def code_features(codes: int) -> Tensor:
    """[codes, 24]: which level each of the eight digits has."""
    return torch.nn.functional.one_hot(code_digits(torch.arange(codes)), 3).flatten(1)
