from __future__ import annotations

import os
import shutil
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


def heed_interrupts() -> None:
    """In the server's process: a test run that was started in the background passes on that it ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


@pytest.mark.parametrize("shipped", [True, False], ids=["with-a-model", "without"])
def test_one_command_serves_the_page_with_the_model_that_is_there(
    standin_v2: Path, tmp_path: Path, shipped: bool
) -> None:
    """A copy of the repository, with a directory in assets/embedded or without."""
    copy, port, log = tmp_path / "copy", free_port(), tmp_path / "log"
    shutil.copytree(ROOT / "cosy_engine", copy / "cosy_engine", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("webui.py", "tests/__init__.py", "tests/standin.py"):
        (copy / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    if shipped:
        shutil.copytree(standin_v2, copy / "assets" / "embedded")
    environment = {name: value for name, value in os.environ.items() if name != "COSY_MODEL_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "COSY_VOICES_DIR": str(tmp_path / "voices")}
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "webui.py", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=copy,
            preexec_fn=heed_interrupts,
        )
    try:
        page = _fetch(f"http://127.0.0.1:{port}/", server, log)
        assert ('"elem_id":"embedded"' in page, '"elem_id":"untrained"' in page) == (shipped, not shipped)
        assert ("untrained stand-in" in log.read_text()) != shipped
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_before_it_is_ready_it_ends_without_a_word(
    standin_v2: Path, tmp_path: Path, signal_number: int
) -> None:
    """The port is open while Gradio still calls the page's own start."""
    port, log = free_port(), tmp_path / "log"
    environment = os.environ | {"COSY_VOICES_DIR": str(tmp_path / "voices"), "COSY_WARM_UP": "false"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*WEBUI, "--port", str(port), "--model-dir", str(standin_v2)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=heed_interrupts,
        )
    try:
        for _ in range(12_000):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.01)
        server.send_signal(signal_number)
        assert server.wait(timeout=30) == 0, log.read_text()
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
