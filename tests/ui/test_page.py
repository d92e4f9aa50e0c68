"""The page in a real browser: each tab end to end, the run and its queue, and what is said when something is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from prometheus_client import REGISTRY

from cosy_engine.engine import Engine
from cosy_engine.frontend import estimate_seconds
from tests.recordings import encoded, hum
from tests.ui.browser import needs_chromium
from tests.ui.conftest import served
from tests.ui.visitor import CHINESE_TABS, GOOD, LONG_TEXT, TABS, Visit, Visitor

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
    if tab == "Zero-shot":
        visitor.label("What is said in the recording").fill("A buzz that rises and falls.")
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
    assert visitor.expect("First audio").endswith("seed 7")
    first = visitor.expect_sound()
    visitor.type("#seed", "")
    visitor.generate()
    other = visitor.expect_sound()
    seed = visitor.expect("First audio").rsplit(" ", 1)[1]
    visitor.press("Use the last seed again")
    visitor.page.wait_for_function("document.querySelector('#seed input, #seed textarea').value !== ''")
    visitor.generate()
    again = visitor.expect_sound()
    assert visitor.expect("First audio").endswith(f"seed {seed}")
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
    visitor.panel.get_by_role("button", name=example).click()
    visitor.page.wait_for_function(f"document.querySelector('#text textarea').value === '{example}'")
    assert visitor.label("How it shall be said").input_value() == "Speak slowly."
    visitor.upload(GOOD)
    visitor.panel.get_by_role("button", name="周末我们一起去爬山吧").click()
    visitor.expect_sound()
    assert visitor.label("How it shall be said").input_value() == "用四川话说这句话"


def test_a_recording_gets_a_verdict(visitor: Visitor) -> None:
    visitor.upload(encoded(hum(4)))
    verdict = visitor.panel.locator(".verdict")
    verdict.wait_for()
    assert "Length: 4.0 s" in verdict.inner_text()
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
        clear = visitor.panel.locator(".prompt button[aria-label]").first
        if visitor.panel.locator(".prompt [data-testid=upload-text]").count() == 0:
            clear.click()
        with visitor.page.expect_response(lambda response: "/upload" in response.url):
            visitor.panel.locator(".prompt input[type=file]").set_input_files(
                {"name": "voice.wav", "mimeType": "audio/wav", "buffer": data}
            )
        visitor.panel.locator(".prompt [data-testid=upload-text]").wait_for(state="detached")
        visitor.type("#text", text)
        visitor.press("生成")
        visitor.page.get_by_role("alert").filter(has_text=said).first.wait_for()


def test_missing_inputs_are_named_beside_their_fields(visitor: Visitor) -> None:
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect("Upload or record the voice first.", "[role=tabpanel]")
    visitor.upload(GOOD)
    visitor.generate()
    visitor.expect_beside("What is said in the recording", "Write what is said")
    visitor.label("What is said in the recording").fill("A buzz.")
    visitor.page.get_by_role("alert").wait_for(state="detached")
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
