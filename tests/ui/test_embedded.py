"""The page with the model that ships with the project, as anybody who starts it sees and hears it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cosy_engine.checkpoint.default import default_model_dir
from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from tests.sound import faults
from tests.ui.browser import needs_chromium
from tests.ui.conftest import served
from tests.ui.visitor import TRANSCRIPT, Visit

PROMPTS = Path(__file__).parents[2] / "assets" / "prompts"
TEXT = "The train to the coast leaves at nine, and it is never late."

pytestmark = [pytest.mark.browser, pytest.mark.embedded, needs_chromium]


@pytest.fixture(scope="module")
def embedded_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = Engine.load(default_model_dir(), Settings(voices_dir=tmp_path_factory.mktemp("voices"), device="cpu"))
    with served(engine) as address:
        yield address
    engine.close()


def test_a_recording_is_cloned_without_its_words(visit: Visit, embedded_address: str) -> None:
    visitor = visit(embedded_address)
    assert not visitor.label(TRANSCRIPT).is_visible()
    visitor.upload((PROMPTS / "michael.wav").read_bytes())
    visitor.type("#text", TEXT)
    visitor.generate()
    assert faults(visitor.expect_sound(), 24000, TEXT) == []
    assert visitor.errors == []


@pytest.mark.parametrize(
    ("tab", "example"),
    [("Clone a voice", "早上好"), ("Cross-lingual", "After the rain"), ("Instruct", "Speak slowly.")],
)
def test_examples_speak(visit: Visit, embedded_address: str, tab: str, example: str) -> None:
    visitor = visit(embedded_address)
    visitor.open_tab(tab)
    visitor.play_example(example)
    sound = visitor.expect_sound()
    assert faults(sound, 24000, visitor.page.locator("#text textarea").input_value()) == []
    assert visitor.errors == []


def test_a_built_in_voice_speaks(visit: Visit, embedded_address: str) -> None:
    visitor = visit(embedded_address)
    visitor.open_tab("Saved voices")
    assert len(visitor.saved_voices()) >= 6
    visitor.type("#text", TEXT)
    visitor.generate()
    assert faults(visitor.expect_sound(), 24000, TEXT) == []
