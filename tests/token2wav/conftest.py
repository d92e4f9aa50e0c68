from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cosy_engine.checkpoint.load import CosyVoiceModel, load_model
from cosy_engine.cli import app


@pytest.fixture(scope="session", params=["cosyvoice2", "cosyvoice3"])
def model(request: pytest.FixtureRequest, standin_v2: Path, standin_v3: Path) -> CosyVoiceModel:
    """Each architecture in turn."""
    return load_model(standin_v2 if request.param == "cosyvoice2" else standin_v3)


@pytest.fixture(scope="session")
def exported(model: CosyVoiceModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported("cached", "--fp16")`: the ONNX file that `export-onnx` writes; each is written once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(variant: str, *options: str) -> Path:
        arguments = ["export-onnx", str(model.directory), "--out", str(folder), "--variant", variant, *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip())

    return export
