"""What axe-core, the accessibility checker, says of every tab, what the keyboard reaches, and how the page looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recordings import encoded, hum
from tests.ui.browser import needs_chromium
from tests.ui.visitor import CHINESE_TABS, TABS, Visit, Visitor

ROOT = Path(__file__).parents[2]
AXE = ROOT / "artifacts" / "npm" / "node_modules" / "axe-core" / "axe.min.js"
SCREENSHOTS = ROOT / "artifacts" / "screenshots"

pytestmark = [pytest.mark.browser, needs_chromium]

_AUDIT = """async () => {
  const { violations } = await axe.run(document);
  return violations
    .filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html.slice(0, 200)).join(" | ")}`);
}"""


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is missing: npm install --prefix artifacts/npm axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_violations(visit: Visit, scheme: str) -> None:
    visitor = visit(color_scheme=scheme)
    visitor.page.add_script_tag(path=AXE)
    visitor.type("#text", "Good morning.")
    visitor.generate()
    visitor.expect("please see the marked field")
    for tab in TABS:
        visitor.open_tab(tab)
        if tab == "Saved voices":
            visitor.save_voice("Ann")
            visitor.expect("Saved", "#enrol-note")
            visitor.unfold("Rename, delete or export")
        visitor.upload(encoded(hum(4)))
        visitor.panel.locator(".verdict").first.wait_for()
        assert visitor.page.evaluate(_AUDIT) == [], tab


def test_keyboard_goes_from_the_text_to_the_sound(visitor: Visitor) -> None:
    visitor.open_tab("Cross-lingual")
    visitor.page.locator("#text textarea").focus()
    order = []
    for _ in range(40):
        visitor.page.keyboard.press("Tab")
        order.append(
            visitor.page.evaluate(
                "(() => { const e = document.activeElement; return e.closest('[role=tab]') ? 'tabs' : "
                "e.closest('.prompt') ? 'recording' : e.closest('.examples') ? 'examples' : "
                "e.closest('#generate') ? 'generate' : e.closest('#stop') ? 'stop' : e.closest('#speed') ? 'speed' : "
                "e.closest('#seed') ? 'seed' : ''; })()"
            )
        )
    reached = list(dict.fromkeys(filter(None, order)))
    assert reached == ["tabs", "examples", "recording", "generate", "stop", "speed", "seed"]


def test_the_text_field_generates_from_the_keyboard(visitor: Visitor) -> None:
    visitor.page.locator("#text textarea").press("Shift+Enter")
    visitor.expect("please see the marked field")
    visitor.expect_beside("Text to speak", "The text is empty")


SCREENS = {
    "laptop": {"viewport": {"width": 1366, "height": 768}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


@pytest.mark.parametrize("screen", SCREENS)
def test_what_a_newcomer_needs_is_on_the_first_screen(visit: Visit, screen: str) -> None:
    visitor = visit(**SCREENS[screen])
    height = SCREENS[screen]["viewport"]["height"]

    def is_on_screen(selector: str) -> bool:
        box = visitor.page.locator(selector).first.bounding_box()
        return 0 <= box["y"] and box["y"] + box["height"] <= height

    for needed in ("#text textarea", "[role=tab]", ".examples button", ".prompt [data-testid=upload-text]"):
        assert is_on_screen(needed), needed
    for _ in range(2):
        assert is_on_screen("#generate") and is_on_screen("#stop")
        visitor.page.evaluate("scrollTo(0, document.body.scrollHeight)")


def test_on_a_phone_the_sound_is_seen_where_the_text_is(visit: Visit) -> None:
    visitor = visit(**SCREENS["phone"])
    assert not visitor.page.locator("#live").is_visible()
    visitor.panel.get_by_role("button", name="Good morning!").tap()
    visitor.page.locator("#live .live[data-state=playing]").wait_for()
    visitor.page.wait_for_timeout(500)  # scrolling
    top = {name: visitor.page.locator(name).bounding_box()["y"] for name in ("#text", "#live", "[role=tab] >> nth=0")}
    assert top["#text"] < top["#live"] < top["[role=tab] >> nth=0"]
    assert 0 <= top["#live"] <= 844 - 200


@pytest.mark.parametrize(("language", "names"), [("en-US", TABS), ("zh-CN", CHINESE_TABS)], ids=["en", "zh"])
@pytest.mark.parametrize("look", ["wide", "phone"])
def test_screenshots(visit: Visit, language: str, names: list[str], look: str) -> None:
    """Pictures of every tab for people to look at, in artifacts/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    size = {"width": 1200, "height": 900} if look == "wide" else {"width": 360, "height": 740}
    visitor = visit(locale=language, viewport=size, color_scheme="light" if look == "wide" else "dark")
    visitor.type("#text", "Good morning. 今天天气真好。")
    for number, name in enumerate(names):
        visitor.open_tab(name)
        if number == 0:
            visitor.upload(encoded(hum(4)))
        visitor.panel.locator(".verdict .voice_ready").wait_for()
        visitor.page.evaluate("scrollTo(0, 0)")
        file = SCREENSHOTS / f"{look}-{language[:2]}-{number + 1}.png"
        visitor.page.screenshot(path=file, full_page=True)
        assert file.stat().st_size > 10_000
    assert visitor.errors == []
