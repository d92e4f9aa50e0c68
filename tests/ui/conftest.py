"""The page over the real engine with the untrained stand-in model, and browsers that visit it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.ui.app import build, launch
from tests.ui.browser import PATIENCE, chromium, free_port
from tests.ui.visitor import Visit, Visitor


@pytest.fixture(scope="session")
def engine(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine.load(standin_v2, Settings(voices_dir=tmp_path_factory.mktemp("voices"), warm_up=False))
    yield engine
    engine.close()


@contextmanager
def served(engine: Engine, **options: object) -> Iterator[str]:
    """The page's address."""
    page, port = build(engine, **options), free_port()
    launch(page, "127.0.0.1", port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture(scope="session")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: object, address: str) -> Iterator[Visit]:
    """Opens the page for somebody with a browser of their own, or in another tab of `same_browser_as`."""
    contexts = []

    def open_page(at: str = address, same_browser_as: Visitor | None = None, **options: object) -> Visitor:
        if same_browser_as is None:
            contexts.append(browser.new_context(**{"locale": "en-US", **options}))
        context = same_browser_as.page.context if same_browser_as else contexts[-1]
        visitor = Visitor(context.new_page())
        visitor.page.set_default_timeout(PATIENCE)
        visitor.page.on("console", lambda said: visitor.errors.append(said.text) if said.type == "error" else None)
        visitor.page.on("pageerror", lambda error: visitor.errors.append(str(error)))
        visitor.page.on(
            "request",
            lambda request: (
                None if request.url.startswith((at, "data:", "blob:")) else visitor.foreign.append(request.url)
            ),
        )
        visitor.page.goto(at)
        visitor.wait_until_loaded()
        return visitor

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def visitor(visit: Visit) -> Visitor:
    return visit()
