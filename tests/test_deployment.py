"""What the files for deployment promise: the image, the Space, and the documentation's options."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from cosy_engine.checkpoint.download import KNOWN_IDS, NEEDED_FILES
from cosy_engine.config import HopSettings, Settings

ROOT = Path(__file__).parents[1]
TARGETS = ["cpu", "gpu"]


@dataclass
class Stage:
    """A stage of the Dockerfile and what it does, one `(INSTRUCTION, arguments)` a line."""

    parent: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def read_stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            parent, _, called = arguments.partition(" AS ")
            stages[called] = Stage(parent)
        elif name and stages:
            list(stages.values())[-1].lines.append((name, arguments.strip()))
    return stages


STAGES = read_stages()


def lines_of(target: str) -> list[tuple[str, str]]:
    """All instructions that make an image, those of its parents first."""
    stage = STAGES[target]
    return [*(lines_of(stage.parent) if stage.parent in STAGES else []), *stage.lines]


def last(target: str, instruction: str) -> str:
    return [arguments for name, arguments in lines_of(target) if name == instruction][-1]


def environment(target: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for name, pairs in lines_of(target) if name == "ENV" for pair in pairs.split())


def allowed_into_image() -> list[str]:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in patterns, "everything is left out that is not named"
    return [pattern[1:] for pattern in patterns if pattern.startswith("!")]


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_as_user_1000_on_port_7860(target: str) -> None:
    settings = environment(target)
    assert last(target, "USER") == "1000"
    assert last(target, "EXPOSE") == settings["GRADIO_SERVER_PORT"] == "7860"
    assert settings["GRADIO_SERVER_NAME"] == "0.0.0.0"
    assert last(target, "CMD") == '["python", "webui.py"]'
    owned = next(arguments for name, arguments in lines_of(target) if name == "RUN" and "useradd" in arguments)
    for variable in ("COSY_VOICES_DIR", "XDG_CACHE_HOME"):
        assert settings[variable] in owned.split(), "made for user 1000"
    for variable in ("HF_HOME", "MODELSCOPE_CACHE"):
        assert settings[variable].startswith(settings["XDG_CACHE_HOME"])


def test_a_plain_build_makes_the_cpu_image() -> None:
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_exists(target: str) -> None:
    names = list(STAGES)
    for stage in names:
        for name, arguments in STAGES[stage].lines:
            if name != "COPY":
                continue
            source = re.search(r"--from=(\S+)", arguments)
            if source:
                assert source.group(1) in names[: names.index(stage)]
                continue
            *files, _ = [word for word in arguments.split() if not word.startswith("--")]
            for file in files:
                optional = any(letter in file for letter in "[*?")
                assert optional or (ROOT / file).exists(), file
                assert file == "." or any(fnmatch(entry, file) for entry in allowed_into_image()), file
    copied = [arguments for name, arguments in lines_of(target) if name == "COPY"]
    assert copied == [f"--link --from=packages-{target} /opt/venv /opt/venv", "--link --from=code / /app"]


def test_only_code_gets_into_the_image() -> None:
    entries = allowed_into_image()
    assert not {"spk_cache", ".env", ".git", "tests", "artifacts"} & set(entries)
    assert not {entry for entry in entries if not (ROOT / entry).exists()}
    for stage in STAGES.values():
        for name, arguments in stage.lines:
            if name in ("ENV", "ARG"):
                assert not re.search(r"AUTH|PASSWORD|TOKEN|SECRET|_KEY", arguments)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The folder /app as the image has it, where nothing may be written."""
    code = tmp_path / "app"
    code.mkdir()
    for entry in allowed_into_image():
        source = ROOT / entry
        if source.is_dir():
            shutil.copytree(source, code / entry, ignore=shutil.ignore_patterns("__pycache__", "embedded"))
        elif source.exists():
            shutil.copy(source, code / entry)
    folders = [code, *(path for path in code.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield code
    for folder in folders:
        folder.chmod(0o755)


def test_what_is_in_the_image_serves_the_page_and_is_healthy(image: Path, standin_v2: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = environment("cpu")
    settings |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "GRADIO_SERVER_PORT": str(port)}
    settings |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COSY_VOICES_DIR": str(tmp_path / "voices")}
    settings |= {"COSY_MODEL_DIR": str(standin_v2), "COSY_WARM_UP": "false", "OMP_NUM_THREADS": "1"}
    _, *command = json.loads(last("cpu", "CMD"))
    check = json.loads(last("cpu", "HEALTHCHECK").partition("CMD ")[2])
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *command], cwd=image, env=settings, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while subprocess.run([sys.executable, *check[1:]], env=settings, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
        assert "CosyVoice" in page
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
        assert "Traceback" not in log.read_text()
        assert not list(image.rglob("__pycache__"))
    finally:
        server.kill()
        server.wait()


def test_onnxruntime_reports_nothing(standin_v2: Path, tmp_path: Path) -> None:
    """Its builds keep a device id and a queue of events for their maker in the cache folder, unless told not to."""
    code = (
        "import sys, torch; from pathlib import Path; from cosy_engine.audio.onnx_session import OnnxModel; "
        "OnnxModel(Path(sys.argv[1]), torch.device('cpu'))"
    )
    settings = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    settings |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code, standin_v2 / "campplus.onnx"], cwd=ROOT, env=settings, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def front_matter() -> dict[str, object]:
    return yaml.safe_load((ROOT / "README.md").read_text().split("---\n")[1])


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_space_settings_fit_the_project() -> None:
    space = front_matter()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert space["sdk"] == "gradio"
    assert space["sdk_version"] == requirements()["gradio"]
    assert (ROOT / space["app_file"]).is_file()
    assert space["license"] == project["license"].lower()
    oldest = project["requires-python"].removeprefix(">=").split(".")
    assert [int(part) for part in str(space["python_version"]).split(".")] >= [int(part) for part in oldest]
    assert len(space["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {space["colorFrom"], space["colorTo"]} <= colours
    assert {f"hf:{model}" for model in space["models"]} <= set(KNOWN_IDS)


def test_space_preloads_what_the_model_needs_and_nothing_else() -> None:
    (preloaded,) = front_matter()["preload_from_hub"]
    model, files = preloaded.split(" ")
    assert KNOWN_IDS[f"hf:{model}"] == "CosyVoice3"
    assert set(files.split(",")) <= set(NEEDED_FILES)
    needed = {"cosyvoice3.yaml", "llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v3.onnx"}
    assert needed <= set(files.split(","))


def test_packages_are_names() -> None:
    names = (ROOT / "packages.txt").read_text().split()
    assert names and all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name) for name in names)


def test_documented_options_and_variables_exist() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text()
    shown = subprocess.run(
        [sys.executable, "webui.py", "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
    ).stdout
    lines = [line for line in guide.splitlines() if "webui.py" in line or line.startswith("| `")]
    for option in {option for line in lines for option in re.findall(r"--[a-z][a-z-]+", line)}:
        assert option in shown, option
    known = {f"COSY_{name.upper()}" for name in [*Settings.model_fields, *HopSettings.model_fields]}
    for variable in set(re.findall(r"\bCOSY_[A-Z_]*[A-Z]\b", guide)):
        assert variable in known or variable in shown, variable


def test_the_guides_links_lead_somewhere() -> None:
    guide = ROOT / "docs" / "deploy.md"
    text = guide.read_text()
    headings = {
        re.sub(r"[^a-z -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (guide.parent / link).exists(), link
