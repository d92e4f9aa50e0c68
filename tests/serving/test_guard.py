"""What strangers get to see and may send."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from cosy_engine.engine import Engine
from cosy_engine.serving.access import Access
from cosy_engine.ui import app
from tests.recordings import encoded, hum
from tests.serving.conftest import Serve

RECORDING = encoded(hum(2))
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def voice_files(engine: Engine) -> list[Path]:
    """The files of a saved voice."""
    asyncio.run(engine.enroll("Ann", RECORDING, "A buzz."))
    files = [path for path in engine.settings.voices_dir.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) >= 2
    return files


@pytest.fixture
def visitor(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address) as client:
        yield client


def upload(client: httpx.Client, data: bytes, name: str = "me.wav") -> str:
    return client.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]


def raw_get(address: str, target: str) -> tuple[int, bytes]:
    """GET without any tidying of the target, as an attacker would send it."""
    with closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)) as connection:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_voices_and_the_servers_files_cannot_be_fetched(
    address: str, voice_files: list[Path], uploads: Path, engine: Engine
) -> None:
    secrets = [*voice_files, engine.model.directory / "cosyvoice2.yaml", Path(__file__), Path("/etc/passwd")]
    for secret in secrets:
        path = secret.as_posix()
        climbing = f"{uploads.as_posix()}/{'../' * 20}{path[1:]}"
        for spelled in (
            path,
            path[1:],
            path.upper(),
            f"file://{path}",
            f"//{path}",
            climbing,
            climbing.replace("../", "..%2f"),
            climbing.replace("../", "%2e%2e/"),
            f"..%2f..%2f..%2f..%2f..{path.replace('/', '%2f')}",
            f"spk_cache/{secret.name}",
            f"./{secret.name}",
        ):
            for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/"):
                status, body = raw_get(address, route + spelled)
                assert status >= 400, route + spelled
                assert secret.read_bytes()[:32] not in body


def test_voices_cannot_be_reached_through_the_pages_inputs(
    visitor: httpx.Client, voice_files: list[Path], uploads: Path
) -> None:
    """An event may name a file as its recording; only what was uploaded counts."""
    config = visitor.get("/config").json()
    components = {entry["id"]: entry for entry in config["components"]}
    events = [
        event
        for event in config["dependencies"]
        if event["backend_fn"] and any(components[number]["type"] == "audio" for number in event["inputs"])
    ]
    assert events
    stolen = {"path": str(voice_files[0]), "meta": {"_type": "gradio.FileData"}}
    for event in events:
        kinds = [components[number] for number in event["inputs"]]
        data = [stolen if kind["type"] == "audio" else kind["props"].get("value") for kind in kinds]
        session = f"thief{event['id']}"
        visitor.post(
            "/gradio_api/queue/join", json={"data": data, "fn_index": event["id"], "session_hash": session}
        ).raise_for_status()
        with visitor.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as answer:
            messages = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
        completed = [message for message in messages if message["msg"] == "process_completed"]
        assert [message["success"] for message in completed] == [False]
    contents = {path.read_bytes() for path in uploads.rglob("*") if path.is_file()}
    assert not contents & {path.read_bytes() for path in voice_files}


def test_the_address_of_an_upload_cannot_be_guessed(address: str, visitor: httpx.Client, uploads: Path) -> None:
    path = Path(upload(visitor, RECORDING))
    key = path.parent.name
    assert path.parent.parent == uploads
    assert len(key) == 64 and key != hashlib.sha256(RECORDING).hexdigest()
    for guess in (
        uploads,
        path.parent,
        uploads / hashlib.sha256(RECORDING).hexdigest() / path.name,
        uploads / "me.wav",
    ):
        assert raw_get(address, f"/gradio_api/file={guess}")[0] == 403


def test_the_owner_gets_the_upload_and_no_cache_keeps_it(visitor: httpx.Client) -> None:
    answer = visitor.get(f"/gradio_api/file={upload(visitor, RECORDING)}")
    assert answer.content == RECORDING
    assert answer.headers["cache-control"] == "private"
    assert answer.headers["referrer-policy"] == "same-origin"


def test_what_a_browser_could_run_comes_as_a_download(visitor: httpx.Client) -> None:
    answer = visitor.get(f"/gradio_api/file={upload(visitor, b'<script>alert(1)</script>', 'me.html')}")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_uploads_are_deleted_after_a_while(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "CACHE_SECONDS", (1, 1))
    with serve() as address, httpx.Client(base_url=address) as visitor:
        path = Path(upload(visitor, encoded(hum(1.5))))
        assert path.exists()
        deadline = time.monotonic() + 30
        while path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_other_sites_are_not_fetched(visitor: httpx.Client) -> None:
    for route in ("/gradio_api/file=", "/gradio_api/file/"):
        for elsewhere in ("http://127.0.0.1:1/", "https://example.org/a.wav", "HTTPS://example.org/a.wav"):
            answer = visitor.get(route + elsewhere)
            assert (answer.status_code, answer.text) == (403, "Files of other sites are not fetched.")


def test_too_large_a_recording_is_refused_and_the_server_goes_on(serve: Serve) -> None:
    with serve(Access(max_upload_mb=1)) as address, httpx.Client(base_url=address) as visitor:
        assert visitor.get("/config").json()["max_file_size"] == MEGABYTE
        large = bytes(3 * MEGABYTE)
        refused = visitor.post("/gradio_api/upload", files={"files": ("a.wav", large)})
        assert refused.status_code == 413
        assert "1 MB" in refused.text

        request = httpx.Request("POST", f"{address}/gradio_api/upload", files={"files": ("a.wav", large)})
        undeclared = visitor.post(
            "/gradio_api/upload",
            content=iter([request.read()]),
            headers={"Content-Type": request.headers["Content-Type"]},
        )
        assert undeclared.status_code == 413

        slightly = visitor.post("/gradio_api/upload", files={"files": ("a.wav", bytes(MEGABYTE + 1000))})
        assert slightly.status_code == 413
        assert visitor.get(f"/gradio_api/file={upload(visitor, RECORDING)}").status_code == 200


def test_events_carry_no_megabytes(visitor: httpx.Client) -> None:
    body = io.BytesIO(b'{"data": ["' + b"x" * 5 * MEGABYTE + b'"], "fn_index": 0, "session_hash": "x"}')
    assert visitor.post("/gradio_api/queue/join", content=body.read()).status_code == 413


def test_nothing_is_offered_as_an_api_nor_recorded(visitor: httpx.Client) -> None:
    assert visitor.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("/openapi.json", "/docs", "/redoc", "/gradio_api/runs", "/gradio_api/mcp/sse", "/monitoring/summary"):
        assert visitor.get(path).status_code >= 400, path
    config = visitor.get("/config").json()
    assert not config["analytics_enabled"]
    for event in config["dependencies"]:
        if event["api_name"]:
            skipped = visitor.post(f"/gradio_api/run/{event['api_name']}", json={"data": []})
            assert skipped.status_code >= 400, event["api_name"]


def test_pages_of_other_sites_may_neither_read_nor_frame_it(visitor: httpx.Client) -> None:
    answer = visitor.get("/config", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["content-security-policy"] == "frame-ancestors 'self'"
