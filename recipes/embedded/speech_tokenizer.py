"""Stage a: the speech tokenizer.

    python -m recipes.embedded.speech_tokenizer --corpus plain slow ... --kit KIT --checkpoint speech_tokenizer.pt

Its codes are to say what is spoken and how (phonemes, relative pitch, loudness, timing) but not by whom. So behind the
quantiser stand a phoneme classifier, taught by the synthesiser's own alignment, a pitch head, taught the pitch relative
to the speaker's mean, and a decoder that is told the speaker and has to give back the clean log-mel. What the encoder
hears is distorted and, for half of the batches, resampled, which moves pitch and timbre together: the code must not
depend on either.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.embedded.data import CLASSES, IGNORE, STYLES, Speech, distort
from recipes.embedded.features import CODE_HOP, HOP, MEAN_MEL, mel_24k_padded, resample, whisper_log_mel
from recipes.embedded.networks import DIGITS, ConvBlock, SpeechTokenizer
from recipes.embedded.training import Average, Differentiated, Run, adamw, add_arguments, is_main, setup

SECONDS = 4
CODES = SECONDS * 25
MARGIN = 720  # samples of context that a mel frame needs at either side


class Teacher(nn.Module):
    """What is learnt beside the tokenizer and thrown away afterwards."""

    def __init__(self, speakers: int, width: int = 256) -> None:
        super().__init__()
        self.enter = nn.Linear(DIGITS, width)
        self.shared = nn.ModuleList([ConvBlock(width) for _ in range(3)])
        self.upsample = nn.Linear(width, 2 * width)
        self.phonemes = nn.Linear(width, CLASSES)
        self.pitch = nn.Linear(width, 2)
        self.speaker = nn.Embedding(speakers, width)
        self.decoder = nn.ModuleList([ConvBlock(width) for _ in range(4)])
        self.mel = nn.Linear(width, 80)
        nn.init.constant_(self.mel.bias, MEAN_MEL)

    def forward(self, digits: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, codes, 8] -> at 50 Hz: phoneme scores, (relative pitch, voicing), log-mel [batch, 80, frames]."""
        x = self.enter(digits).transpose(1, 2)
        for block in self.shared:
            x = block(x)
        x = self.upsample(x.transpose(1, 2)).unflatten(2, (2, -1)).flatten(1, 2)
        phonemes, pitch = self.phonemes(x), self.pitch(x)
        x = (x + self.speaker(speaker)[:, None]).transpose(1, 2)
        for block in self.decoder:
            x = block(x)
        return phonemes, pitch, self.mel(x.transpose(1, 2)).transpose(1, 2)


class Stage(nn.Module):
    """Tokenizer and teacher with their losses."""

    def __init__(self, speakers: int) -> None:
        super().__init__()
        self.tokenizer = SpeechTokenizer()
        self.teacher = Teacher(speakers)

    def forward(
        self, features: Tensor, speaker: Tensor, labels: Tensor, pitch: Tensor, voiced: Tensor, mel: Tensor
    ) -> dict[str, Tensor]:
        """features [batch, 128, 4 n]; labels, pitch, voiced [batch, 2 n]; mel [batch, 80, 2 n]."""
        length = torch.full((len(features),), features.shape[2], device=features.device)
        soft = self.tokenizer.digits(features, length).float()
        digits = soft + (torch.round(soft) - soft).detach()
        scores, said_pitch, said_mel = self.teacher(digits, speaker)
        scores, said_pitch, said_mel = scores.float(), said_pitch.float(), said_mel.float()
        known = labels != IGNORE
        count = known.sum().clamp(min=1)
        wrong = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        phonemes = wrong / count
        accuracy = ((scores.argmax(2) == labels) & known).sum() / count
        contour = ((said_pitch[..., 0] - pitch).abs() * voiced).sum() / voiced.sum().clamp(min=1)
        voicing = F.binary_cross_entropy_with_logits(said_pitch[..., 1], voiced)
        spectrum = (said_mel - mel).abs().mean()
        loss = phonemes + 0.7 * contour + 0.3 * voicing + 0.7 * spectrum
        return {
            "loss": loss,
            "phonemes": phonemes,
            "accuracy": accuracy,
            "pitch": contour,
            "voicing": voicing,
            "mel": spectrum,
        }


def make_batch(speech: Speech, rows: Tensor, ratio: float) -> dict[str, Tensor]:
    """Crops of SECONDS seconds as heard `ratio` times faster, and what they are to be turned into."""
    device = speech.device
    source = round(SECONDS * 25 * ratio) * CODE_HOP
    room = (speech.length[rows] - source).clamp(min=0) + 12000
    offset = (torch.rand(len(rows), device=device) * room).long() - 6000
    padded = speech.waveform(rows, offset - MARGIN, source + 2 * MARGIN)
    gain = 10 ** ((torch.rand(len(rows), 1, device=device) - 0.5) * 0.8)
    gain = torch.where(torch.rand(len(rows), 1, device=device) < 0.5, gain, 1)
    padded = padded * gain
    clean = padded[:, MARGIN:-MARGIN]
    heard = distort(resample(clean, SECONDS * 16000))
    features = whisper_log_mel(heard)
    mel = F.interpolate(mel_24k_padded(padded), 2 * CODES, mode="linear")
    moment = ((torch.arange(2 * CODES, device=device) + 0.5) * HOP * ratio).long()
    position = offset[:, None] + moment
    hertz = speech.pitch_at(rows, position)
    voiced = (hertz > 0).float()
    relative = (hertz.clamp(min=1).log() - speech.mean_log_pitch[speech.speaker[rows], None]) * 4
    return {
        "features": features,
        "speaker": speech.speaker[rows],
        "labels": speech.frame_labels(rows, position),
        "pitch": relative.clamp(-4, 4),
        "voiced": voiced,
        "mel": mel,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, time_limit=300, learning_rate=1.5e-3, batch=128)
    arguments = parser.parse_args()
    device = setup(arguments)
    speech = Speech(arguments.corpus, arguments.kit, device)
    speech.add_pitch()
    weights = speech.length.float() * torch.where(speech.style == STYLES.index("real"), 1.5, 1.0)
    stage = Stage(len(speech.speakers)).to(device)
    average = Average(stage)
    optimizer = adamw(stage.parameters(), arguments.learning_rate)
    run = Run(arguments, {"model": stage, "average": average, "optimizer": optimizer}, [optimizer])

    def losses(**batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return stage(**batch)

    differentiated = Differentiated(losses, stage, eager=arguments.eager)
    if is_main():
        size = sum(parameter.numel() for parameter in stage.tokenizer.parameters())
        print(f"{speech.hours:.1f} h, {len(speech)} utterances, tokenizer of {size / 1e6:.2f} M", flush=True)
    for step in run:
        ratio = 1.0 if step % 2 else float(torch.empty(()).uniform_(0.84, 1.19))
        values = differentiated(**make_batch(speech, speech.random_rows(arguments.batch, weights), ratio))
        run.step(optimizer)
        average.update(step)
        run.log(**values)


if __name__ == "__main__":
    main()
