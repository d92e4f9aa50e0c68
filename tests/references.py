"""Where the recorded reference values and the published configurations lie, if they are here at all."""

from __future__ import annotations

import os
from pathlib import Path

_SHARED = Path(__file__).parents[2] / "shared"


def golden_folder() -> Path:
    """COSY_GOLDEN_DIR, or `shared/golden` beside the repository."""
    return Path(os.environ.get("COSY_GOLDEN_DIR") or _SHARED / "golden")


def published_folder(beside: Path | None = None) -> Path:
    """COSY_PUBLISHED_DIR, or `published` beside the folder of a case, or `shared/published` beside the repository."""
    if os.environ.get("COSY_PUBLISHED_DIR"):
        return Path(os.environ["COSY_PUBLISHED_DIR"])
    if beside is not None and (beside.resolve().parent / "published").is_dir():
        return beside.resolve().parent / "published"
    return _SHARED / "published"
