"""The page of a model that has learned certain instructions: it offers them, and says when it ignores another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.text.instructions import INSTRUCTIONS_FILE
from recipes.embedded.instructions import INSTRUCTIONS
from tests.ui.browser import needs_chromium
from tests.ui.conftest import served
from tests.ui.visitor import GOOD, Visit, Visitor

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def learned_address(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = shutil.copytree(standin_v2, tmp_path_factory.mktemp("model") / "learned")
    (directory / INSTRUCTIONS_FILE).write_text(json.dumps(INSTRUCTIONS), encoding="utf-8")
    engine = Engine.load(directory, Settings(voices_dir=tmp_path_factory.mktemp("voices"), warm_up=False))
    with served(engine) as address:
        yield address
    engine.close()


def open_instruct_tab(visit: Visit, address: str) -> Visitor:
    visitor = visit(address)
    visitor.open_tab("Instruct")
    visitor.upload(GOOD)
    return visitor


def test_an_example_for_each_learned_style_plays(visit: Visit, learned_address: str) -> None:
    visitor = open_instruct_tab(visit, learned_address)
    for style in INSTRUCTIONS.values():
        visitor.panel.get_by_role("button", name=style[0]).wait_for()
    assert visitor.panel.get_by_role("button", name="四川话").count() == 0
    visitor.panel.get_by_role("button", name="请说慢一点").click()
    visitor.expect_sound()
    assert visitor.label("How it shall be said").input_value() == "请说慢一点。"
    assert visitor.page.locator("#status .message").count() == 1


def test_an_instruction_that_is_ignored_is_told_beside_the_run(visit: Visit, learned_address: str) -> None:
    visitor = open_instruct_tab(visit, learned_address)
    visitor.type("#text", "Good morning.")
    visitor.label("How it shall be said").fill("Like a <b>pirate</b>")
    visitor.generate()
    visitor.expect_sound()
    assert "“Like a <b>pirate</b>”" in visitor.expect("has not learned")
