"""The page in a real browser, over the real engine with the untrained stand-in model."""

from __future__ import annotations

import io
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
from prometheus_client import REGISTRY

from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.ui.app import build, launch
from tests.recordings import encoded, hum

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=document-user-activation-required",
]
TABS = ["Zero-shot", "Cross-lingual", "Instruct", "Saved voices"]
PATIENCE = 30_000  # ms
LONG_TEXT = "This sentence goes on and on, and never seems to end. " * 150

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Chromium is missing: sudo apt-get install chromium"),
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is missing: sudo apt-get install ffmpeg"),
]


GOOD = encoded(hum(2))


@dataclass
class Visitor:
    """A browser tab on the page, spoken to as a person would."""

    page: object
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def type(self, where: str, text: str) -> None:
        self.page.locator(f"{where} input, {where} textarea").last.fill(text)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def upload(self, data: bytes, name: str = "voice.wav") -> None:
        clear = self.page.locator("[role=tabpanel]:visible").get_by_role("button", name="Clear", exact=True)
        if clear.count():
            clear.click()
        with self.page.expect_response(lambda response: "/upload" in response.url):
            self.page.locator("[role=tabpanel]:visible input[type=file]").set_input_files(
                {"name": name, "mimeType": "audio/wav", "buffer": data}
            )
        self.page.locator("[role=tabpanel]:visible .prompt [data-testid=upload-text]").wait_for(state="detached")

    def label(self, name: str) -> object:
        return self.page.locator("[role=tabpanel]:visible").get_by_label(name, exact=True)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def expect(self, text: str, where: str = "#status") -> str:
        found = self.page.locator(f"{where} .message", has_text=text)
        found.wait_for(timeout=PATIENCE)
        return found.inner_text()

    def expect_sound(self) -> np.ndarray:
        """The finished recording as the download button gives it."""
        summary = self.expect("First audio")
        assert "RTF" in summary and "seed" in summary
        link = self.page.locator("#result a[download]")
        link.wait_for(timeout=PATIENCE)
        samples, rate = soundfile.read(io.BytesIO(self.page.request.get(link.get_attribute("href")).body()))
        assert rate == 24000
        assert len(samples) > 0.2 * rate
        assert np.abs(samples).max() > 1e-3
        return samples

    def expect_playing(self) -> None:
        self.page.wait_for_function("document.querySelector('#live audio')?.currentTime > 0.05", timeout=PATIENCE)

    def speak_like(self, data: bytes, text: str = "Good morning.", name: str = "voice.wav") -> None:
        self.open_tab("Cross-lingual")
        self.upload(data, name)
        self.type("#text", text)
        self.press("Generate")


@pytest.fixture(scope="module")
def engine(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine.load(standin_v2, Settings(voices_dir=tmp_path_factory.mktemp("voices"), warm_up=False))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build(engine)
    launch(page, "127.0.0.1", port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: object, address: str) -> Iterator[Callable[..., Visitor]]:
    contexts = []

    def open_page(**options: object) -> Visitor:
        context = chromium.new_context(**options)
        contexts.append(context)
        visitor = Visitor(context.new_page())
        visitor.page.set_default_timeout(PATIENCE)
        visitor.page.on("console", lambda said: visitor.errors.append(said.text) if said.type == "error" else None)
        visitor.page.on("pageerror", lambda error: visitor.errors.append(str(error)))
        visitor.page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:", "blob:")) else visitor.foreign.append(request.url)
            ),
        )
        visitor.page.goto(address)
        visitor.page.locator("#generate").wait_for()
        return visitor

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def visitor(visit: Callable[..., Visitor]) -> Visitor:
    return visit(locale="en-US")


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"locale": "en-US"}, TABS),
        ({"locale": "en-US", "color_scheme": "dark", "viewport": {"width": 390, "height": 844}}, TABS),
        ({"locale": "zh-CN"}, ["极速复刻", "跨语种", "指令控制", "已存音色"]),
    ],
    ids=["english", "dark-phone", "chinese"],
)
def test_page_opens_in_the_visitors_language(
    visit: Callable[..., Visitor], options: dict[str, object], names: list[str]
) -> None:
    visitor = visit(**options)
    for name in names:
        visitor.open_tab(name)
    width = visitor.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "the page can be scrolled sideways"
    assert visitor.errors == []
    assert visitor.foreign == []


