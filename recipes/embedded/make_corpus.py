"""Make training speech with the data kit's synthesiser, on every GPU, in plain or instructed style.

    python -m recipes.embedded.make_corpus --kit KIT --style plain -- --pack PACK --output CORPUS --hours 40 --workers 8
    python -m recipes.embedded.make_corpus --kit KIT --real so762.tar --output CORPUS

What follows `--` goes to the kit's synthesise.py. A style is a range of speeds and a factor on the predicted pitch; it
is written to `style.txt` beside the audio. Real recordings are decoded into the same layout, without phonemes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from synthesise import Item

SAMPLE_RATE = 24000
POOL = 2048  # utterances planned at a time
TEXTS = 64  # of them in a batch whose durations are predicted
BATCH_FRAMES = 6400  # of 25 ms, in a batch that becomes sound: 160 seconds


@dataclass(frozen=True)
class Prepared:
    """An utterance before it is spoken: style [256], what the prosody predictor and the decoder take for each token
    [tokens, channels], frames for each token [tokens] on the CPU."""

    item: Item
    style: Tensor
    encoded: Tensor
    text: Tensor
    frames: Tensor


@dataclass(frozen=True)
class Style:
    speed: tuple[float, float]
    pitch: float = 1.0


STYLES = {
    "plain": Style((0.85, 1.2)),
    "slow": Style((0.58, 0.72)),
    "fast": Style((1.35, 1.6)),
    "low": Style((0.9, 1.1), pitch=0.8),
    "high": Style((0.9, 1.1), pitch=1.25),
}


class BatchedKokoro:
    """The kit's Kokoro for many utterances at once; what one alone would give, but for its random numbers.

    First the durations of a batch, padded. Then utterances of about the same length become sound together: the last
    silence of each is prolonged to the longest one's end and cut off again, so that nothing is padded.
    """

    def __init__(self, model: torch.nn.Module, pitch: float) -> None:
        self.model, self.pitch = model, pitch

    @torch.inference_mode()
    def prepare(self, items: list[Item], voices: Tensor) -> list[Prepared]:
        """`voices` [batch, 510, 256], a table of styles for each item."""
        model, device = self.model, voices.device
        ids = [torch.tensor(model.token_ids(item.phonemes)) for item in items]
        lengths = torch.tensor([len(row) for row in ids])  # stays on the CPU: packed sequences want it there
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        padding = (torch.arange(tokens.shape[1]) >= lengths[:, None]).to(device)
        style = voices[torch.arange(len(items), device=device), (lengths - 3).to(device)]
        hidden = model.bert(tokens, attention_mask=(~padding).long())
        hidden = model.bert_encoder(hidden).transpose(-1, -2)
        encoded = model.predictor.text_encoder(hidden, style[:, 128:], lengths, padding)
        packed = torch.nn.utils.rnn.pack_padded_sequence(encoded, lengths, batch_first=True, enforce_sorted=False)
        scores, _ = torch.nn.utils.rnn.pad_packed_sequence(model.predictor.lstm(packed)[0], batch_first=True)
        speed = torch.tensor([item.speed for item in items], device=device)[:, None]
        duration = torch.sigmoid(model.predictor.duration_proj(scores)).sum(-1) / speed
        frames = torch.round(duration).clamp(min=1).long().cpu()
        text = model.text_encoder(tokens, lengths, padding).transpose(1, 2)
        return [
            Prepared(item, style[row], encoded[row, :count], text[row, :count], frames[row, :count])
            for row, (item, count) in enumerate(zip(items, lengths.tolist(), strict=True))
        ]

    @torch.inference_mode()
    def speak(self, batch: list[Prepared]) -> Tensor:
        """Samples [batch, samples of the longest]; those after an utterance's own frames are prolonged silence."""
        model, device = self.model, batch[0].style.device
        longest = max(int(one.frames.sum()) for one in batch)
        repeated = []
        for one in batch:
            frames = one.frames.clone()
            frames[-1] += longest - frames.sum()
            repeated.append(torch.repeat_interleave(torch.arange(len(frames)), frames))
        repeated = torch.stack(repeated).to(device)
        encoded, text = (
            torch.stack([values[index] for values, index in zip(rows, repeated, strict=True)]).transpose(1, 2)
            for rows in ([one.encoded for one in batch], [one.text for one in batch])
        )
        style = torch.stack([one.style for one in batch])
        pitch, energy = model.predictor.F0Ntrain(encoded, style[:, 128:])
        return model.decoder(text, pitch * self.pitch, energy, style[:, :128]).flatten(1)


