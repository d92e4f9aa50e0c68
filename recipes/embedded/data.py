"""The corpus in GPU memory: every sample of every utterance, phonemes by frame, pitch.

An hour is 173 MB, so 48 hours take 8.3 GB and no batch ever waits for a disk. A batch is a tensor of row numbers; the
methods of `Speech` turn rows into waveforms, labels and pitch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.embedded.features import HOP, SAMPLE_RATE, kaldi_fbank, pitch, resample

SPOKEN = "ATIOWYabdefhijklmnoprstuvwxyzæðŋɐɑɔɕəɚɛɜɡɤɥɨɪɹɻʂʃʊʌʒʣʤʥʦʧʨʰᵊᵻθꭧ→↓↗↘"
PAUSES = ".,!?;:—…\"“”'()"
STRESS = "ˈˌ"
CLASSES = len(SPOKEN) + 1  # 0 is silence
IGNORE = 255
LABEL_SAMPLES = 600  # samples of a phoneme label
LABEL_LAG = 1000  # samples by which the synthesiser's durations run behind the sound
SILENCE = 0.0012  # root mean square under which a frame is silent, whatever its label
LEAD, TAIL = 4, 8  # label frames of silence that an utterance keeps at its ends; the synthesiser leaves 0.3 s and more
STYLES = ("plain", "slow", "fast", "low", "high", "real")
MIN_SECONDS, MAX_SECONDS = 0.8, 16.0


def is_held_out(speaker: str) -> bool:
    """The speakers that no stage trains on: one mix in 17 (pure voices excepted), one real speaker in ten."""
    number = int(speaker.lstrip("kso"))
    return number % 10 == 3 if speaker.startswith("so") else number >= 28 and number % 17 == 5


def spoken_classes(phonemes: str) -> list[int]:
    """The classes of what can be heard in a string of phonemes."""
    return [SPOKEN.index(symbol) + 1 for symbol in phonemes if symbol in SPOKEN]


class Speech:
    """Utterances of several corpus folders on one device.

    Args:
        folders: what make_corpus.py wrote.
        kit: the data kit, for its corpus.py.
        held_out: load the held-out speakers instead of the others.
        limit: at most so many utterances a folder.

    Attributes:
        start, length, speaker, language, style: int64 [rows]; samples, index into `speakers`, 0 English and 1 Mandarin,
            index into STYLES.
        text, phonemes: a string a row.
        speakers: names, the same order for every set of folders of the same kind.
    """

    def __init__(
        self, folders: list[Path], kit: Path, device: torch.device, *, held_out: bool = False, limit: int | None = None
    ) -> None:
        sys.path.insert(0, str(kit.resolve()))
        from corpus import Corpus

        corpora = [Corpus(folder) for folder in folders]
        styles = [STYLES.index((folder / "style.txt").read_text().strip()) for folder in folders]
        self.speakers = sorted({row["speaker"] for corpus in corpora for row in corpus.speakers})
        self.device = device
        audio = [
            torch.zeros(LABEL_SAMPLES, dtype=torch.int16, device=device)
        ]  # so that there is something without rows
        labels = [torch.full((1,), IGNORE, dtype=torch.uint8)]
        columns: list[tuple[int, ...]] = []
        self.text: list[str] = []
        self.phonemes: list[str] = []
        base = LABEL_SAMPLES
        for corpus, style in zip(corpora, styles, strict=True):
            names = [row["speaker"] for row in corpus.speakers]
            numbers = np.array([self.speakers.index(name) for name in names])
            index = np.asarray(corpus.index)
            all_labels = _frame_labels(corpus)
            seconds = index["length"] / SAMPLE_RATE
            usable = (seconds > MIN_SECONDS) & (seconds < MAX_SECONDS)
            usable &= np.array([is_held_out(name) for name in names])[index["speaker"]] == held_out
            kept = np.flatnonzero(usable)[:limit]
            for shard in np.unique(index["shard"]):
                samples = np.memmap(corpus.folder / f"audio-{shard:02d}.pcm", "<i2", "r")
                here = kept[index["shard"][kept] == shard]
                if not len(here):
                    continue
                first = int(index["start"][here].min()) // LABEL_SAMPLES * LABEL_SAMPLES
                last = int((index["start"][here] + index["length"][here]).max())
                room = -(-(last - first) // LABEL_SAMPLES) * LABEL_SAMPLES
                audio.append(torch.zeros(room, dtype=torch.int16, device=device))
                audio[-1][: last - first] = torch.from_numpy(np.array(samples[first:last])).to(device)
                shard_labels = np.full(room // LABEL_SAMPLES, IGNORE, np.uint8)
                for row in here:
                    if (begin := all_labels.get(int(row))) is not None:
                        at = (int(index["start"][row]) - first) // LABEL_SAMPLES
                        shard_labels[at : at + len(begin)] = begin
                labels.append(torch.from_numpy(shard_labels))
                for row in here:
                    record, sentence = index[row], corpus.sentences[index["sentence"][row]]
                    columns.append(
                        (
                            base + int(record["start"]) - first,
                            int(record["length"]),
                            int(numbers[record["speaker"]]),
                            int(record["language"]),
                            style,
                        )
                    )
                    self.text.append(sentence["text"])
                    self.phonemes.append(sentence["phonemes"])
                base += room
        self.samples = torch.cat(audio)
        self.labels = torch.cat(labels).to(device)
        frames = self.samples.view(-1, LABEL_SAMPLES)
        self.quiet = torch.cat([part.float().square().mean(1) < (SILENCE * 32768) ** 2 for part in frames.split(10**5)])
        table = torch.tensor(columns, dtype=torch.long, device=device).view(-1, 5)
        self.start, self.length, self.speaker, self.language, self.style = table.unbind(1)
        self._trim()
        frames = self.length // HOP
        self.pitch_start = frames.cumsum(0) - frames

    def _trim(self) -> None:
        """Move every start and end nearer to the sound."""
        frame = torch.arange(len(self.quiet), device=self.device)
        before = torch.where(self.quiet, -1, frame).cummax(0).values
        after = torch.where(self.quiet, len(frame), frame).flip(0).cummin(0).values.flip(0)
        end = self.start + self.length
        first = (after[self.start // LABEL_SAMPLES] - LEAD) * LABEL_SAMPLES
        last = (before[(end - 1) // LABEL_SAMPLES] + 1 + TAIL) * LABEL_SAMPLES
        shortest = int(MIN_SECONDS * SAMPLE_RATE) // 2
        self.start = first.maximum(self.start).minimum(end - shortest)
        self.length = (last.minimum(end) - self.start).clamp(min=shortest)

    def __len__(self) -> int:
        return len(self.text)

    @property
    def hours(self) -> float:
        return float(self.length.sum()) / SAMPLE_RATE / 3600

    def waveform(self, rows: Tensor, offset: Tensor | int, samples: int) -> Tensor:
        """Float32 [rows, samples] from `offset` samples into each utterance; zeros outside of it."""
        offset = torch.as_tensor(offset, device=self.device)
        position = offset.reshape(-1, 1) + torch.arange(samples, device=self.device)
        inside = (position >= 0) & (position < self.length[rows, None])
        place = (self.start[rows, None] + position).clamp(0, len(self.samples) - 1)
        return torch.where(inside, self.samples[place].float() / 32768, 0)

    def frame_labels(self, rows: Tensor, position: Tensor) -> Tensor:
        """Phoneme classes int64 [rows, n] at sample positions [rows, n]; IGNORE outside of the utterance."""
        length = self.length[rows, None]
        place = self.start[rows, None] + (position + LABEL_LAG).clamp(min=0).minimum(length - 1)
        labels = self.labels[place.clamp(0, len(self.samples) - 1) // LABEL_SAMPLES].long()
        quiet = self.quiet[(self.start[rows, None] + position).clamp(0, len(self.samples) - 1) // LABEL_SAMPLES]
        labels = labels.masked_fill(quiet & (labels != IGNORE), 0)
        return labels.masked_fill((position < 0) | (position >= length), IGNORE)

    def batches(self, samples: int = 40_000_000) -> Iterator[Tensor]:
        """All rows in batches whose utterances last the same number of begun seconds, so that few shapes occur.

        Args:
            samples: of a batch, padding included.
        """
        seconds = -(-self.length // SAMPLE_RATE)
        for duration in seconds.unique().tolist():
            rows = torch.nonzero(seconds == duration)[:, 0]
            yield from rows.split(max(1, samples // (duration * SAMPLE_RATE)))

    def add_pitch(self) -> None:
        """Compute `pitch`, Hz at 50 a second for all utterances, and `mean_log_pitch` [speakers] (unaltered)."""
        frames = self.length // HOP
        self.pitch = torch.zeros(int(frames.sum()), device=self.device)
        total = torch.zeros(len(self.speakers), 2, device=self.device)
        for rows in self.batches(8_000_000):
            longest = -(-int(self.length[rows].max()) // SAMPLE_RATE) * SAMPLE_RATE
            values = pitch(self.waveform(rows, 0, longest))
            place = torch.arange(values.shape[1], device=self.device)
            inside = place < frames[rows, None]
            self.pitch[(self.pitch_start[rows, None] + place)[inside]] = values[inside]
            voiced = (values > 0) & inside & (self.style[rows] != STYLES.index("low"))[:, None]
            voiced &= (self.style[rows] != STYLES.index("high"))[:, None]
            sums = torch.stack([(values.clamp(min=1).log() * voiced).sum(1), voiced.sum(1).float()], 1)
            total.index_add_(0, self.speaker[rows], sums)
        overall = total[:, 0].sum() / total[:, 1].sum().clamp(min=1)
        self.mean_log_pitch = torch.where(total[:, 1] > 100, total[:, 0] / total[:, 1].clamp(min=1), overall)

    def pitch_at(self, rows: Tensor, position: Tensor) -> Tensor:
        """Hz [rows, n] at sample positions [rows, n]; 0 where unvoiced or outside."""
        frame = position // HOP
        inside = (frame >= 0) & (frame < (self.length[rows] // HOP)[:, None])
        return torch.where(inside, self.pitch[(self.pitch_start[rows, None] + frame).clamp(0, len(self.pitch) - 1)], 0)

    def random_rows(self, count: int, weights: Tensor | None = None) -> Tensor:
        """Rows in proportion to their length (or to `weights`)."""
        weights = self.length.float() if weights is None else weights
        return torch.multinomial(weights, count, replacement=True)


def _frame_labels(corpus: object) -> dict[int, np.ndarray]:
    """Row -> its phoneme classes, one for 600 samples; rows without usable phonemes are left out."""
    classes = {symbol: number for number, symbol in enumerate(SPOKEN, 1)} | dict.fromkeys(PAUSES, 0)
    found = {}
    for row, record in enumerate(corpus.index):
        phonemes = corpus.sentences[record["sentence"]]["phonemes"]
        first, count = int(record["duration_start"]), int(record["duration_count"])
        if count != len(phonemes) + 2 or not phonemes:
            continue
        values, following = [0], IGNORE
        for symbol in reversed(phonemes):  # a stress mark sounds like the vowel after it
            value = following if symbol in STRESS else classes.get(symbol, IGNORE)
            values.append(value)
            following = value
        values = np.array([0, *values[:0:-1], 0], np.uint8)
        found[row] = np.repeat(values, np.asarray(corpus.durations[first : first + count]))
    return found


def to_16k(wav: Tensor) -> Tensor:
    """[batch, samples] at 24 kHz (a multiple of 3) -> [batch, samples * 2 / 3] at 16 kHz."""
    return resample(wav, wav.shape[1] * 2 // 3)


def distort(wav: Tensor, share: float = 0.6) -> Tensor:
    """What recordings of users have: room, other voices and noise, coloured microphones, narrow bands, 8-bit codecs.

    wav [batch, samples] at 16 kHz; each row gets each effect with some chance, `share` scales the chances.
    """
    batch, samples = wav.shape

    def chosen(chance: float) -> Tensor:
        return torch.rand(batch, 1, device=wav.device) < chance * share

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch, 1, device=wav.device).uniform_(low, high)

    spectrum = torch.fft.rfft(wav, samples + 8000)
    seconds = torch.arange(8000, device=wav.device) / 16000
    echo = torch.randn(batch, 8000, device=wav.device) * torch.exp(-6.9 * seconds / uniform(0.1, 0.6))
    echo = echo / echo.norm(dim=1, keepdim=True) * uniform(0.1, 0.7)
    echo[:, 0] = 1
    room = torch.where(chosen(0.5), torch.fft.rfft(echo, samples + 8000), 1)
    frequency = torch.linspace(0, 1, spectrum.shape[1], device=wav.device)
    tilt = torch.where(chosen(0.7), uniform(-1.5, 1.5), 0) * frequency
    tilt = tilt + torch.where(chosen(0.7), uniform(-0.5, 0.5), 0) * torch.cos(uniform(2, 20) * frequency)
    narrow = torch.sigmoid((torch.where(chosen(0.3), uniform(0.4, 0.9), 2) - frequency) * 60)
    high_pass = torch.sigmoid((frequency - torch.where(chosen(0.3), uniform(0.005, 0.03), -1)) * 400)
    shaped = torch.fft.irfft(spectrum * room * tilt.exp() * narrow * high_pass, samples + 8000)[:, :samples]

    level = shaped.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
    colour = (frequency + 0.01) ** torch.where(chosen(0.8), uniform(-1.0, 0.0), 0)
    noise = torch.fft.irfft(torch.fft.rfft(torch.randn_like(shaped), samples + 8000) * colour, samples + 8000)
    noise = noise[:, :samples]
    noise = torch.where(chosen(0.3), shaped.roll(1, 0) + 0.3 * shaped.roll(2, 0), noise)
    noise = noise / noise.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    decibels = torch.where(chosen(0.7), uniform(5, 35), 60)
    noisy = shaped + noise * level * 10 ** (-decibels / 20)
    companded = torch.sign(noisy) * torch.log1p(255 * noisy.abs().clamp(max=1)) / 5.545
    coded = torch.round(companded * 127) / 127
    coded = torch.sign(coded) * torch.expm1(coded.abs() * 5.545) / 255
    return torch.where(chosen(0.2), coded, noisy)


def normalised_fbank(wav_16k: Tensor) -> Tensor:
    """The speaker encoder's input [batch, frames, 80] of equally long waveforms."""
    fbank = kaldi_fbank(wav_16k)
    return fbank - fbank.mean(1, keepdim=True)