@pytest.mark.parametrize("tab", TABS)
def test_each_tab_makes_sound(visitor: Visitor, engine: Engine, tab: str) -> None:
    if tab == "Saved voices":
        name = "Tab test"
        visitor.open_tab(tab)
        visitor.press("Save a new voice ▼")
        visitor.upload(GOOD)
        visitor.label("What is said in the recording").fill("A buzz that rises and falls.")
        visitor.type("#voice-name", name)
        visitor.press("Save voice")
        visitor.expect("Saved “Tab test”.", "#voice-note")
    else:
        visitor.open_tab(tab)
        visitor.upload(GOOD)
    if tab == "Zero-shot":
        visitor.label("What is said in the recording").fill("A buzz that rises and falls.")
    if tab == "Instruct":
        visitor.label("How it shall be said").fill("Speak slowly.")
    visitor.type("#text", "Hello, 你好, this is a test.")
    visitor.press("Generate")
    visitor.expect_playing()
    visitor.expect_sound()
    assert visitor.errors == []


def test_without_streaming_and_with_a_seed(visitor: Visitor) -> None:
    visitor.page.locator("#stream input").uncheck()
    visitor.type("#seed", "7")
    visitor.speak_like(GOOD)
    assert visitor.expect("First audio").endswith("seed 7")
    first = visitor.expect_sound()
    visitor.expect_playing()
    visitor.type("#seed", "8")
    visitor.press("Generate")
    visitor.expect("seed 8")
    other = visitor.expect_sound()
    visitor.type("#seed", "7")
    visitor.press("Generate")
    visitor.expect("seed 7")
    again = visitor.expect_sound()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


BAD_INPUTS = {
    "a text file named .wav": (b"This is not a recording.", "Good morning.", ""),
    "an empty file": (b"", "Good morning.", ""),
    "0.3 seconds": (encoded(hum(0.3)), "Good morning.", "0.3"),
    "45 seconds": (encoded(hum(45)), "Good morning.", "45"),
    "silence": (encoded(np.zeros(32000)), "Good morning.", "silent"),
    "no text": (GOOD, "", "text"),
    "only punctuation": (GOOD, "?!…", "text"),
    "20,000 characters": (GOOD, "word " * 4000, "20,000"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gets_a_sentence_and_the_next_request_works(visitor: Visitor, case: str) -> None:
    data, text, said = BAD_INPUTS[case]
    visitor.speak_like(data, text)
    alert = visitor.page.get_by_role("alert")
    alert.wait_for(timeout=PATIENCE)
    assert said in alert.inner_text()
    assert "Traceback" not in visitor.page.content()

    visitor.speak_like(GOOD)
    visitor.expect_sound()


def test_missing_inputs_are_named(visitor: Visitor) -> None:
    visitor.type("#text", "Good morning.")
    visitor.press("Generate")
    visitor.expect("Upload or record the voice first.")
    visitor.open_tab("Instruct")
    visitor.press("Generate")
    visitor.expect("Say how the text shall be spoken.")
    visitor.type("#seed", "seven")
    visitor.speak_like(GOOD)
    visitor.expect("The seed is a whole number")


def test_a_voice_from_enrolment_to_deletion(visitor: Visitor, visit: Callable[..., Visitor], engine: Engine) -> None:
    visitor.open_tab("Saved voices")
    visitor.press("Save a new voice ▼")
    visitor.upload(GOOD)
    visitor.type("#voice-name", "<b>Ann</b> ${1+1}")
    visitor.press("Save voice")
    visitor.expect("Saved “<b>Ann</b> ${1+1}”.", "#voice-note")
    visitor.press("Save voice")
    assert visitor.page.get_by_role("alert").inner_text()

    visitor.press("Rename or delete the chosen voice ▼")
    visitor.type("#new-name", "../Ann")
    visitor.press("Rename")
    visitor.expect("now called", "#voice-note")
    saved = [voice for voice in engine.voices.list() if voice.name == "../Ann"]
    assert len(saved) == 1

    other = visit(locale="en-US")
    other.open_tab("Saved voices")
    other.page.locator("#voice input").click()
    other.page.get_by_role("option", name="../Ann").click()

    visitor.press("Delete")
    visitor.press("Delete for good")
    visitor.expect("Deleted “../Ann”.", "#voice-note")
    assert saved[0].id not in [voice.id for voice in engine.voices.list()]

    other.type("#text", "Good morning.")
    other.press("Generate")
    assert saved[0].id in other.expect("voice")
    other.speak_like(GOOD)
    other.expect_sound()


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
    visitor.press("Generate")
    visitor.expect_sound()


def test_closing_the_tab_ends_the_work(visitor: Visitor, engine: Engine) -> None:
    before = requests_left_early()
    visitor.speak_like(GOOD, LONG_TEXT)
    wait_until(lambda: engine.queue.active == 1)
    visitor.page.close()
    wait_until(lambda: engine.queue.active == 0)
    assert requests_left_early() == before + 1
