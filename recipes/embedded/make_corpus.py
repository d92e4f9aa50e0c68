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
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

SAMPLE_RATE = 24000


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


def styled_work(style: Style, worker: int, arguments: argparse.Namespace, *rest: object) -> None:
    """The kit's worker with the style's speed and pitch, on GPU `worker` modulo the number of GPUs."""
    import kokoro_model
    import synthesise

    class StyledKokoro(kokoro_model.Kokoro):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            predict = self.predictor.F0Ntrain

            def scaled(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                pitch, energy = predict(*inputs)
                return pitch * style.pitch, energy

            self.predictor.F0Ntrain = scaled

    synthesise.Kokoro = StyledKokoro
    synthesise.SPEED_RANGE = style.speed
    if arguments.device == "cuda":
        arguments.device = f"cuda:{worker % torch.cuda.device_count()}"
        torch.cuda.set_device(arguments.device)
    synthesise.work(worker, arguments, *rest)


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
    synthesise.work = partial(styled_work, STYLES[arguments.style])
    sys.argv = ["synthesise.py", *passed]
    synthesise.main()
    (Path(passed[passed.index("--output") + 1]) / "style.txt").write_text(arguments.style + "\n")


if __name__ == "__main__":
    main()
