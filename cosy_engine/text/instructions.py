"""The instructions that a model has learned, if its directory says so.

`instructions.json` has the wordings of each style: `{"slow": ["Speak slowly.", "请说慢一点。"], "fast": [...]}`. Models
that follow instructions in general, as the published ones do, have no such file.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.text.normalize import Language, language_of
from cosy_engine.text.special_tokens import END_OF_PROMPT

INSTRUCTIONS_FILE = "instructions.json"


@dataclass(frozen=True)
class Instructions:
    """Wordings by style; there is at least one."""

    phrases: dict[str, tuple[str, ...]]

    def find(self, instruction: str) -> str | None:
        """The learned wording that this is, whatever its case, blanks and punctuation, with or without a "please"."""
        return self._by_letters.get(_letters(instruction))

    def examples(self, language: Language) -> dict[str, str]:
        """The first wording of each style in a language, by style; of any language if there is none in this one."""
        return {
            style: next((phrase for phrase in phrases if language_of(phrase) == language), phrases[0])
            for style, phrases in self.phrases.items()
        }

    @cached_property
    def _by_letters(self) -> dict[str, str]:
        return {_letters(phrase): phrase for phrases in self.phrases.values() for phrase in phrases}


def read_instructions(directory: Path) -> Instructions | None:
    """Those of a model directory; None if it has no such file.

    Raises:
        ModelDirectoryError: the file is not as described above.
    """
    path = directory / INSTRUCTIONS_FILE
    if not path.is_file():
        return None
    try:
        phrases = {style: tuple(wordings) for style, wordings in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError):
        phrases = {}
    wordings = [phrase for style in phrases.values() for phrase in style]
    if not all(phrases.values()) or not wordings or not all(isinstance(phrase, str) for phrase in wordings):
        raise ModelDirectoryError(f"{path} does not list wordings of instructions by style.", param="model_dir")
    return Instructions(phrases)


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text.replace(END_OF_PROMPT, "")).casefold()
    letters = "".join(character for character in plain if character.isalnum())
    return letters.removeprefix("please").removeprefix("请")
