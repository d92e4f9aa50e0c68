"""A model whose directory lists the instructions that it has learned: others are left out, and it is said."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from starlette.datastructures import Headers
from typer.testing import CliRunner

from cosy_engine.cli import app
from cosy_engine.compat import CosyVoice
from cosy_engine.config import Settings
from cosy_engine.engine import Engine, Synthesis, SynthesisRequest
from cosy_engine.errors import InvalidRequestError
from cosy_engine.text.instructions import INSTRUCTIONS_FILE
from cosy_engine.ui.texts import sentence
from recipes.embedded.instructions import INSTRUCTIONS
from tests.recordings import encoded, hum

TEXT = "Good morning."
LEARNED, UNKNOWN = "Speak slowly.", "Speak like a pirate."


@pytest.fixture(scope="module")
def directory(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "learned"
    shutil.copytree(standin_v2, directory)
    (directory / INSTRUCTIONS_FILE).write_text(json.dumps(INSTRUCTIONS), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def engine(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine.load(directory, Settings(voices_dir=tmp_path_factory.mktemp("voices"), device="cpu", warm_up=False))
    yield engine
    engine.close()


async def ask(engine: Engine, spoken: str = "", **fields: object) -> tuple[np.ndarray, Synthesis]:
    prompt = await engine.make_prompt(encoded(hum(2)), spoken)
    synthesis = engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=4, **fields))
    return np.concatenate([chunk.samples async for chunk in synthesis]), synthesis


async def test_a_learned_instruction_reaches_the_model_as_it_was_learned(engine: Engine) -> None:
    asked, synthesis = await ask(engine, mode="instruct", instruct="please speak SLOWLY")
    learned, _ = await ask(engine, mode="instruct", instruct=LEARNED)
    without, _ = await ask(engine, mode="cross_lingual")
    assert synthesis.notices == []
    assert np.array_equal(asked, learned)
    assert not np.array_equal(asked, without)


@pytest.mark.parametrize(("spoken", "mode"), [("", "cross_lingual"), ("what is said", "zero_shot")])
async def test_an_unknown_instruction_is_left_out_and_told(engine: Engine, spoken: str, mode: str) -> None:
    asked, synthesis = await ask(engine, spoken, mode="instruct", instruct=UNKNOWN)
    without, _ = await ask(engine, spoken, mode=mode)
    assert np.array_equal(asked, without)
    [notice] = synthesis.notices
    assert (notice.param, notice.code) == ("instruct", "instruction_unknown")
    assert UNKNOWN in notice.message and LEARNED in notice.message


async def test_a_notice_follows_the_browser(engine: Engine) -> None:
    _, synthesis = await ask(engine, mode="instruct", instruct="用四川话说这句话" * 20)
    request = gr.Request()
    request.headers = Headers({"accept-language": "zh-CN"})
    [notice] = synthesis.notices
    told = sentence(request, notice)
    assert "没有学过" in told and "请说慢一点。" in told and len(told) < 300
    request.headers = Headers({"accept-language": "en"})
    assert sentence(request, notice) == notice.message


async def test_what_is_no_instruction_is_still_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="speak slowly"):
        await ask(engine, mode="instruct", instruct="?!")


async def test_a_model_without_a_list_takes_any_instruction(engine: Engine, standin_v2: Path) -> None:
    anything = Engine(replace(engine.model, directory=standin_v2), engine.settings)
    try:
        one, synthesis = await ask(anything, mode="instruct", instruct=UNKNOWN)
        other, _ = await ask(anything, mode="instruct", instruct=LEARNED)
    finally:
        anything.close()
    assert synthesis.notices == []
    assert not np.array_equal(one, other)


def test_the_command_line_tells_on_stderr(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSY_VOICES_DIR", str(tmp_path / "voices"))
    recording = tmp_path / "prompt.wav"
    recording.write_bytes(encoded(hum(2)))
    command = ["say", TEXT, "--mode", "instruct", "--instruct", UNKNOWN, "--prompt-wav", str(recording), "--json"]
    said = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "o.wav"), "--model-dir", str(directory)])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["audio_seconds"] > 0
    assert f"Note: This model has not learned the instruction “{UNKNOWN}”" in said.stderr


def test_users_of_the_known_api_are_told_in_the_log(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recording = tmp_path / "prompt.wav"
    recording.write_bytes(encoded(hum(2)))
    with CosyVoice(directory, settings=Settings(voices_dir=tmp_path / "voices", device="cpu", warm_up=False)) as model:
        with caplog.at_level(logging.WARNING, "cosy_engine.compat"):
            assert len(list(model.inference_instruct2(TEXT, UNKNOWN, str(recording)))) == 1
    assert UNKNOWN in caplog.text
