from __future__ import annotations

from pathlib import Path

import pytest

from cosy_engine.checkpoint.load import CosyVoiceModel, load_model


@pytest.fixture(scope="session", params=["cosyvoice2", "cosyvoice3"])
def model(request: pytest.FixtureRequest, standin_v2: Path, standin_v3: Path) -> CosyVoiceModel:
    """Each architecture in turn."""
    return load_model(standin_v2 if request.param == "cosyvoice2" else standin_v3)
