"""The model that is used when none is named: the one that ships with the project, or an untrained stand-in.

The stand-in has random weights and makes noise; it lets the page, the command line and the tests run anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.files import cache_folder

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_EMBEDDED = _ROOT / "assets" / "embedded"
_STANDIN_SCRIPT = _ROOT / "tests" / "standin.py"
_STANDIN_PREFIX = "standin-"


def default_model_dir() -> Path:
    """`assets/embedded` if it is there, else a stand-in, written once into the user's cache folder.

    Raises:
        ModelDirectoryError: this installation has neither.
    """
    if _EMBEDDED.is_dir():
        return _EMBEDDED
    if not _STANDIN_SCRIPT.is_file():
        raise ModelDirectoryError(
            "No model was named and none is installed: give --model-dir a folder or an id such as "
            "iic/CosyVoice2-0.5B or FunAudioLLM/Fun-CosyVoice3-0.5B-2512.",
            param="model_dir",
        )
    logger.warning(
        "No model was named: using an untrained stand-in that makes noise, not speech. "
        "For real voices: --model-dir iic/CosyVoice2-0.5B"
    )
    return _cached_standin()


def is_standin(directory: Path) -> bool:
    """Whether a model directory is the untrained stand-in of `default_model_dir`."""
    return directory.name.startswith(_STANDIN_PREFIX)


def is_embedded(directory: Path) -> bool:
    """Whether a model directory is the one that ships with the project."""
    return directory.resolve() == _EMBEDDED


def _cached_standin() -> Path:
    cache = cache_folder()
    version = hashlib.sha256(_STANDIN_SCRIPT.read_bytes()).hexdigest()[:12]
    directory = cache / f"{_STANDIN_PREFIX}{version}"
    if not directory.is_dir():
        from tests.standin import write_standin

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            written = write_standin(Path(folder) / "model", "cosyvoice2")
            try:
                written.rename(directory)
            except OSError:  # another process was faster
                if not directory.is_dir():
                    raise
    return directory
