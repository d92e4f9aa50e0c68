from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from starlette.datastructures import Headers

from cosy_engine import errors
from cosy_engine.audio.decode import Recording, check_prompt, load_audio
from cosy_engine.errors import CosyError, QueueFullError
from cosy_engine.ui.texts import _CHINESE_ERRORS, I18N, complaint, label, say, sentence
from cosy_engine.voices.names import clean_name
from cosy_engine.voices.store import VoiceStore
from tests.voices.helpers import make_prompt

PACKAGE = Path(__file__).parents[2] / "cosy_engine"
TRANSLATIONS = I18N.translations_dict
PAGE_ERRORS = [  # whose errors a visitor can meet
    *("admission.py", "engine.py", "frontend.py", "audio/decode.py", "ui/*.py"),
    *("voices/names.py", "voices/store.py", "voices/voice.py", "speech_lm/torch_lm.py", "speech_lm/vllm_lm.py"),
]
TELLING = ["label", "help_text", "instruction_box", "say", "complaint"]
AT_THE_START = (errors.ModelDirectoryError, errors.BackendUnavailableError)
NOT_ON_THE_PAGE = (  # what the page never asks for, or says itself
    *("mode must be", "text must be a string", "whose voice shall be converted", "The recording to convert"),
    *(
        "Give the whole text at once",
        "Saving a voice needs a model",
        "Its catalogue entry",
        "cannot be opened",
        "No more text came",
    ),
    *("_plain_text(error.message)", "QueueFullError", "_ENGLISH[key]"),
)


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
        for key in re.findall(
            r"(?:label|help_text|instruction_box|say|complaint)\((?:web, )?\"(\w+)\"", file.read_text("utf-8")
        )
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


def codes_of_errors(file: Path) -> Iterator[tuple[str, str | None]]:
    """Where a source file makes errors for the caller, each with its code."""
    for call in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        kind = getattr(errors, call.func.id, None)
        if kind is None or issubclass(kind, AT_THE_START):
            continue
        if any(words in ast.unparse(call) for words in NOT_ON_THE_PAGE):
            continue
        code = next((ast.literal_eval(given.value) for given in call.keywords if given.arg == "code"), kind.code)
        yield f"{file.name}:{call.lineno}", code


def test_every_error_that_a_visitor_can_meet_has_a_chinese_sentence() -> None:
    made = dict(error for pattern in PAGE_ERRORS for file in PACKAGE.glob(pattern) for error in codes_of_errors(file))
    made["admission.py"] = QueueFullError("Full.", retry_after=1).code
    assert len(made) > 30
    chinese = _CHINESE_ERRORS.keys() | TRANSLATIONS["zh"].keys()
    assert {place: code for place, code in made.items() if code not in chinese} == {}


def raised(work: object) -> CosyError:
    with pytest.raises(CosyError) as caught:
        work()
    return caught.value


def some_errors(folder: Path) -> list[CosyError]:
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
        errors.EngineStoppedError("Stopping."),
        complaint("need_name", "name"),
        complaint("stalled", minutes=3),
    ]


def test_errors_follow_the_browser(tmp_path: Path) -> None:
    for error in some_errors(tmp_path):
        assert sentence(browser("en"), error) == error.message
        chinese = sentence(browser("zh-CN"), error)
        assert re.search(r"[\u4e00-\u9fff]", chinese)
        assert not re.search(r"[A-Za-z]{4,}(?<!flac)(?<!webm)", chinese), chinese


def test_an_error_without_a_chinese_sentence_is_announced_as_one() -> None:
    assert sentence(browser("zh-CN"), CosyError("Something else.")) == "出错了：Something else."
