"""The rule of tests/required_markers.py, on a test file of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONFIGURATION = """
[pytest]
markers =
    browser
    vllm
    tensorrt
    embedded
"""
TESTS = """
import pytest

@pytest.mark.browser
def test_required():
    pytest.skip("no Chromium")

@pytest.mark.vllm
@pytest.mark.skipif(True, reason="no vLLM")
def test_required_too():
    pass

@pytest.mark.embedded
def test_required_once_the_model_is_there():
    pytest.skip("something else is missing")

@pytest.mark.tensorrt
@pytest.mark.xfail(reason="known")
def test_known_to_fail():
    assert False

def test_other():
    pytest.skip("no reference files")
"""


@pytest.mark.parametrize(
    ("required", "model", "outcome"),
    [
        ("1", False, "1 failed, 2 skipped, 1 xfailed, 1 error"),
        ("1", True, "2 failed, 1 skipped, 1 xfailed, 1 error"),
        ("", True, "4 skipped, 1 xfailed"),
    ],
)
def test_skipped_tests_of_the_markers_fail_when_all_are_required(
    tmp_path: Path, required: str, model: bool, outcome: str
) -> None:
    if model:
        (tmp_path / "assets" / "embedded").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.required_markers", tmp_path]
    environment = os.environ | {"COSY_REQUIRE_ALL": required, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert outcome in result.stdout, result.stdout + result.stderr
