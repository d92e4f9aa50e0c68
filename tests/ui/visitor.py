"""A visitor of the page, spoken to as a person would."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import soundfile

from tests.recordings import encoded, hum
from tests.ui.browser import PATIENCE

TABS = ["Clone a voice", "Cross-lingual", "Instruct", "Saved voices"]
CHINESE_TABS = ["极速复刻", "跨语种", "指令控制", "已存音色"]
TRANSCRIPT = "What is said in the recording (recommended)"
CLEAR = re.compile("^(Clear|清除)$")  # Gradio's button beside a recording
GOOD = encoded(hum(2))
LONG_TEXT = "This sentence goes on and on, and never seems to end. " * 150


DOWNLOADED = """async (address) => {
  const reader = new FileReader();
  const read = new Promise((resolve) => (reader.onload = resolve));
  reader.readAsDataURL(await (await fetch(address)).blob());
  await read;
  return reader.result.split(",")[1];
}"""


def downloaded(page: object) -> bytes:
    """What the player's download button gives."""
    link = page.locator("#live a.download")
    link.wait_for(timeout=PATIENCE)
    return base64.b64decode(page.evaluate(DOWNLOADED, link.get_attribute("href")))


@dataclass
class Visitor:
    """A browser tab on the page.

    Attributes:
        errors: what the page wrote to the console as errors.
        foreign: addresses that the page asked for and that are not the server's.
    """

    page: object
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def panel(self) -> object:
        return self.page.locator("[role=tabpanel]:visible")

    def wait_until_loaded(self) -> None:
        self.page.locator("#generate").wait_for()
        self.page.wait_for_function("localStorage.getItem('cosy-engine-visitor')")  # the server has been asked

    def type(self, where: str, text: str) -> None:
        self.page.locator(f"{where} input, {where} textarea").last.fill(text)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def unfold(self, name: str) -> None:
        head = self.page.get_by_role("button", name=name).first
        if "open" not in (head.get_attribute("class") or ""):
            head.click()

    def upload(self, data: bytes, name: str = "voice.wav") -> None:
        """Put a recording in the place of the one that is there, and wait until the page shows it."""
        prompt = self.panel.locator(".prompt")
        clear = prompt.get_by_role("button", name=CLEAR)
        if clear.count():
            clear.click()
            clear.wait_for(state="detached")
        with self.page.expect_response(lambda response: "/upload" in response.url):
            prompt.locator("input[type=file]").set_input_files({"name": name, "mimeType": "audio/wav", "buffer": data})
        clear.wait_for()

    def label(self, name: str) -> object:
        return self.panel.get_by_label(name, exact=True)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def generate(self, button: str = "Generate") -> None:
        """Press the button, and wait until the page no longer says what it said before."""
        with self._something_new():
            self.press(button)

    def play_example(self, text: str) -> None:
        with self._something_new():
            self.panel.get_by_role("button", name=text).click()

    @contextmanager
    def _something_new(self) -> Iterator[None]:
        self.page.evaluate(
            "document.querySelectorAll('#status .message').forEach((old) => old.setAttribute('data-old', ''))"
        )
        yield
        self.page.locator("#status .message:not([data-old])").first.wait_for(timeout=PATIENCE)

    def expect(self, text: str, where: str = "#status") -> str:
        found = self.page.locator(f"{where} .message", has_text=text)
        found.wait_for(timeout=PATIENCE)
        return found.inner_text()

    def expect_beside(self, field_label: str, text: str) -> None:
        """The sentence stands next to the field: it is the first note below it."""
        note = self.page.locator(".block", has=self.page.get_by_label(field_label, exact=True)).locator(
            "xpath=following::*[contains(@class, 'message')][1]"
        )
        self.page.get_by_role("alert").filter(has_text=text).first.wait_for(timeout=PATIENCE)
        assert text in note.first.inner_text()

    def expect_sound(self) -> np.ndarray:
        """The finished recording as the download button gives it."""
        summary = self.expect("First audio")
        assert all(word in summary for word in ("RTF", "of speech", "torch cpu"))
        samples, rate = soundfile.read(io.BytesIO(downloaded(self.page)))
        assert rate == 24000
        assert len(samples) > 0.2 * rate
        assert np.abs(samples).max() > 1e-3
        return samples

    def used_seed(self) -> str:
        """As the button tells it that uses it again."""
        return self.page.locator("#seed-again").inner_text().split()[1]

    def expect_heard(self) -> None:
        self.page.wait_for_function(
            "/\\d/.test(document.querySelector('#live .first dd')?.innerText)", timeout=PATIENCE
        )

    def speak_like(self, data: bytes, text: str = "Good morning.", name: str = "voice.wav") -> None:
        self.open_tab("Cross-lingual")
        self.upload(data, name)
        self.type("#text", text)
        self.generate()

    def save_voice(self, name: str, transcript: str = "") -> None:
        self.open_tab("Saved voices")
        self.unfold("Save a new voice")
        self.upload(GOOD)
        self.label(TRANSCRIPT).fill(transcript)
        self.type("#voice-name", name)
        self.page.locator("#consent input").check()
        self.press("Save voice")

    def saved_voices(self) -> list[str]:
        """Names in the list, which opens and closes again."""
        box = self.page.locator("#voice input")
        if not box.is_visible():
            return []
        box.click()
        self.page.get_by_role("option").first.wait_for()
        names = [option.get_attribute("aria-label") for option in self.page.get_by_role("option").all()]
        box.press("Escape")
        return names


Visit = Callable[..., Visitor]
