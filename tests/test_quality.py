"""`make quality`: what is spoken, how the scores come about, and what is said when something is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import quality, scoring
from benchmarks.quality import SCORES, Job, Result, Sentence, Speaker, plan, read_sentences, report, summarise
from benchmarks.scoring import Errors, Heard, Listener, check_models, naturalness, rate_of
from cosy_engine.audio.decode import load_audio
from cosy_engine.checkpoint.fingerprint import fingerprint_of
from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.text.normalize import language_of
from cosy_engine.voices.spk2info import write_spk2info
from cosy_engine.voices.voice import Voice
from recipes.embedded.instructions import INSTRUCTIONS
from tests.recordings import encoded, hum
from tests.voices.helpers import make_prompt

PROMPTS = Path(__file__).parents[1] / "assets" / "prompts"
MODELS = os.environ.get("COSY_QUALITY_MODELS")

EN, ZH = Sentence("Good morning.", "en"), Sentence("早上好。", "zh")
ANN, BOB, LI = (
    Speaker(name, language, make_prompt(), Path(f"{name}.wav"))
    for name, language in (("ann", "en"), ("bob", "en"), ("li", "zh"))
)
VOICES = {ANN.recording: np.array([1.0, 0.0]), BOB.recording: np.array([0.0, 1.0]), LI.recording: np.array([0.6, 0.8])}


def heard(edits: int, tones: int | None = None) -> Heard:
    return Heard("…", Errors(edits, 10), *(() if tones is None else (Errors(0, 10), Errors(tones, 10))))


def test_the_held_out_sentences_are_a_hundred_of_each_language() -> None:
    sentences = read_sentences(100)
    assert [sum(sentence.language == language for sentence in sentences) for language in ("en", "zh")] == [100, 100]
    assert len({sentence.text for sentence in sentences}) == 200
    assert all(language_of(sentence.text) == sentence.language for sentence in sentences)
    assert [sentence.text for sentence in read_sentences(3)][:3] == [sentence.text for sentence in sentences][:3]


def test_every_sentence_is_spoken_by_a_voice_of_its_language() -> None:
    sentences = [EN, EN, EN, ZH]
    spoken = [(job.speaker.name, job.sentence.language) for job in plan("builtin", sentences, [ANN, LI, BOB], {})]
    assert spoken == [("ann", "en"), ("bob", "en"), ("ann", "en"), ("li", "zh")]
    assert {job.sentence.language for job in plan("real", sentences, [ANN, LI], {})} == {"en"}


def test_instructions_come_in_forty_pairs() -> None:
    jobs = plan("instruct", read_sentences(12), [ANN, BOB, LI], INSTRUCTIONS)
    pairs = {}
    for job in jobs:
        assert language_of(job.instruct) == job.sentence.language
        assert job.instruct in INSTRUCTIONS[job.sub]
        kind = "rate" if job.sub in ("slow", "fast") else "pitch"
        pairs.setdefault((kind, job.sentence.language, job.number), []).append(job)
    assert len(pairs) == 40
    for one, other in pairs.values():
        assert (one.sentence, one.speaker) == (other.sentence, other.speaker) and one.instruct != other.instruct


def test_error_rates_weigh_sentences_by_their_length() -> None:
    assert rate_of([Errors(1, 2), Errors(0, 8)]) == 0.1


def test_scores_of_what_was_heard() -> None:
    builtin = [
        Result(Job("builtin", 0, EN, ANN), 1, heard(1), mos=4.0),
        Result(Job("builtin", 1, EN, BOB), 1, heard(3), mos=3.0),
        Result(Job("builtin", 0, ZH, LI), 1, heard(2, 1), mos=None),
    ]
    streaming = [Result(Job("streaming", 0, EN, ANN), 1, heard(1))]
    scores = summarise(builtin + streaming, {})
    assert scores["wer_en_builtin"] == 0.2
    assert (scores["cer_zh_builtin"], scores["tones_zh_builtin"], scores["syllables_zh_builtin"]) == (0.2, 0.1, 0.0)
    assert scores["dnsmos_p808"] == 3.5
    assert scores["streaming_wer_gap"] == pytest.approx(0.1)
    assert scores["streaming_tones_gap"] is None and scores["wer_en_unseen"] is None


def test_scores_of_voices() -> None:
    unseen = [Result(Job("unseen", 0, ZH, LI), 1, heard(0, 0), voice=np.array([0.0, 1.0]))]
    real = [
        Result(Job("real", 0, EN, ANN), 1, heard(0), voice=np.array([1.0, 0.0])),
        Result(Job("real", 1, EN, BOB), 1, heard(0), voice=np.array([0.6, 0.8])),
    ]
    scores = summarise(unseen + real, VOICES)
    assert scores["similarity_unseen"] == pytest.approx(0.8)
    assert scores["similarity_real"] == pytest.approx(0.9)
    assert scores["similarity_real_exchanged"] == pytest.approx(0.3)
    assert scores["similarity_real_gain"] == pytest.approx(0.6)


def test_scores_of_instructions() -> None:
    def pair(number: int, *results: tuple[str, float, float | None]) -> list[Result]:
        return [Result(Job("instruct", number, EN, ANN, sub), seconds, pitch=hz) for sub, seconds, hz in results]

    results = [
        *pair(0, ("fast", 2.0, 100), ("slow", 3.0, 100), ("low", 2.0, 100), ("high", 2.0, 120)),
        *pair(1, ("fast", 3.0, 100), ("slow", 3.0, 200), ("low", 2.0, 100), ("high", 9.0, 90)),
        *pair(2, ("low", 2.0, 100), ("high", 3.0, None)),
    ]
    scores = summarise(results, {})
    assert scores["instruct_rate_pairs"] == 0.5
    assert scores["instruct_pitch_pairs"] == pytest.approx(1 / 3)
    assert scores["instruct_pairs"] == 0.4


def test_the_report_has_every_threshold_and_reason() -> None:
    lines = report({"wer_en_builtin": 0.08, "similarity_unseen": 0.74999, "cer_zh_builtin": 0.5}, {"real": "no folder"})
    assert lines.keys() == SCORES.keys()
    assert lines["wer_en_builtin"] == {
        "what": "WER English, built-in voices",
        "value": 0.08,
        "at_most": 0.08,
        "met": True,
    }
    assert lines["similarity_unseen"]["met"] is False
    assert "met" not in lines["cer_zh_builtin"]
    assert lines["similarity_real_gain"]["value"] is None and lines["similarity_real_gain"]["why"] == "no folder"


def test_parts_can_be_measured_one_after_the_other() -> None:
    about = {"digest": "d", "sentences": 100, "seed": 0, "machine": {"cores": 2}}
    first = about | {
        "scores": report({"rtf": 0.4, "wer_en_builtin": 0.2}, {}),
        "machine": {"cores": 2, "load_before": 1},
    }
    second = about | {"scores": report({"wer_en_builtin": 0.1}, {})}
    both = quality.completed(second, first, ["builtin"])
    assert (both["scores"]["rtf"]["value"], both["scores"]["wer_en_builtin"]["value"]) == (0.4, 0.1)
    assert both["machine"] == {"cores": 2, "load_before": 1} and both["scores"].keys() == SCORES.keys()
    assert quality.completed(second, first | {"digest": "other weights"}, ["builtin"]) == second


class StubJudge:
    """Hears every sentence as it should be, and one voice everywhere."""

    def listen(self, samples: np.ndarray, rate: int, sentence: Sentence) -> Heard:
        nothing = Errors(0, len(sentence.text))
        return Heard(sentence.text, nothing, nothing, nothing)

    def voice(self, samples: np.ndarray, rate: int) -> np.ndarray:
        return np.array([1.0])

    def mos(self, samples: np.ndarray, rate: int) -> float:
        return 4.0


@pytest.fixture(scope="module")
def engine(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = shutil.copytree(standin_v2, tmp_path_factory.mktemp("model") / "with-voices")
    voices = {
        name: Voice(name, name, "builtin", make_prompt(text=text), fingerprint_of(directory), "")
        for name, text in (("ann", "Hello there."), ("li", "你好。"))
    }
    write_spk2info(directory / "spk2info.pt", voices)
    engine = Engine.load(directory, Settings(voices_dir=tmp_path_factory.mktemp("voices"), device="cpu", warm_up=False))
    yield engine
    engine.close()


def test_all_parts_are_spoken_judged_and_kept(engine: Engine, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("ann", "bob"):
        (prompts / f"{name}.wav").write_bytes(encoded(hum(2)))
    (prompts / "prompts.tsv").write_text("file\tname\ttext\nann.wav\tAnn\tHello.\nbob.wav\tBob\tHello.\n")
    parts = ["builtin", "streaming", "unseen", "real", "instruct"]
    scores, why_not = quality.evaluate(
        engine, StubJudge(), parts, [EN, EN, ZH], {"unseen": None, "real": prompts}, seed=0, keep=tmp_path / "kept"
    )
    assert scores["wer_en_builtin"] == scores["tones_zh_builtin"] == scores["streaming_wer_gap"] == 0
    assert scores["dnsmos_p808"] == 4.0 and scores["similarity_real"] == 1.0
    assert scores["instruct_pairs"] is not None
    assert scores["similarity_unseen"] is None and "--unseen" in why_not["unseen"] and "real" not in why_not
    for part, count in {"builtin": 3, "streaming": 3, "real": 2, "instruct": 3 * 4}.items():
        folder = tmp_path / "kept" / part
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == count
        for row in rows:
            assert load_audio(folder / row["sound"]).seconds == pytest.approx(row["seconds"], abs=0.01)


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "find_spec", lambda name: None if name == "opencc" else object())
    with pytest.raises(SystemExit, match="installed: opencc.\n.*requirements-quality.txt"):
        check_models(tmp_path)


def test_missing_models_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "find_spec", lambda name: object())
    (tmp_path / "whisper-small").mkdir()
    (tmp_path / "whisper-small" / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="hf download Xenova/whisper-small") as refused:
        check_models(tmp_path)
    assert "normalizer.json" in str(refused.value) and f"--local-dir {tmp_path}" in str(refused.value)
    with pytest.raises(SystemExit, match="COSY_QUALITY_MODELS"):
        check_models(None)


@pytest.mark.parametrize("options", [["--parts", "builtin,nonsense"], ["--unseen", "."], ["--sentences", "0"]])
def test_wrong_options_are_refused_at_once(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "check_models", lambda folder: folder)
    app = typer.Typer()
    app.command()(quality.main)
    refused = CliRunner().invoke(app, ["--models", str(tmp_path), *options])
    assert refused.exit_code == 2
    assert options[0] in refused.stderr or "prompts.tsv" in refused.stderr


@pytest.mark.skipif(
    MODELS is None, reason="the evaluation models are not here; set COSY_QUALITY_MODELS to their folder"
)
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, scoring.PACKAGES)),
    reason="the packages of requirements-quality.txt are missing",
)
def test_real_speech_is_understood() -> None:
    """The six recordings of assets/prompts: one character of 64 is taken for a homophone, everything else is heard."""
    listener = Listener(check_models(Path(MODELS)), 2)
    errors: dict[str, list[Errors]] = {"en": [], "zh": [], "tones": []}
    for path in sorted(PROMPTS.glob("*.wav")):
        text, sound = path.with_suffix(".txt").read_text("utf-8").strip(), load_audio(path)
        language = language_of(text)
        heard = listener(sound.samples, sound.sample_rate, text, language)
        errors[language].append(heard.errors)
        errors["tones"] += [heard.tones] if heard.tones else []
        assert naturalness(sound.samples, sound.sample_rate) > 3.6
    assert {name: round(rate_of(each), 4) for name, each in errors.items()} == {"en": 0, "zh": 0.0156, "tones": 0}
