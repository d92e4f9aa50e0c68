"""Fixtures that several parts share, and the rule that CI skips nothing it was built to run."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from tests.standin import write_standin

MARKERS = ("browser", "vllm", "tensorrt", "embedded")
_REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)  # the stand-in's layers are too small to share


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under COSY_REQUIRE_ALL=1, a skipped test of one of the markers fails."""
    report = yield
    markers = [name for name in MARKERS if item.get_closest_marker(name)]
    if report.skipped and not hasattr(report, "wasxfail") and markers and os.environ.get("COSY_REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, but COSY_REQUIRE_ALL=1 requires every test marked {markers[0]}: {call.excinfo}"
    return report


@pytest.fixture(scope="session")
def standin_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory in CosyVoice2's layout. Shared: copy it before changing anything."""
    return write_standin(tmp_path_factory.mktemp("standin") / "cosyvoice2", "cosyvoice2")


@pytest.fixture(scope="session")
def standin_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory in CosyVoice3's layout. Shared: copy it before changing anything."""
    return write_standin(tmp_path_factory.mktemp("standin") / "cosyvoice3", "cosyvoice3")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of recorded reference values."""
    return _reference_folder("COSY_GOLDEN_DIR", "golden")


@pytest.fixture(scope="session")
def published_dir() -> Path:
    """The folder with the configurations and the tokenizer of the published models."""
    return _reference_folder("COSY_PUBLISHED_DIR", "published")


def _reference_folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable) or _REPOSITORY.parent / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"no {name} reference files here; set {variable} to their folder")
    return folder
