from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.quality import SCORES, digest_of, report
from cosy_engine.checkpoint.fingerprint import fingerprint_of
from cosy_engine.text.instructions import INSTRUCTIONS_FILE
from cosy_engine.voices.spk2info import write_spk2info
from cosy_engine.voices.voice import Voice
from recipes.embedded.instructions import INSTRUCTIONS
from recipes.embedded.model_card import card
from tests.voices.helpers import make_prompt

LOG = """\
flow begins
{"stage": "flow", "step": 90, "seconds": 10, "steps_a_second": 9.0, "loss": 3.5}
{"stage": "flow", "step": 180, "seconds": 20, "steps_a_second": 9.0, "loss": 3.0}
{"stage": "flow", "step": 200, "seconds": 5, "steps_a_second": 4.0, "loss": 2.5}
"""
SHORTFALL = {"rtf": "The flow is too large; fewer steps come next."}


@pytest.fixture
def directory(standin_v2: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(standin_v2, tmp_path / "model")
    (directory / INSTRUCTIONS_FILE).write_text(json.dumps(INSTRUCTIONS), encoding="utf-8")
    voice = Voice("ann", "Ann", "builtin", make_prompt(text="Hello there."), fingerprint_of(directory), "")
    write_spk2info(directory / "spk2info.pt", {"ann": voice})
    return directory


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "flow.log").write_text(LOG)
    (tmp_path / "logs" / "corpus.log").write_text("20 h in 400 s\n")
    return tmp_path / "logs"


def quality(directory: Path) -> dict[str, object]:
    scores = report({"wer_en_builtin": 0.0712, "rtf": 0.61}, {"real": "no folder was given: --real"})
    machine = {"cpu": "AMD EPYC", "cores": 2}
    return {"digest": digest_of(directory), "sentences": 100, "seed": 0, "machine": machine, "scores": scores}


def test_every_score_stands_beside_its_threshold(directory: Path, logs: Path) -> None:
    text = card(directory, quality(directory), logs, "one H200", SHORTFALL)
    for score in SCORES.values():
        assert f"| {score.what} |" in text
    assert "| WER English, built-in voices | 0.0712 | at most 0.08 | yes |" in text
    assert "| RTF on two CPU cores, one request, streaming | 0.61 | at most 0.5 | **no** |" in text
    assert "| not measured: no folder was given: --real | at least 0.1 |  |" in text
    assert f"- RTF on two CPU cores, one request, streaming: {SHORTFALL['rtf']}" in text
    assert "| flow | 200 | 25 | loss 2.5 |" in text and "| corpus |" not in text
    assert "Ann (English)" in text and "Speak slowly." in text and "CC BY 2.0 FR" in text


def test_a_shortfall_needs_a_cause(directory: Path, logs: Path) -> None:
    with pytest.raises(SystemExit, match="rtf"):
        card(directory, quality(directory), logs, "one H200", {})


def test_scores_of_other_weights_are_refused(directory: Path, logs: Path) -> None:
    measured = quality(directory)
    (directory / "MODEL_CARD.md").write_text("The card itself does not count.")
    card(directory, measured, logs, "one H200", SHORTFALL)
    (directory / "llm.pt").write_bytes(b"other weights")
    with pytest.raises(SystemExit, match="again"):
        card(directory, measured, logs, "one H200", SHORTFALL)