def work(style: Style, worker: int, arguments: argparse.Namespace, progress: Tensor, deadline: float) -> None:
    """In place of the kit's worker: the same plan and files, but in batches, in the style's speed and pitch, on GPU
    `worker` modulo the number of GPUs."""
    import kokoro_model
    import synthesise

    synthesise.SPEED_RANGE = style.speed
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", worker % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    config = json.loads((arguments.pack / "config.json").read_text(encoding="utf-8"))
    model = kokoro_model.Kokoro(config, next(arguments.pack.glob("kokoro-*.whl")))
    model.load_state_dict(kokoro_model.read_weights(arguments.pack))
    kokoro = BatchedKokoro(model.to(device), style.pitch)
    speakers = synthesise.read_table(arguments.speakers)
    with np.load(arguments.pack / "voices.npz") as archive:
        voices = {name: archive[name] for name in archive.files}
    tables = torch.stack([kokoro_model.mix_voices(row["mix"], voices) for row in speakers]).to(device)
    sentences = synthesise.read_sentences(arguments.sentences)
    plan = synthesise.plan(sentences, speakers, arguments.zh_share, arguments.seed)
    mine = (item for item in plan if item.number % arguments.workers == worker)
    torch.manual_seed(arguments.seed * 1009 + worker)
    order = random.Random(worker)
    quota, start = arguments.hours * 3600 * SAMPLE_RATE / arguments.workers, 0
    with (
        open(arguments.output / f"audio-{worker:02d}.pcm", "wb") as audio,
        open(arguments.output / f"rows-{worker:02d}.jsonl", "w", encoding="utf-8") as rows,
    ):
        while start < quota:
            pool = sorted(islice(mine, POOL), key=lambda item: len(item.phonemes))
            prepared = []
            for some in (pool[first : first + TEXTS] for first in range(0, POOL, TEXTS)):
                prepared += kokoro.prepare(some, tables[torch.tensor([item.speaker for item in some], device=device)])
            batches = batches_of(prepared)
            order.shuffle(batches)  # so that a pool that is not finished is no shorter than others
            for batch in batches:
                if start >= quota or time.time() > deadline:
                    return
                made = kokoro.speak(batch)
                made = made * (synthesise.PEAK / made.abs().amax(1, keepdim=True).clamp(min=synthesise.PEAK))
                samples = torch.round(made * 32767).to(torch.int16).cpu().numpy()
                for one, wave in zip(batch, samples, strict=True):
                    item, durations = one.item, one.frames.tolist()
                    wave = wave[: sum(durations) * synthesise.SAMPLES_PER_FRAME]
                    if synthesise.fault(wave / 32768, len(item.phonemes), arguments.max_seconds):
                        progress[worker, 2] += 1
                        continue
                    audio.write(wave.tobytes())
                    entry = {"start": start, "length": len(wave), "lang": item.lang, "speaker": item.speaker}
                    entry |= {"speed": item.speed, "text": item.text, "phonemes": item.phonemes, "durations": durations}
                    rows.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    start += len(wave)
                    progress[worker, 0] = start / SAMPLE_RATE
                    progress[worker, 1] += 1


def batches_of(prepared: list[Prepared]) -> list[list[Prepared]]:
    """Utterances of about the same length together, at most BATCH_FRAMES in a batch."""
    batches: list[list[Prepared]] = []
    for one in sorted(prepared, key=lambda one: int(one.frames.sum())):
        if not batches or (len(batches[-1]) + 1) * int(one.frames.sum()) > BATCH_FRAMES:
            batches.append([])
        batches[-1].append(one)
    return batches


def decode(data: bytes) -> np.ndarray:
    """Opus file -> int16 samples at 24 kHz, with the level of -27 dB full scale that the synthetic speech has."""
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    spectrum = np.fft.rfft(samples)
    length = round(len(samples) * SAMPLE_RATE / rate)
    resampled = np.fft.irfft(np.pad(spectrum, (0, max(0, length // 2 + 1 - len(spectrum))))[: length // 2 + 1], length)
    resampled *= length / len(samples)
    resampled *= 0.045 / max(1e-4, float(np.sqrt(np.mean(resampled**2))))
    return np.round(np.clip(resampled, -1, 1) * 32767).astype("<i2")


def write_real(archive: Path, output: Path) -> None:
    """Decode the kit's tar of real recordings into the layout of its corpus.py."""
    from corpus import build_index

    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    table = next(name for name in files if name.endswith(".tsv"))
    rows = list(csv.DictReader(io.StringIO(files[table].decode()), delimiter="\t", quoting=csv.QUOTE_NONE))
    speakers = sorted({row["speaker"] for row in rows})
    genders = {row["speaker"]: row["gender"] for row in rows}
    output.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}\ten\t{genders[name]}\t{name}:1" for name in speakers]
    (output / "speakers.tsv").write_text("\n".join(["speaker\tlanguages\tgender\tmix", *lines]) + "\n")
    start = 0
    with (
        ProcessPoolExecutor() as pool,
        open(output / "audio-00.pcm", "wb") as audio,
        open(output / "rows-00.jsonl", "w", encoding="utf-8") as index,
    ):
        for row, samples in zip(
            rows, pool.map(decode, (files[row["file"]] for row in rows), chunksize=16), strict=True
        ):
            audio.write(samples.tobytes())
            entry = {"start": start, "length": len(samples), "lang": "en", "speaker": speakers.index(row["speaker"])}
            entry |= {"speed": 1.0, "text": row["text"].capitalize() + ".", "phonemes": "", "durations": []}
            index.write(json.dumps(entry, ensure_ascii=False) + "\n")
            start += len(samples)
    (output / "style.txt").write_text("real\n")
    print(f"{build_index(output)} real utterances, {start / SAMPLE_RATE / 3600:.2f} h", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, help="folder with synthesise.py and corpus.py")
    parser.add_argument("--style", choices=STYLES, default="plain")
    parser.add_argument("--real", type=Path, help="tar of real recordings instead of synthesis")
    parser.add_argument("--output", type=Path, help="with --real: the folder to write")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    arguments = parser.parse_args(own)
    sys.path.insert(0, str(arguments.kit.resolve()))
    if arguments.real:
        write_real(arguments.real, arguments.output)
        return
    import synthesise

    passed = sys.argv[len(own) + 2 :]
    synthesise.work = partial(work, STYLES[arguments.style])
    sys.argv = ["synthesise.py", *passed]
    synthesise.main()
    (Path(passed[passed.index("--output") + 1]) / "style.txt").write_text(arguments.style + "\n")


if __name__ == "__main__":
    main()
