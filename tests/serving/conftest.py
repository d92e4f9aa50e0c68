"""A served page: the real engine with the stand-in model, spoken to over HTTP as any program could."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.serving.access import Access
from cosy_engine.serving.health import health_routes
from cosy_engine.ui.app import build, launch

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the served pages keep what visitors send and get."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def engine(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine.load(standin_v2, Settings(voices_dir=tmp_path_factory.mktemp("voices"), warm_up=False))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def serve(engine: Engine, uploads: Path) -> Serve:
    """`with serve(Access(...)) as address`."""

    @contextmanager
    def served(access: Access | None = None) -> Iterator[str]:
        access = replace(access or Access(), private=(engine.settings.voices_dir,))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        page = build(engine)
        launch(page, "127.0.0.1", port, access=access, routes=health_routes(engine, metrics=True), block=False)
        try:
            yield f"{'https' if access.tls else 'http'}://127.0.0.1:{port}"
        finally:
            page.close(verbose=False)

    return served


@pytest.fixture(scope="session")
def address(serve: Serve) -> Iterator[str]:
    """A page without a login."""
    with serve() as address:
        yield address


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, encrypted with the password `sesame`."""
    folder = tmp_path_factory.mktemp("tls")
    certfile, keyfile = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=page"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-passout", "pass:sesame"]
    try:
        subprocess.run([*command, "-keyout", keyfile, "-out", certfile], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is missing: sudo apt-get install openssl")
    return certfile, keyfile
