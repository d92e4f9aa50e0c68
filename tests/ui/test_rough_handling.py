"""What people and scripts do to a page: each ends in a sentence on it, and the server goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosy_engine.engine import Engine
from tests.ui.browser import needs_chromium
from tests.ui.test_page import wait_until
from tests.ui.visitor import GOOD, LONG_TEXT, Visit, Visitor

pytestmark = [pytest.mark.browser, needs_chromium]


def test_a_40_mb_file(visitor: Visitor, tmp_path: Path) -> None:
    file = tmp_path / "long.wav"
    file.write_bytes(bytes(40 * 2**20))
    visitor.open_tab("Cross-lingual")
    visitor.panel.locator(".prompt input[type=file]").set_input_files(file)
    visitor.panel.get_by_role("alert").filter(has_text="This file has 40 MB, and at most 30 MB are taken").wait_for()
    assert "exceed" not in visitor.page.content()
    visitor.speak_like(GOOD)
    visitor.expect_sound()
    assert visitor.page.get_by_role("alert").count() == 0


REFUSED = {
    "too large": ({"name": "long.wav", "mimeType": "audio/wav", "buffer": bytes(31 * 2**20)}, "最多 30 MB"),
    "no recording": ({"name": "text.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"}, "此文件不是录音"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_in_the_visitors_language_before_it_is_sent(visit: Visit, case: str) -> None:
    visitor = visit(locale="zh-CN")
    sent = []
    visitor.page.on("request", lambda request: sent.append(request) if "/upload" in request.url else None)
    file, said = REFUSED[case]
    visitor.panel.locator(".prompt input[type=file]").set_input_files(file)
    visitor.panel.get_by_role("alert").filter(has_text=said).wait_for()
    assert sent == []


def test_a_voice_file_that_is_too_large(visitor: Visitor) -> None:
    visitor.open_tab("Saved voices")
    visitor.unfold("Rename, delete or export")
    visitor.panel.locator("input[type=file][accept*=safetensors]").set_input_files(
        {"name": "voice.safetensors", "mimeType": "application/octet-stream", "buffer": bytes(31 * 2**20)}
    )
    visitor.panel.get_by_role("alert").filter(has_text="at most 30 MB").wait_for()


def test_a_dropped_file_that_is_no_recording(visitor: Visitor) -> None:
    drop = """(target) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File(["text"], "notes.txt", { type: "text/plain" }));
      target.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    }"""
    visitor.panel.locator(".prompt [data-testid=upload-text]").evaluate(drop)
    visitor.panel.get_by_role("alert").filter(has_text="not a recording").wait_for()
    visitor.upload(GOOD)
    assert visitor.page.get_by_role("alert").count() == 0


def test_50_rapid_clicks(visitor: Visitor, engine: Engine) -> None:
    visitor.open_tab("Cross-lingual")
    visitor.upload(GOOD)
    visitor.type("#text", "Good morning.")
    visitor.panel.locator(".verdict").wait_for()
    runs = []
    visitor.page.on("request", lambda request: runs.append(request) if "/queue/join" in request.url else None)
    visitor.page.evaluate("for (let click = 0; click < 50; click++) document.getElementById('generate').click()")
    visitor.expect_sound()
    assert len(runs) == 1
    wait_until(lambda: engine.queue.active == engine.queue.waiting == 0)
    visitor.page.wait_for_timeout(500)  # a click that follows at once is taken for a double click
    visitor.generate()
    visitor.expect_sound()


def test_50_clicks_in_all_directions(visitor: Visitor, engine: Engine) -> None:
    visitor.speak_like(GOOD, LONG_TEXT)
    for _ in range(12):
        for button in ("stop", "generate", "seed-again", "stop"):
            visitor.page.evaluate(f"document.getElementById('{button}')?.click()")
    visitor.page.wait_for_timeout(500)
    visitor.press("Stop")
    visitor.expect("Stopped.")
    wait_until(lambda: engine.queue.active == engine.queue.waiting == 0)
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect_sound()


def test_what_was_typed_outlives_a_reload(visitor: Visitor) -> None:
    visitor.type("#text", "Good morning.")
    visitor.page.locator("#count .count").wait_for()
    visitor.page.reload()
    visitor.page.wait_for_function("document.querySelector('#text textarea')?.value === 'Good morning.'")


def test_a_second_tab_of_the_same_visitor(visitor: Visitor, visit: Visit) -> None:
    second = visit(same_browser_as=visitor)
    for tab in (visitor, second):
        tab.open_tab("Cross-lingual")
        tab.upload(GOOD)
        tab.type("#text", "Good morning.")
    visitor.generate()
    second.generate()
    visitor.expect_sound()
    second.expect_sound()
    assert visitor.errors == second.errors == []


def test_a_name_that_is_markup(visitor: Visitor) -> None:
    visitor.save_voice("<script>document.title = 'taken'</script>")
    visitor.expect("<script>document.title = 'taken'</script>", "#enrol-note")
    assert visitor.page.title() == "CosyVoice"
