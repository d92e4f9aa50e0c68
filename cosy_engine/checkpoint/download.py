"""Turn what the user names - a folder, a ModelScope id, a Hugging Face id - into a local model directory."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import requests

from cosy_engine.errors import ModelDirectoryError

Hub = Literal["modelscope", "hf"]

KNOWN_IDS = {
    "modelscope:iic/CosyVoice2-0.5B": "CosyVoice2",
    "modelscope:FunAudioLLM/Fun-CosyVoice3-0.5B-2512": "CosyVoice3",
    "hf:FunAudioLLM/CosyVoice2-0.5B": "CosyVoice2",
    "hf:FunAudioLLM/Fun-CosyVoice3-0.5B-2512": "CosyVoice3",
}
NEEDED_FILES = [
    "cosyvoice.yaml",
    "cosyvoice2.yaml",
    "cosyvoice3.yaml",
    *(f"{part}.{suffix}" for part in ("llm", "flow", "hift") for suffix in ("pt", "safetensors")),
    "campplus.onnx",
    "speech_tokenizer_v2.onnx",
    "speech_tokenizer_v3.onnx",
    "spk2info.pt",
    *(f"CosyVoice-BlankEN/{name}" for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json")),
]

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_NAMES: dict[Hub, str] = {"modelscope": "ModelScope", "hf": "Hugging Face"}
_SECONDS_TO_ANSWER = 5


def resolve_model_dir(path_or_id: str | Path, cache_dir: Path | None = None) -> Path:
    """The local directory of a model, downloaded first when it is given as an id.

    An existing directory is taken as it is. `org/name` comes from ModelScope when org is `iic`, otherwise from
    Hugging Face; `modelscope:org/name` and `hf:org/name` choose. Only the files in `NEEDED_FILES` are fetched, into the
    hub's own cache (or `cache_dir`), and what is cached is used when the hub cannot be reached.

    Raises:
        ModelDirectoryError: there is no such directory, or the download failed; the message lists the ways out.
    """
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        return directory
    hub, model_id = _parse_id(str(path_or_id))
    if model_id is None or (":" not in str(path_or_id) and directory.parent.is_dir()):
        raise _no_directory(str(path_or_id), "is a file, not a directory" if directory.exists() else "does not exist")
    endpoint = _endpoint(hub)
    reachable = _answers(endpoint)
    try:
        with _quiet_hub_logs():
            snapshot = _download(hub, model_id, endpoint, cache_dir, local_files_only=not reachable)
    except Exception as error:  # the hub clients raise their own, requests', httpx's and OS errors
        reason = (
            _first_line(error) if reachable else f"{endpoint} cannot be reached and there is no complete local copy"
        )
        raise _no_download(hub, model_id, reason) from None
    return snapshot


def _parse_id(name: str) -> tuple[Hub, str | None]:
    """The hub and the id that a name means; the id is None for what cannot be one."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _HUB_NAMES:
        return prefix, rest if _MODEL_ID.fullmatch(rest) else None
    return "modelscope" if name.startswith("iic/") else "hf", name if _MODEL_ID.fullmatch(name) else None


def _endpoint(hub: Hub) -> str:
    """Where the hub is: the environment's mirror, or its public address."""
    if hub == "hf":
        return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    address = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "modelscope.cn"
    return address if "://" in address else f"https://{address}"


def _answers(endpoint: str) -> bool:
    """Whether anything answers there. The clients themselves retry for up to half a minute."""
    try:
        requests.head(endpoint, timeout=_SECONDS_TO_ANSWER)
    except requests.exceptions.SSLError:
        return True
    except (requests.ConnectionError, requests.Timeout):
        return False
    return True


def _download(hub: Hub, model_id: str, endpoint: str, cache_dir: Path | None, *, local_files_only: bool) -> Path:
    if hub == "hf":
        from huggingface_hub import snapshot_download
    else:
        from modelscope import snapshot_download
    folder = snapshot_download(
        model_id,
        endpoint=endpoint,
        cache_dir=cache_dir,
        allow_patterns=NEEDED_FILES,
        local_files_only=local_files_only,
    )
    return Path(folder)


@contextmanager
def _quiet_hub_logs() -> Iterator[None]:
    """Their warnings repeat what the error will say."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "modelscope", "modelscope_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _ways_out() -> str:
    known = "\n".join(f"    {name}  ({version})" for name, version in KNOWN_IDS.items())
    return (
        "  - a local folder that holds cosyvoice2.yaml or cosyvoice3.yaml, llm.pt, flow.pt, hift.pt, campplus.onnx, "
        "speech_tokenizer_v2.onnx or _v3.onnx, and CosyVoice-BlankEN/: give its path instead\n"
        "  - the other hub, or another model; known ids:\n"
        f"{known}\n"
        "  - a mirror: set HF_ENDPOINT for Hugging Face (such as https://hf-mirror.com), "
        "MODELSCOPE_ENDPOINT (formerly MODELSCOPE_DOMAIN) for ModelScope"
    )


def _no_directory(path: str, what: str) -> ModelDirectoryError:
    return ModelDirectoryError(f"The model directory {path} {what}. What works:\n{_ways_out()}", param="model_dir")


def _no_download(hub: Hub, model_id: str, reason: str) -> ModelDirectoryError:
    return ModelDirectoryError(
        f"There is no directory {model_id} here, and it could not be downloaded from {_HUB_NAMES[hub]}: {reason}\n"
        f"What works:\n{_ways_out()}",
        param="model_dir",
    )
