from __future__ import annotations

import re
import string
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from starlette.datastructures import Headers

from cosy_engine.audio.decode import Recording, check_prompt, load_audio
from cosy_engine.errors import CosyError, QueueFullError
from cosy_engine.ui.texts import _CHINESE_ERRORS, I18N, label, say, sentence
from cosy_engine.voices.names import clean_name
from cosy_engine.voices.store import VoiceStore
from tests.voices.helpers import make_prompt

PACKAGE = Path(__file__).parents[2] / "cosy_engine"
TRANSLATIONS = I18N.translations_dict
PAGE_ERRORS = ["audio/decode.py", "frontend.py", "voices/*.py", "engine.py"]  # whose errors a visitor can meet


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def browser(language: str) -> gr.Request:
    request = gr.Request()
    request.headers = Headers({"accept-language": language})
    return request


def test_every_text_of_the_page_exists_in_both_languages() -> None:
    used = {
        key
        for file in (PACKAGE / "ui").glob("*.py")
        for key in re.findall(r"(?:label|help_text|instruction_box|say)\((?:web, )?\"(\w+)\"", file.read_text("utf-8"))
    }
    used |= {
        f"{aspect}_{grade}"
        for aspect in ("verdict", "length", "level", "clipping", "noise", "silence")
        for grade in ("good", "fair", "poor")
    }
    assert len(used) > 60
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


def test_every_error_of_the_page_has_a_chinese_sentence() -> None:
    codes = {
        code
        for pattern in PAGE_ERRORS
        for file in PACKAGE.glob(pattern)
        for code in re.findall(r"code=\"(\w+)\"", file.read_text("utf-8"))
    }
    assert len(codes) > 20
    assert codes | {"queue_full"} == _CHINESE_ERRORS.keys()


def raised(work: object) -> CosyError:
    with pytest.raises(CosyError) as caught:
        work()
    return caught.value


def errors(folder: Path) -> list[CosyError]:
    store = VoiceStore(folder, "one model", limit=1)
    store.enroll("安", make_prompt())
    other = VoiceStore(folder, "another model")
    (voice,) = store.list()
    noise = np.random.default_rng(0).standard_normal(40 * 16000).astype(np.float32)
    return [
        raised(lambda: load_audio(b"no recording")),
        raised(lambda: check_prompt(Recording(np.zeros(16000, np.float32), 16000))),
        raised(lambda: check_prompt(Recording(noise, 16000))),
        raised(lambda: clean_name(" ")),
        raised(lambda: clean_name("n" * 200)),
        raised(lambda: store.get("nobody")),
        raised(lambda: store.enroll("安", make_prompt())),
        raised(lambda: store.enroll("another", make_prompt())),
        raised(lambda: other.get(voice.id)),
        raised(lambda: store.import_voice(b"no voice")),
        QueueFullError("Full.", retry_after=12.4),
    ]


def test_errors_follow_the_browser(tmp_path: Path) -> None:
    for error in errors(tmp_path):
        assert sentence(browser("en"), error) == error.message
        chinese = sentence(browser("zh-CN"), error)
        assert re.search(r"[\u4e00-\u9fff]", chinese)
        assert not re.search(r"[A-Za-z]{4,}(?<!flac)(?<!webm)", chinese), chinese


def test_an_error_without_a_chinese_sentence_is_told_in_english() -> None:
    assert sentence(browser("zh-CN"), CosyError("Something else.")) == "Something else."
