"""Long text to pieces that the speech LM speaks one after the other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from cosy_engine.text.normalize import Language, is_speakable, language_of
from cosy_engine.text.special_tokens import marker_pattern

LONGEST_PIECE = 120  # characters in Chinese, tokens otherwise: about 30 s of speech

_STOPS = {"zh": "。？！；：、.?!;", "en": ".?!;:"}
_CUTS = (re.compile(r"(?<=[。？！；：.?!;:])"), re.compile("(?<=[，,、])"), re.compile(r"(?<=\S)(?=\s)"))


def split_paragraph(
    text: str,
    count_tokens: Callable[[str], int],
    language: Language,
    *,
    token_max_n: int = 80,
    token_min_n: int = 60,
    merge_len: int = 20,
    comma_split: bool = False,
) -> list[str]:
    """Pieces of whole sentences, as the public front end makes them.

    Sentences are collected until the next one would make the piece longer than `token_max_n`, provided that it is
    longer than `token_min_n` already. A last piece shorter than `merge_len` joins the one before. A sentence is never
    cut, so a piece can be longer than `token_max_n`.

    Args:
        text: normalised text; a final stop is added when it has none.
        count_tokens: the length of a piece of text that is not Chinese; Chinese is counted in characters.
        comma_split: commas end a sentence too.

    Raises:
        IndexError: the text is empty, or begins with a stop before a quotation mark.
    """
    length = len if language == "zh" else count_tokens
    stops = _STOPS[language] + ("，," if comma_split else "")
    if text[-1] not in stops:
        text += "。" if language == "zh" else "."

    sentences: list[str] = []
    for body, stop, quote in re.findall(f'([^{stops}]*)([{stops}])(["”]?)', text):
        if body:
            sentences.append(body + stop + quote)
        elif quote:
            sentences[-1] += quote

    pieces: list[str] = []
    current = ""
    for sentence in sentences:
        if length(current + sentence) > token_max_n and length(current) > token_min_n:
            pieces.append(current)
            current = ""
        current += sentence
    if current and pieces and length(current) < merge_len:
        pieces[-1] += current
    elif current:
        pieces.append(current)
    return pieces


def cut(text: str, length: Callable[[str], int], limit: int, cuts: tuple[re.Pattern[str], ...] = _CUTS) -> list[str]:
    """Parts of `text` no longer than `limit` and of about equal length: cut after stops, else after commas, else at
    blanks, else anywhere but inside a marker."""
    total = length(text)
    if total <= limit:
        return [text]
    if cuts:
        parts = [part for whole in cuts[0].split(text) for part in cut(whole, length, limit, cuts[1:])]
    else:
        outside_markers = marker_pattern().split(text)
        parts = [atom for i, whole in enumerate(outside_markers) for atom in ([whole] if i % 2 else whole)]
    goal = total / math.ceil(total / limit)
    pieces = [""]
    filled = 0
    for part in parts:
        size = length(part)
        if filled and (filled >= goal or filled + size > limit):
            pieces.append("")
            filled = 0
        pieces[-1] += part
        filled += size
    return pieces


def split_text(text: str, count_tokens: Callable[[str], int], *, whole: bool = False) -> list[str]:
    """Pieces of text that can be spoken, none longer than `LONGEST_PIECE`; none if nothing can be spoken.

    With `whole`, and when it holds `<|...|>`, the text is one piece as long as it is short enough.
    """
    if not is_speakable(text):
        return []
    language = language_of(text)
    if whole or ("<|" in text and "|>" in text):
        pieces = [text]
    else:
        pieces = split_paragraph(text.lstrip(_STOPS[language] + " "), count_tokens, language)
    length = len if language == "zh" else count_tokens
    return [part for piece in pieces for part in cut(piece, length, LONGEST_PIECE) if is_speakable(part)]
