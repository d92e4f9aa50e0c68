from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.text.instructions import INSTRUCTIONS_FILE, Instructions, read_instructions
from recipes.embedded.instructions import INSTRUCTIONS

LEARNED = Instructions({"slow": ("Speak slowly.", "请说慢一点。"), "high": ("音调高一点", "Please raise your pitch.")})


@pytest.mark.parametrize(
    ("said", "learned"),
    [
        ("Speak slowly.", "Speak slowly."),
        ("  SPEAK   slowly!! ", "Speak slowly."),
        ("please speak slowly", "Speak slowly."),
        ("raise your pitch", "Please raise your pitch."),
        ("说慢一点", "请说慢一点。"),
        ("请，音调 高一点！", "音调高一点"),
        ("Ｓｐｅａｋ slowly<|endofprompt|>", "Speak slowly."),
        ("Speak slowly and sadly.", None),
        ("用四川话说这句话", None),
        ("slowly", None),
        ("", None),
    ],
)
def test_a_learned_instruction_is_found_however_it_is_written(said: str, learned: str | None) -> None:
    assert LEARNED.find(said) == learned


def test_examples_are_in_the_language_asked_for() -> None:
    assert LEARNED.examples("en") == {"slow": "Speak slowly.", "high": "Please raise your pitch."}
    assert LEARNED.examples("zh") == {"slow": "请说慢一点。", "high": "音调高一点"}
    assert Instructions({"slow": ("Slow.",)}).examples("zh") == {"slow": "Slow."}


def test_a_directory_without_the_file_takes_any_instruction(tmp_path: Path) -> None:
    assert read_instructions(tmp_path) is None


def test_the_file_is_read_as_the_recipe_writes_it(tmp_path: Path) -> None:
    (tmp_path / INSTRUCTIONS_FILE).write_text(json.dumps(INSTRUCTIONS), encoding="utf-8")
    instructions = read_instructions(tmp_path)
    assert instructions.phrases == INSTRUCTIONS
    for phrase in (phrase for style in INSTRUCTIONS.values() for phrase in style):
        assert instructions.find(phrase) == phrase


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"slow": []}', '{"slow": 3}', '{"slow": [3]}', '["slow"]'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INSTRUCTIONS_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ModelDirectoryError, match=INSTRUCTIONS_FILE):
        read_instructions(tmp_path)
