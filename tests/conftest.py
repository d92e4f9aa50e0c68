"""What several parts of the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.references import golden_folder, published_folder
from tests.required_markers import pytest_runtest_makereport
from tests.standin import write_standin

__all__ = ["pytest_runtest_makereport"]

torch.set_num_threads(1)  # the stand-in's layers are too small to share


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
    return _present(golden_folder(), "COSY_GOLDEN_DIR")


@pytest.fixture(scope="session")
def published_dir() -> Path:
    """The folder with the configurations and the tokenizer of the published models."""
    return _present(published_folder(), "COSY_PUBLISHED_DIR")


def _present(folder: Path, variable: str) -> Path:
    if not folder.is_dir():
        pytest.skip(f"these reference files are not here; set {variable} to their folder")
    return folder
