"""The markers that CosyVoice adds to its text model's vocabulary, in the order that fixes their ids."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Literal

Version = Literal["cosyvoice2", "cosyvoice3"]

END_OF_PROMPT = "<|endofprompt|>"
END_OF_TEXT = "<|endoftext|>"


@cache
def special_tokens(version: Version) -> tuple[str, ...]:
    """Markers such as `[breath]` and `<strong>`; CosyVoice3 has phonemes such as `[AY1]` and `[ǎo]` besides."""
    table = json.loads(Path(__file__).with_name("special_tokens.json").read_text(encoding="utf-8"))
    tokens = table["markers"].split()
    if version == "cosyvoice3":
        phonemes = " ".join(table["cosyvoice3_phonemes"] + table["cosyvoice3_pinyin"]).split()
        tokens += [*table["cosyvoice3_markers"].split(), *(f"[{phoneme}]" for phoneme in phonemes)]
    return tuple(tokens)


@cache
def marker_pattern() -> re.Pattern[str]:
    """Matches one marker of either version, or anything of the form `<|...|>`; for `split` it is one group."""
    return re.compile("(" + "|".join([r"<\|[^|]*\|>", *map(re.escape, special_tokens("cosyvoice3"))]) + ")")
