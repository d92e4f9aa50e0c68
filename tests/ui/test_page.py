"""The page in a real browser: each tab end to end, the run and its queue, and what is said when something is wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from gradio.utils import get_upload_folder
from prometheus_client import REGISTRY

from cosy_engine.engine import Engine
from cosy_engine.frontend import Prompt, estimate_seconds
from cosy_engine.speech_lm.base import SpeechLMRequest
from tests.recordings import encoded, hum
from tests.ui.browser import needs_chromium
from tests.ui.conftest import served
from tests.ui.visitor import CHINESE_TABS, GOOD, LONG_TEXT, TABS, TRANSCRIPT, Visit, Visitor

pytestmark = [pytest.mark.browser, needs_chromium]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, TABS),
        ({"color_scheme": "dark", "viewport": {"width": 360, "height": 740}}, TABS),
        ({"locale": "zh-CN", "viewport": {"width": 360, "height": 740}}, CHINESE_TABS),
    ],
    ids=["english", "dark-phone", "chinese-phone"],
)
def test_page_opens_in_the_visitors_language(visit: Visit, options: dict[str, object], names: list[str]) -> None:
    visitor = visit(**options)
    visitor.page.get_by_role("tab").first.wait_for()
    assert [tab.inner_text() for tab in visitor.page.get_by_role("tab").all()] == names
    for name in names:
        visitor.open_tab(name)
        width = visitor.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1], "the page can be scrolled sideways"
    assert visitor.errors == []
    assert visitor.foreign == []


@pytest.mark.parametrize("tab", TABS)
def test_each_tab_makes_sound(visitor: Visitor, tab: str) -> None:
    if tab == "Saved voices":
        visitor.save_voice("Ann", "A buzz that rises and falls.")
        visitor.expect("Saved “Ann”.", "#enrol-note")
    else:
        visitor.open_tab(tab)
        visitor.upload(GOOD)
    if tab == "Clone a voice":
        visitor.label(TRANSCRIPT).fill("A buzz that rises and falls.")
    if tab == "Instruct":
        visitor.label("How it shall be said").fill("Speak slowly.")
    visitor.type("#text", "Hello, 你好, this is a test.")
    visitor.generate()
    visitor.expect_heard()
    visitor.expect_sound()
    assert visitor.errors == []


@pytest.mark.parametrize("text", ["Good morning.", "今天天气真好，我们去公园吧。", "三个 words 😀", "x" * 10_001])
def test_length_and_duration_are_told_while_typing(visitor: Visitor, text: str) -> None:
    visitor.type("#text", text)
    count = visitor.page.locator("#count .count")
    count.wait_for()
    said = count.inner_text()
    assert said.startswith(f"{len(text)} characters")
    if len(text) <= 10_000:
        assert f"about {np.ceil(estimate_seconds(text)):.0f} s" in said
    else:
        assert "at most 10000" in said
    visitor.type("#text", "")
    count.wait_for(state="detached")


def test_without_streaming_and_with_a_seed_that_is_used_again(visitor: Visitor) -> None:
    visitor.page.locator("#stream input").uncheck()
    visitor.type("#seed", "7")
    visitor.speak_like(GOOD)
    first = visitor.expect_sound()
    assert visitor.used_seed() == "7"
    visitor.type("#seed", "")
    visitor.generate()
    other = visitor.expect_sound()
    seed = visitor.used_seed()
    assert seed != "7"
    visitor.press(f"Use {seed} again")
    visitor.page.wait_for_function(f"document.querySelector('#seed input, #seed textarea').value === '{seed}'")
    visitor.generate()
    again = visitor.expect_sound()
    assert visitor.used_seed() == seed
    assert np.array_equal(again, other)
    assert not np.array_equal(again, first)


def test_long_text_tells_its_pieces(visitor: Visitor, engine: Engine) -> None:
    visitor.speak_like(GOOD, LONG_TEXT)
    assert "of" in visitor.expect("Speaking piece 1")
    visitor.expect("Speaking piece 2")
    visitor.press("Stop")
    visitor.expect("Stopped.")
    wait_until(lambda: engine.queue.active == 0)


def test_examples_fill_in_and_play(visitor: Visitor) -> None:
    visitor.open_tab("Instruct")
    example = "The snow kept falling."
    visitor.play_example(example)
    assert visitor.page.locator("#text textarea").input_value() == example
    assert visitor.label("How it shall be said").input_value() == "Speak slowly."
    visitor.expect_sound()
    visitor.upload(GOOD)
    visitor.play_example("周末我们一起去爬山吧")
    visitor.expect_sound()
    assert visitor.label("How it shall be said").input_value() == "用四川话说这句话"


def test_examples_bring_a_voice_each_and_leave_the_visitors_alone(visitor: Visitor) -> None:
    transcripts = []
    for example in ("Good morning!", "早上好"):
        visitor.play_example(example)
        assert visitor.page.locator("#text textarea").input_value().startswith(example)
        visitor.expect_sound()
        transcripts.append(visitor.label(TRANSCRIPT).input_value())
        visitor.press("Stop")
        visitor.expect("Stopped.")
    assert transcripts[0].startswith("The library") and "A" < transcripts[1][:1] > "z"
    visitor.upload(GOOD)
    assert visitor.label(TRANSCRIPT).input_value() == ""
    visitor.play_example("Good morning!")
    visitor.expect("First audio")
    assert visitor.label(TRANSCRIPT).input_value() == ""


def test_a_voice_is_made_ready_before_it_is_used(visitor: Visitor, engine: Engine, monkeypatch: object) -> None:
    made = []
    make = engine.frontend.make_prompt
    monkeypatch.setattr(engine.frontend, "make_prompt", lambda data: made.append(data) or make(data))
    recording = encoded(hum(2.3))
    visitor.upload(recording)
    visitor.panel.locator(".verdict", has_text="Voice is ready").wait_for()
    assert made == [recording]
    visitor.label(TRANSCRIPT).fill("Words that were typed later.")
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect_sound()
    assert made == [recording]


def test_a_recording_without_its_words_speaks_too(visitor: Visitor) -> None:
    visitor.upload(GOOD)
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect_sound()


def test_the_recording_goes_along_to_the_next_tab(visitor: Visitor) -> None:
    visitor.upload(GOOD)
    visitor.label(TRANSCRIPT).fill("A buzz.")
    for tab in ("Instruct", "Cross-lingual", "Saved voices"):
        visitor.open_tab(tab)
        visitor.panel.locator(".verdict", has_text="Voice is ready").wait_for()
    assert visitor.label(TRANSCRIPT).input_value() == "A buzz."
    visitor.type("#voice-name", "Ann")
    visitor.page.locator("#consent input").check()
    visitor.press("Save voice")
    visitor.expect("Saved “Ann”.", "#enrol-note")
    assert "A buzz." in visitor.page.locator("#about .about").inner_text()


def test_a_recording_that_the_server_has_deleted(visitor: Visitor) -> None:
    visitor.open_tab("Cross-lingual")
    recording = encoded(hum(1.937))
    visitor.upload(recording, "forgotten.wav")
    visitor.panel.locator(".verdict", has_text="ready").wait_for()
    for file in Path(get_upload_folder()).rglob("forgotten.wav"):
        file.unlink()
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.panel.get_by_role("alert").filter(has_text="no longer has this recording").wait_for()


def test_a_recording_gets_a_verdict(visitor: Visitor) -> None:
    visitor.upload(encoded(hum(4)))
    verdict = visitor.panel.locator(".verdict")
    verdict.wait_for()
    assert "Speech: 4.0 s" in verdict.inner_text()
    visitor.upload(encoded(np.clip(hum(2) * 20, -1, 1)))
    verdict.filter(has_text="Clipping").and_(visitor.page.locator(".verdict.poor")).wait_for()
    assert "2 s" not in visitor.panel.locator(".verdict .poor").first.inner_text()
    assert "distorted" in verdict.inner_text()


BAD_INPUTS = {
    "a text file named .wav": (b"This is not a recording.", "Good morning.", "not a recording", "无法读取"),
    "an empty file": (b"", "Good morning.", "empty", "没有声音"),
    "0.3 seconds": (encoded(hum(0.3)), "Good morning.", "0.3", "0.3"),
    "45 seconds": (encoded(hum(45, rate=8000), 8000), "Good morning.", "45", "45"),
    "silence": (encoded(np.zeros(32000)), "Good morning.", "silent", "没有声音"),
    "no text": (GOOD, "", "text", "文本"),
    "only punctuation": (GOOD, "?!…", "text", "文本"),
    "20,000 characters": (GOOD, "word " * 4000, "20,000", "20,000"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gets_a_sentence_and_the_next_request_works(visitor: Visitor, case: str) -> None:
    data, text, said, _ = BAD_INPUTS[case]
    visitor.speak_like(data, text)
    visitor.expect("please see the marked field")
    field = "Text to speak" if data is GOOD else None
    if field:
        visitor.expect_beside(field, said)
    else:
        assert said in visitor.panel.get_by_role("alert").inner_text()
    assert "Traceback" not in visitor.page.content()
    visitor.speak_like(GOOD)
    visitor.expect_sound()
    assert visitor.page.get_by_role("alert").count() == 0


def test_errors_are_chinese_on_a_chinese_page(visit: Visit) -> None:
    visitor = visit(locale="zh-CN")
    visitor.open_tab("跨语种")
    for data, text, _, said in BAD_INPUTS.values():
        visitor.upload(data)
        visitor.type("#text", text)
        visitor.generate("生成")
        visitor.page.get_by_role("alert").filter(has_text=said).first.wait_for()


def test_missing_inputs_are_named_beside_their_fields(visitor: Visitor) -> None:
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect("Upload or record the voice first.", "[role=tabpanel]")
    visitor.open_tab("Instruct")
    visitor.upload(GOOD)
    visitor.generate()
    visitor.expect_beside("How it shall be said", "Say how the text shall be spoken.")
    visitor.type("#seed", "seven")
    visitor.generate()
    visitor.expect_beside("Seed", "The seed is a whole number")


def requests_left_early() -> float:
    return REGISTRY.get_sample_value("cosy_requests_total", {"mode": "cross_lingual", "outcome": "cancelled"}) or 0


def test_stop_ends_the_work(visitor: Visitor, engine: Engine) -> None:
    before = requests_left_early()
    visitor.speak_like(GOOD, LONG_TEXT)
    wait_until(lambda: engine.queue.active == 1)
    visitor.press("Stop")
    visitor.expect("Stopped.")
    wait_until(lambda: engine.queue.active == 0)
    assert requests_left_early() == before + 1
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect_sound()


@pytest.mark.parametrize("phase", ["the voice is made", "the first sound is made"])
def test_stop_before_the_first_sound_leaves_a_clean_page(
    visitor: Visitor, engine: Engine, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    held = threading.Event()
    make_prompt, generate = engine.make_prompt, engine._speech_lm.generate

    async def held_back() -> None:
        while not held.is_set():
            await asyncio.sleep(0.02)

    async def make_prompt_late(*given: object) -> Prompt:
        await held_back()
        return await make_prompt(*given)

    async def generate_late(request: SpeechLMRequest) -> AsyncIterator[int]:
        await held_back()
        async with aclosing(generate(request)) as tokens:
            async for token in tokens:
                yield token

    if phase == "the voice is made":
        monkeypatch.setattr(engine, "make_prompt", make_prompt_late)
    else:
        monkeypatch.setattr(engine._speech_lm, "generate", generate_late)
    visitor.speak_like(GOOD)
    visitor.expect("Getting ready…" if phase == "the voice is made" else "Working…")
    visitor.press("Stop")
    visitor.expect("Stopped.")
    wait_until(lambda: engine.queue.active == engine.queue.waiting == 0)
    held.set()
    visitor.page.locator("#live .live[data-state=stopped]").wait_for()
    visitor.page.wait_for_timeout(1500)  # for whatever might come late
    assert visitor.page.locator("#status").inner_text() == "Stopped."
    assert visitor.page.get_by_role("alert").count() == 0
    assert not visitor.page.locator("#live a.download").is_visible()
    visitor.generate()
    visitor.expect_sound()
    assert visitor.errors == []


def test_a_tab_that_has_fallen_asleep_ends_the_work(
    visit: Visit, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosy_engine.ui.app.PAGE_HEARTBEAT", 0.5)
    monkeypatch.setattr("cosy_engine.ui.run.PAGE_PATIENCE", 3.0)
    with served(engine) as address:
        visitor = visit(address)
        visitor.speak_like(GOOD, LONG_TEXT)
        visitor.expect("Speaking piece 2")
        visitor.page.wait_for_timeout(4000)
        assert engine.queue.active == 1  # a tab that is awake is served longer than the patience
        tab = visitor.page.context.new_cdp_session(visitor.page)
        tab.send("Debugger.enable")
        tab.send("Debugger.pause")
        wait_until(lambda: engine.queue.active == 0)
        tab.send("Debugger.disable")
        visitor.expect("Stopped, for this page has not answered")


def test_a_server_that_refuses_is_told_in_the_visitors_language(visit: Visit) -> None:
    visitor = visit(locale="zh-CN")
    visitor.page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "Queue is full."}))
    visitor.type("#text", "早上好。")
    visitor.press("生成")
    visitor.expect("与服务器的连接中断")
    visitor.page.locator("#live .live[data-state=failed]").wait_for()


@pytest.mark.parametrize("leave", ["close", "reload"])
def test_leaving_in_mid_stream_ends_the_work(visitor: Visitor, engine: Engine, leave: str) -> None:
    before = requests_left_early()
    visitor.speak_like(GOOD, LONG_TEXT)
    visitor.expect("Speaking piece 1")
    getattr(visitor.page, leave)()
    wait_until(lambda: engine.queue.active == 0)
    assert requests_left_early() == before + 1
    if leave == "reload":
        visitor.speak_like(GOOD)
        visitor.expect_sound()


@pytest.fixture(scope="module")
def narrow(engine: Engine) -> Iterator[tuple[Engine, str]]:
    """An engine that works on one request while another one waits, and its page."""
    narrow = Engine(engine.model, engine.settings.model_copy(update={"concurrency": 1, "max_queue": 1}))
    with served(narrow) as address:
        yield narrow, address
    narrow.close()


def test_the_queue_can_be_seen_and_left(visit: Visit, narrow: tuple[Engine, str]) -> None:
    engine, address = narrow
    working, waiting, refused = (visit(address) for _ in range(3))
    working.speak_like(GOOD, LONG_TEXT)
    wait_until(lambda: engine.queue.active == 1)
    waiting.speak_like(GOOD)
    said = waiting.expect("Waiting: 1 ahead of you, about")
    assert "Stop" in said
    refused.speak_like(GOOD)
    assert "try again in about" in refused.expect("waiting already")
    refused.page.locator("#live .live[data-state=failed]").wait_for()
    waiting.press("Stop")
    waiting.expect("Stopped.")
    wait_until(lambda: engine.queue.waiting == 0)
    working.press("Stop")
    wait_until(lambda: engine.queue.active == 0)
    refused.press("Generate")
    refused.expect_sound()


def test_two_visitors_at_once_hear_what_they_would_alone(visit: Visit) -> None:
    visitors = {seed: visit() for seed in ("1", "2")}
    alone = {}
    for seed, visitor in visitors.items():
        visitor.type("#seed", seed)
        visitor.speak_like(GOOD, "One of two visitors at once.")
        alone[seed] = visitor.expect_sound()
    for visitor in visitors.values():
        visitor.generate()
    for seed, visitor in visitors.items():
        assert np.array_equal(visitor.expect_sound(), alone[seed])
