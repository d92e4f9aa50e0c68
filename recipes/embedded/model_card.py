"""Very last: the model card, from the model directory, what `make quality` measured on it, and the training's logs.

    python -m recipes.embedded.model_card --directory assets/embedded --quality quality.json --logs WORK/log \
        --machine "one NVIDIA H200" --shortfalls shortfalls.json

shortfalls.json says for every score that misses its threshold what the cause is and what comes next, by the score's
name: {"wer_en_unseen": "..."}. Without it the card is not written.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.quality import digest_of
from cosy_engine.checkpoint.fingerprint import fingerprint_of
from cosy_engine.files import write_atomically
from cosy_engine.text.instructions import read_instructions
from cosy_engine.text.normalize import language_of
from cosy_engine.voices.spk2info import builtin_voices

TEMPLATE = Path(__file__).with_name("MODEL_CARD.template.md")
CLOCK = ("stage", "step", "seconds", "steps_a_second")


def card(directory: Path, quality: dict[str, Any], logs: Path, machine: str, shortfalls: dict[str, str]) -> str:
    """The text of MODEL_CARD.md.

    Raises:
        SystemExit: the scores are another directory's, or a score falls short without an explanation.
    """
    digest = digest_of(directory)
    if quality["digest"] != digest:
        raise SystemExit(f"The scores were not measured on {directory}: run make quality again.")
    short = [name for name, line in quality["scores"].items() if line.get("met") is False]
    if unexplained := [name for name in short if not shortfalls.get(name)]:
        raise SystemExit(f"--shortfalls does not say the cause and the next step of {', '.join(unexplained)}.")
    fingerprint = fingerprint_of(directory)
    voices = [
        f"{voice.name} ({'Mandarin' if language_of(voice.prompt.text) == 'zh' else 'English'})"
        for voice in builtin_voices(directory, fingerprint).values()
    ]
    return TEMPLATE.read_text(encoding="utf-8").format(
        megabytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6,
        voices=", ".join(voices),
        styles=" ".join(
            phrase for lang in ("en", "zh") for phrase in read_instructions(directory).examples(lang).values()
        ),
        sentences=quality["sentences"],
        seed=quality["seed"],
        cores=quality["machine"]["cores"],
        cpu=quality["machine"]["cpu"],
        scores="\n".join(_score(line) for line in quality["scores"].values()),
        shortfalls="\n".join(f"- {quality['scores'][name]['what']}: {shortfalls[name]}" for name in short)
        or "No threshold is missed.",
        machine=machine,
        stages="\n".join(_stage(log) for log in sorted(logs.glob("*.log")) if _progress(log)),
        fingerprint=fingerprint[:12],
        digest=digest[:12],
    )


def _score(line: dict[str, Any]) -> str:
    limits = [f"{word} {line[key]}" for key, word in (("at_most", "at most"), ("at_least", "at least")) if key in line]
    measured = f"not measured: {line['why']}" if line["value"] is None else f"{line['value']:.3g}"
    reached = {True: "yes", False: "**no**", None: ""}[line.get("met")]
    return f"| {line['what']} | {measured} | {''.join(limits)} | {reached} |"


def _progress(log: Path) -> list[dict[str, Any]]:
    """Progress lines of a stage; other logs have none."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith('{"stage"')]


def _stage(log: Path) -> str:
    lines = _progress(log)
    seconds = [line["seconds"] for line in lines]
    ends = [now for now, after in itertools.pairwise([*seconds, 0]) if after < now]  # of each run
    told = (f"{name} {value}" for name, value in lines[-1].items() if name not in CLOCK)
    return f"| {log.stem} | {lines[-1]['step']:,} | {sum(ends):,} | {', '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--quality", type=Path, required=True, help="what make quality --json wrote")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the training's logs")
    parser.add_argument("--machine", required=True, help="that it was trained on")
    parser.add_argument("--shortfalls", type=Path, help="JSON: score -> cause and next step")
    arguments = parser.parse_args()
    quality = json.loads(arguments.quality.read_text(encoding="utf-8"))
    shortfalls = json.loads(arguments.shortfalls.read_text(encoding="utf-8")) if arguments.shortfalls else {}
    text = card(arguments.directory, quality, arguments.logs, arguments.machine, shortfalls)
    write_atomically(arguments.directory / "MODEL_CARD.md", text.encode())


if __name__ == "__main__":
    main()
