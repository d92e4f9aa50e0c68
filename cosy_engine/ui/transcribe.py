"""What is said in a recording, by a speech recogniser that happens to be installed together with its model.

Nothing is ever downloaded: a package whose model is not on the disk counts as not installed.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

Transcriber = Callable[[str], str]  # path of a recording -> text

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_SIZES = ("large-v3-turbo", "large-v3", "medium", "small", "base", "tiny")  # best first


def find_transcriber() -> Transcriber | None:
    """The first recogniser that can work here, or None. Its model is loaded when it is used first."""
    for package, find in (("funasr", _funasr), ("faster_whisper", _faster_whisper), ("whisper", _whisper)):
        if find_spec(package) is None:
            continue
        try:
            load = find(import_module(package))
        except Exception as error:  # an optional package must not stop the page
            logger.warning("%s cannot be used for transcripts: %s", package, error)
            continue
        if load is not None:
            logger.info("recordings are transcribed with %s", package)
            return _loaded_once(load)
    return None


def _loaded_once(load: Callable[[], Transcriber]) -> Transcriber:
    lock = threading.Lock()
    loaded: list[Transcriber] = []

    def transcribe(path: str) -> str:
        with lock:
            if not loaded:
                loaded.append(load())
            return loaded[0](path).strip()

    return transcribe


def _funasr(package: object) -> Callable[[], Transcriber] | None:
    hub = Path(os.environ.get("MODELSCOPE_CACHE") or _CACHE / "modelscope" / "hub")
    folders = [hub / kind / "iic" / "SenseVoiceSmall" for kind in ("models", ".")]
    folder = next((folder for folder in folders if (folder / "model.pt").is_file()), None)
    if folder is None:
        return None

    def load() -> Transcriber:
        model = package.AutoModel(model=str(folder), disable_update=True)
        return lambda path: re.sub(r"<\|[^|]*\|>", "", model.generate(input=path, language="auto")[0]["text"])

    return load


def _faster_whisper(package: object) -> Callable[[], Transcriber] | None:
    for size in _SIZES:
        try:
            folder = package.download_model(size, local_files_only=True)
        except Exception:  # each of its versions has its own way to say that there is none
            continue

        def load(folder: str = folder) -> Transcriber:
            model = package.WhisperModel(folder)
            return lambda path: "".join(segment.text for segment in model.transcribe(path)[0])

        return load
    return None


def _whisper(package: object) -> Callable[[], Transcriber] | None:
    file = next(
        (_CACHE / "whisper" / f"{size}.pt" for size in _SIZES if (_CACHE / "whisper" / f"{size}.pt").is_file()), None
    )
    if file is None:
        return None

    def load() -> Transcriber:
        model = package.load_model(str(file))
        return lambda path: model.transcribe(path)["text"]

    return load
