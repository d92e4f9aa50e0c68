from __future__ import annotations

from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.serving.health import health_routes


def test_health_tells_what_the_engine_is_doing(address: str) -> None:
    answer = httpx.get(f"{address}/healthz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "active": 0, "waiting": 0}
    assert answer.headers["cache-control"] == "no-store"


def test_metrics_are_prometheus_text(address: str) -> None:
    names = {family.name for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text)}
    assert {"cosy_requests", "cosy_requests_waiting", "cosy_first_audio_seconds"} <= names


def test_a_closed_engine_is_unhealthy_and_metrics_are_off_unless_asked_for(standin_v2: Path, tmp_path: Path) -> None:
    engine = Engine.load(standin_v2, Settings(voices_dir=tmp_path, warm_up=False))
    client = TestClient(Starlette(routes=health_routes(engine)))
    assert client.get("/healthz").status_code == 200
    engine.close()
    assert client.get("/healthz").status_code == 503
    assert client.get("/metrics").status_code == 404
