from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEBUI = [sys.executable, str(ROOT / "webui.py")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_help_tells_the_options() -> None:
    shown = subprocess.run([*WEBUI, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(option in shown.stdout for option in ("--model-dir", "--host", "--port"))


def test_a_wrong_model_directory_is_one_sentence(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*WEBUI, "--model-dir", str(tmp_path / "nothing")], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert ran.returncode == 1
    assert "nothing" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--auth", "ann"], "name:password"),
        (["--root-path", "voices"], "/voices"),
        (["--ssl-certfile", "no-such-file.pem"], "key"),
        (["--max-queue", "-1"], "--max-queue"),
    ],
)
def test_a_wrong_option_is_one_sentence_before_anything_is_loaded(options: list[str], said: str) -> None:
    ran = subprocess.run([*WEBUI, *options], capture_output=True, text=True, timeout=60)
    assert ran.returncode
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_one_command_serves_the_page_with_the_standin(tmp_path: Path) -> None:
    port = free_port()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "COSY_VOICES_DIR": str(tmp_path / "voices")}
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*WEBUI, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
    try:
        page = _fetch(f"http://127.0.0.1:{port}/", server, log)
        assert "untrained" in page
        assert "untrained stand-in" in log.read_text()
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()


def _fetch(url: str, server: subprocess.Popen, log: Path) -> str:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())
