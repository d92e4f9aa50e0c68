from __future__ import annotations

import re
import string
from pathlib import Path

import gradio as gr
import pytest
from starlette.datastructures import Headers

from cosy_engine.ui.texts import I18N, label, say

UI = Path(__file__).parents[2] / "cosy_engine" / "ui"
TRANSLATIONS = I18N.translations_dict


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def browser(language: str) -> gr.Request:
    request = gr.Request()
    request.headers = Headers({"accept-language": language})
    return request


def test_every_text_of_the_page_exists_in_both_languages() -> None:
    used = {
        key
        for file in UI.glob("*.py")
        for key in re.findall(r"(?:label|help_text|instruction_box|say)\((?:web, )?\"(\w+)\"", file.read_text("utf-8"))
    }
    assert len(used) > 30
    for language in ("en", "zh", "zh-CN", "zh-TW"):
        assert used <= TRANSLATIONS[language].keys()


@pytest.mark.parametrize("key", TRANSLATIONS["en"])
def test_both_languages_tell_the_same_values(key: str) -> None:
    english, chinese = TRANSLATIONS["en"][key], TRANSLATIONS["zh"][key]
    assert fields(english) == fields(chinese)
    assert re.search(r"[\u4e00-\u9fff]", chinese)


def test_messages_follow_the_browser() -> None:
    assert say(browser("en-GB,en;q=0.9"), "renamed", name="Ann") == "The voice is now called “Ann”."
    assert say(browser("zh-CN,zh;q=0.9,en;q=0.8"), "renamed", name="Ann") == "音色已更名为“Ann”。"
    assert label("text").key == "text"
