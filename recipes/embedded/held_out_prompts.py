"""Recordings of the speakers that no stage trains on, as `make quality` takes them: a WAV each and prompts.tsv.

    python -m recipes.embedded.held_out_prompts --kit KIT --corpus WORK/plain --output UNSEEN
    python -m recipes.embedded.held_out_prompts --kit KIT --corpus WORK/real --output REAL

From each speaker, and each language of his, the first utterance of 3 to 8 seconds, or the longest from 2 seconds on.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from cosy_engine.audio.encode import write_wav
from recipes.embedded.data import is_held_out
from recipes.embedded.features import SAMPLE_RATE

USABLE, WANTED, LONGEST = 2.0, 3.0, 8.0  # seconds


def choose(utterances: Iterable[tuple[str, str, float]]) -> list[int]:
    """One utterance for each held-out speaker and language, from (speaker, language, seconds) of all."""
    chosen: dict[tuple[str, str], tuple[float, int]] = {}
    for number, (speaker, language, seconds) in enumerate(utterances):
        best = chosen.get((speaker, language), (0.0, -1))[0]
        if is_held_out(speaker) and best < WANTED and max(best, USABLE) < seconds <= LONGEST:
            chosen[speaker, language] = seconds, number
    return sorted(number for _, number in chosen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, help="folder of the data kit, for its corpus.py")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that make_corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.kit.resolve()))
    from corpus import Corpus

    corpus = Corpus(arguments.corpus)
    utterances = [corpus[number] for number in range(len(corpus))]
    chosen = choose((each.speaker, each.lang, len(each.samples) / SAMPLE_RATE) for each in utterances)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "prompts.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        table.writerow(("file", "name", "text"))
        for each in (utterances[number] for number in chosen):
            name = f"{each.speaker}-{each.lang}.wav"
            write_wav(arguments.output / name, each.samples / 32768, SAMPLE_RATE)
            table.writerow((name, each.speaker, each.text))
    print(f"{len(chosen)} recordings")


if __name__ == "__main__":
    main()
