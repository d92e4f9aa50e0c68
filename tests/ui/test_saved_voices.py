"""Saved voices on the page: from enrolment to deletion, and never in somebody else's hands."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosy_engine.engine import Engine
from tests.ui.browser import needs_chromium
from tests.ui.conftest import served
from tests.ui.visitor import GOOD, Visit, Visitor

pytestmark = [pytest.mark.browser, needs_chromium]

MANAGE = "Rename, delete or export the chosen voice; import one"


def speak(visitor: Visitor) -> None:
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect_sound()


def ask_for_voice(visitor: Visitor, voice_id: str) -> None:
    """Generate, with another voice in the request than the page offers."""

    def forge(route: object) -> None:
        body = route.request.post_data
        assert body.count('"mine"') == 1
        route.continue_(post_data=body.replace('"mine"', f'"{voice_id}"'))

    visitor.page.route("**/queue/join*", forge, times=1)
    visitor.type("#text", "Good morning.")
    visitor.generate()


def test_enrol_reload_reuse(visitor: Visitor) -> None:
    visitor.save_voice("Ann 安", "A buzz that rises and falls.")
    visitor.expect("Saved “Ann 安”.", "#enrol-note")
    speak(visitor)
    visitor.page.reload()
    visitor.wait_until_loaded()
    visitor.open_tab("Saved voices")
    visitor.page.locator("#about", has_text="A buzz that rises and falls.").wait_for()
    assert visitor.saved_voices() == ["Ann 安"]
    speak(visitor)
    tab = visitor.page.context.new_page()
    tab.goto(visitor.page.url)
    tab.get_by_role("tab", name="Saved voices").click()
    tab.locator("#about", has_text="A buzz").wait_for()
    assert visitor.errors == []


def test_what_is_missing_is_said_beside_its_field(visitor: Visitor) -> None:
    visitor.open_tab("Saved voices")
    visitor.unfold("Save a new voice")
    visitor.press("Save voice")
    visitor.expect("Upload or record the voice first.", "[role=tabpanel]")
    visitor.upload(GOOD)
    visitor.press("Save voice")
    visitor.expect_beside("Name", "Give the voice a name.")
    visitor.type("#voice-name", "Ann")
    visitor.press("Save voice")
    visitor.expect_beside("This is my voice, or I may use it.", "Please confirm")
    visitor.page.locator("#consent input").check()
    visitor.press("Save voice")
    visitor.expect("Saved “Ann”.", "#enrol-note")
    visitor.save_voice("Ann")
    visitor.expect_beside("Name", "There is a voice named 'Ann' already")


def test_preview_speaks(visitor: Visitor) -> None:
    visitor.save_voice("Ann")
    visitor.expect("Saved", "#enrol-note")
    visitor.press("Listen")
    visitor.expect_heard()
    visitor.expect_sound()


def test_rename_and_delete(visitor: Visitor) -> None:
    visitor.save_voice("<b>Ann</b> ${1+1}<img src=x onerror=alert(1)>")
    visitor.expect("Saved “<b>Ann</b> ${1+1}<img src=x onerror=alert(1)>”.", "#enrol-note")
    visitor.unfold(MANAGE)
    visitor.type("#new-name", "../../Ann")
    visitor.press("Rename")
    visitor.expect("now called “../../Ann”", "#manage-note")
    assert visitor.saved_voices() == ["../../Ann"]
    visitor.press("Delete")
    visitor.press("Keep it")
    visitor.press("Delete")
    visitor.press("Delete for good")
    visitor.expect("Deleted “../../Ann”.", "#manage-note")
    visitor.page.locator("#no-voices").wait_for()
    assert visitor.saved_voices() == []
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect("Choose a voice first", "[role=tabpanel]")
    assert visitor.errors == []


def test_a_damaged_voice_says_so_and_can_be_deleted(visitor: Visitor, engine: Engine) -> None:
    before = set(engine.settings.voices_dir.rglob("*.safetensors"))
    visitor.save_voice("Ann")
    visitor.expect("Saved", "#enrol-note")
    (file,) = set(engine.settings.voices_dir.rglob("*.safetensors")) - before
    file.write_bytes(b"no voice at all")
    visitor.page.reload()
    visitor.wait_until_loaded()
    visitor.open_tab("Saved voices")
    assert "is damaged" in visitor.page.locator("#about .message.error").inner_text()
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect("please see the marked field")
    visitor.unfold(MANAGE)
    visitor.press("Delete")
    visitor.press("Delete for good")
    visitor.expect("Deleted", "#manage-note")
    assert not file.exists()


def test_export_and_import(visitor: Visitor, visit: Visit, tmp_path: Path) -> None:
    visitor.save_voice("Ann", "A buzz.")
    visitor.expect("Saved", "#enrol-note")
    visitor.unfold(MANAGE)
    with visitor.page.expect_download() as download:
        visitor.press("Export to a file")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "ann.safetensors"

    other = visit()
    other.open_tab("Saved voices")
    other.unfold(MANAGE)
    other.panel.locator("input[type=file][accept*=safetensors]").set_input_files(file)
    other.expect("Imported “Ann”.", "#manage-note")
    speak(other)
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"x" * 1000)
    other.panel.locator("input[type=file][accept*=safetensors]").set_input_files(wrong)
    other.expect("This voice file cannot be used", "#manage-note")


def test_voices_are_out_of_reach_for_others(visitor: Visitor, visit: Visit) -> None:
    visitor.save_voice("Ann")
    visitor.expect("Saved", "#enrol-note")
    other = visit()
    other.open_tab("Saved voices")
    other.page.locator("#no-voices").wait_for()
    other.save_voice("Mine")
    other.expect("Saved", "#enrol-note")
    assert other.saved_voices() == ["Mine"]
    for asked in ("ann", "../ann", "../../etc/passwd", "<script>alert(1)</script>"):
        ask_for_voice(other, asked)
        assert asked in other.expect("There is no voice", "[role=tabpanel]")
    other.page.reload()
    other.open_tab("Saved voices")
    other.page.locator("#about .about").wait_for()
    speak(other)


def test_shared_voices_are_everybodys(visit: Visit, engine: Engine) -> None:
    with served(engine, shared_voices=True) as address:
        visitor, other = visit(address), None
        visitor.save_voice("Everybody's")
        visitor.expect("Saved", "#enrol-note")
        other = visit(address)
        other.open_tab("Saved voices")
        other.page.locator("#about .about").wait_for()
        assert other.saved_voices() == ["Everybody's"]
        other.unfold(MANAGE)
        other.press("Delete")
        other.press("Delete for good")
        other.expect("Deleted", "#manage-note")
