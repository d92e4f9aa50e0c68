"""Text as people type it to text as it is spoken.

The small functions at the top are the public front end's steps, one by one; `normalize` is what the engine does with
them: unwanted characters go first, then wetext's grammars write numbers, dates and units out, then the steps follow.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from functools import cache
from typing import Any, Literal

import regex

from cosy_engine.text.special_tokens import marker_pattern

Language = Literal["zh", "en"]

_CHINESE = re.compile("[\u4e00-\u9fff]")
_BRACKETS = str.maketrans("", "", "（）【】`")
_CORNER_MARKS = str.maketrans({"²": "平方", "³": "立方"})
_FULL_WIDTH = {ord("Ａ") + i: ord("A") + i for i in range(26)} | {ord("ａ") + i: ord("a") + i for i in range(26)}
_EMOJI = regex.compile(r"(?:\p{Extended_Pictographic}|\p{Emoji_Modifier}|\p{Regional_Indicator}|[\uFE0E\uFE0F\u20E3])+")
_UNPRINTABLE = regex.compile(r"[\p{C}--\n]", regex.VERSION1)
_SENTENCE_ENDS = {
    "zh": regex.compile("(?<=[。！？；])", regex.VERSION1),
    "en": regex.compile(r"""(?<=\p{Ll}{3}[.!?]["”’)]*)(?=\s+\P{Ll})""", regex.VERSION1),
}
# What wetext is asked about. In other English text it changes only what it should not: TV, CDs, a final "No.".
_WRITTEN = {"zh": regex.compile(r"\d"), "en": regex.compile(r"[\d\p{S}_#&%@*/]|\b\p{L}{1,4}\.(?=.)|\p{L}\.\p{L}")}
_LONGEST_NUMBER = 15  # digits; longer runs are read digit by digit


def contains_chinese(text: str) -> bool:
    """Whether the text counts as Chinese: one character of the basic CJK block is enough."""
    return _CHINESE.search(text) is not None


def language_of(text: str) -> Language:
    """The rules that apply to the text: Chinese ones, or English ones for everything else."""
    return "zh" if contains_chinese(text) else "en"


def replace_blank(text: str) -> str:
    """Drop the blanks that do not stand between two ASCII characters.

    Raises:
        IndexError: the text ends with a blank.
    """

    def is_word(character: str) -> bool:
        return character.isascii() and character != " "

    return "".join(
        character
        for position, character in enumerate(text)
        if character != " " or (is_word(text[position + 1]) and is_word(text[position - 1]))
    )


def replace_corner_mark(text: str) -> str:
    """Square and cubic marks as Chinese words."""
    return text.translate(_CORNER_MARKS)


def remove_bracket(text: str) -> str:
    """Drop Chinese brackets and backquotes; a Chinese dash becomes a blank."""
    return text.translate(_BRACKETS).replace("——", " ")


def is_only_punctuation(text: str) -> bool:
    """Whether there is nothing but punctuation and symbols; a blank is neither."""
    return regex.search(r"^[\p{P}\p{S}]*$", text) is not None


def spell_out_number(text: str) -> str:
    """English words for every run of digits.

    Raises:
        inflect.NumOutOfRangeError: a run has more than 36 digits.
    """
    runs = [(digits, "".join(run)) for digits, run in itertools.groupby(text, str.isdigit)]
    return "".join(_inflect().number_to_words(run) if digits else run for digits, run in runs)


def tidy_chinese(text: str) -> str:
    """The public front end's steps for Chinese, after the numbers: blanks, marks, stops, brackets, the last comma.

    Raises:
        IndexError: the text ends with a blank.
    """
    text = replace_corner_mark(replace_blank(text.replace("\n", "")))
    text = remove_bracket(text.replace(".", "。").replace(" - ", "，"))
    return re.sub("[，,、]+$", "。", text)


def clean(text: str) -> str:
    """Text without what cannot be spoken: control and zero-width characters, emoji, backslashes, runs of blanks.

    Digits of other scripts become ASCII ones, full-width letters plain ones. Line breaks stay.
    """
    text = unicodedata.normalize("NFC", re.sub("\r\n?|[\v\f\u0085\u2028\u2029]", "\n", text))
    text = _EMOJI.sub(" ", text.translate(_FULL_WIDTH).replace("\t", " ").replace("\\", " "))
    text = _UNPRINTABLE.sub("", text)
    text = "".join(_ascii_digit(character) for character in text)
    text = regex.sub(r"\p{Zs}+", " ", text)
    return re.sub(r" (?=[.,!?;:]+(?:\s|$))", "", text)


def verbalize(text: str, language: Language) -> str:
    """Numbers, dates, units, currencies and abbreviations as words, by wetext's grammars, which are part of it.

    Markers stay as they are, and so does what the grammars cannot read.
    """
    parts = marker_pattern().split(text)
    parts[::2] = [
        "".join(_verbalize_sentence(sentence, language) for sentence in _SENTENCE_ENDS[language].split(part))
        for part in parts[::2]
    ]
    return "".join(parts)


def normalize(text: str) -> str:
    """The words to speak, without blanks at the ends; "" if there are none. Text with `<|...|>` is only cleaned.

    An empty line ends a sentence, if nothing else does.
    """
    text = clean(text).strip()
    if not is_speakable(text):
        return ""
    if "<|" in text and "|>" in text:
        return text
    language = language_of(text)
    stop = "。" if language == "zh" else ". "
    text = regex.sub(r"(?<![\p{P}\s])\s*\n\s*\n\s*", stop, text)
    text = regex.sub(r"\s+", " ", text)
    if language == "zh":
        text = re.sub(r"(?<=[A-Za-z])-(?=\d)", " ", text)  # GPT-4 is not GPT minus four
        return tidy_chinese(verbalize(text, language).strip()).strip()
    text = verbalize(text, language).replace("²", " squared").replace("³", " cubed")
    text = re.sub(rf"\d{{{_LONGEST_NUMBER + 1},}}", lambda digits: " ".join(digits[0]), text)
    parts = marker_pattern().split(text)
    parts[::2] = map(spell_out_number, parts[::2])
    return "".join(parts).strip()


def is_speakable(text: str) -> bool:
    """Whether a letter or a digit is left, markers of the form `<|...|>` aside."""
    return regex.search(r"[\p{L}\p{N}]", re.sub(r"<\|[^|]*\|>", "", text)) is not None


def _verbalize_sentence(text: str, language: Language) -> str:
    """wetext's reading of a sentence, with its blanks at both ends."""
    words = text.strip()
    if not _WRITTEN[language].search(words):
        return text
    start = text.index(words)
    return text[:start] + _verbalize(words, language) + text[start + len(words) :]


def _verbalize(text: str, language: Language) -> str:
    try:
        return _normalizer(language).normalize(text).replace("\\", "")  # it escapes quotes
    except AssertionError:  # its grammar has no reading for some word in here
        words = text.split(" ")
        if len(words) == 1:
            return text
        middle = len(words) // 2
        halves = " ".join(words[:middle]), " ".join(words[middle:])
        return " ".join(_verbalize(half, language) for half in halves)


def _ascii_digit(character: str) -> str:
    if character.isascii() or not character.isdigit() or character in "²³":
        return character
    return str(unicodedata.digit(character))


@cache
def _normalizer(language: Language) -> Any:
    from wetext import Normalizer

    return Normalizer(lang=language, operator="tn")


@cache
def _inflect() -> Any:
    import inflect

    return inflect.engine()
