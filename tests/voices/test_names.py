from __future__ import annotations

import pytest

from cosy_engine.errors import InvalidRequestError
from cosy_engine.voices.names import clean_name, first_free, is_id, slug

HOSTILE = [
    "../../etc/passwd",
    "/absolute",
    "..",
    ".",
    "C:\\Windows\\system32",
    "a/b",
    "nul\0byte",
    "<script>alert(1)</script>",
    "小明",
    "小明 v2",
    "😀",
    "👩‍👩‍👧 family",
    "Ünïcödé",
    "a" * 80,
    "-rf",
    "name.json",
    "%2e%2e%2f",
    "\ud800lone surrogate",
    "line\nbreak\ttab",
    "\u202eright to left",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_any_name_gives_a_safe_id(name: str) -> None:
    voice_id = slug(clean_name(name))
    assert is_id(voice_id)
    assert is_id(first_free(voice_id, {voice_id}))


@pytest.mark.parametrize(("name", "expected"), [("Anna", "anna"), ("Anna  B.", "anna-b"), ("Zoë_2", "zoe_2")])
def test_latin_names_give_readable_ids(name: str, expected: str) -> None:
    assert slug(clean_name(name)) == expected


def test_other_scripts_keep_names_apart() -> None:
    assert slug("小明") != slug("小红")
    assert slug("小明 v2") != slug("小红 v2")
    assert slug("小明 v2").startswith("v2-")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("  小明  ", "小明"),
        ("<b>Anna</b>", "<b>Anna</b>"),
        ("👩‍👩‍👧", "👩‍👩‍👧"),
        ("two\nlines\x00\x1b[31m", "two lines[31m"),
        ("\u202eevil\u2066", "evil"),
    ],
    ids=ascii,
)
def test_the_name_people_see(name: str, shown: str) -> None:
    assert clean_name(name) == shown


@pytest.mark.parametrize(
    "name", ["", "   ", "\n\t", "\0", "\u200d\u202e", "x" * 81, "长" * 10_000], ids=lambda n: ascii(n[:9])
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        clean_name(name)
    assert refusal.value.param == "name"


@pytest.mark.parametrize("text", ["", "A", "..", "a/b", "a\0", "-a", "_a", "a\n", "é", "a" * 65, "a.json"], ids=ascii)
def test_what_is_no_id(text: str) -> None:
    assert not is_id(text)
