from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cosy_engine.cli import app
from cosy_engine.errors import BackendUnavailableError
from cosy_engine.speech_lm.vllm_plugin import check_version

REPOSITORY = Path(__file__).parents[2]
WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from cosy_engine.errors import BackendUnavailableError
import cosy_engine.speech_lm.vllm_export, cosy_engine.speech_lm.vllm_lm
try:
    Engine.load(sys.argv[1], Settings(lm_backend="vllm"))
except BackendUnavailableError as error:
    print(error.param, error.message)
"""


@pytest.mark.parametrize("version", ["0.26.0", "0.26.1+cu130", "0.30.2", "0.32.0"])
def test_supported_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "1.0.0", "0.9.1", "0.26rc1", "of an unknown version"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"(?s){version}.*0.26 to 0.32"):
        check_version(version)


def test_without_vllm_everything_imports_and_asking_for_it_is_an_error(standin_v2: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_VLLM, str(standin_v2)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.startswith("load_vllm vLLM is not installed"), result.stderr
    assert "make setup-vllm" in result.stdout


def test_the_entry_point_is_the_function_that_registers() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["vllm.general_plugins"]
    [function] = [EntryPoint(name, value, "vllm.general_plugins").load() for name, value in named.items()]
    assert function.__name__ == "register"


@pytest.mark.parametrize("wrong", ["{", "[1]", "3"])
def test_an_argument_that_is_no_json_object_is_refused(wrong: str) -> None:
    say = ["say", "Hi", "--out", "-", "--prompt-wav", os.devnull, "--load-vllm", "--vllm-args", wrong]
    result = CliRunner().invoke(app, say)
    assert result.exit_code == 2 and "--vllm-args takes a JSON object" in result.stderr
