"""The fingerprint that voices are tied to, without reading weights or importing torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from cosy_engine.errors import ModelDirectoryError

Name = Literal["cosyvoice2", "cosyvoice3"]

CONFIGS: dict[str, Name] = {
    "cosyvoice2.yaml": "cosyvoice2",
    "cosyvoice3.yaml": "cosyvoice3",
    "cosyvoice.yaml": "cosyvoice2",  # early releases of CosyVoice2
}
SPEECH_TOKENIZERS: dict[Name, str] = {
    "cosyvoice2": "speech_tokenizer_v2.onnx",
    "cosyvoice3": "speech_tokenizer_v3.onnx",
}
SPEAKER_ENCODER = "campplus.onnx"

_MIB = 2**20


def find_config(directory: Path) -> tuple[Path, Name]:
    """The configuration file and the model's name.

    Raises:
        ModelDirectoryError: there is none.
    """
    for file_name, name in CONFIGS.items():
        if (directory / file_name).is_file():
            return directory / file_name, name
    raise ModelDirectoryError(
        f"{directory} is not a model directory: it has neither cosyvoice2.yaml nor cosyvoice3.yaml.", param="model_dir"
    )


def fingerprint_of(directory: Path) -> str:
    """Hash of the model's name and of the size, first and last MiB of the two ONNX models that encode recordings.

    Raises:
        ModelDirectoryError: this is no model directory, or it lacks one of them.
    """
    name = find_config(directory)[1]
    digest = hashlib.sha256(name.encode())
    for file_name in (SPEECH_TOKENIZERS[name], SPEAKER_ENCODER):
        try:
            with open(directory / file_name, "rb") as file:
                size = file.seek(0, 2)
                digest.update(size.to_bytes(8, "big"))
                for start in (0, max(0, size - _MIB)):
                    file.seek(start)
                    digest.update(file.read(_MIB))
        except FileNotFoundError:
            raise ModelDirectoryError(f"{directory} is incomplete. Missing: {file_name}.", param="model_dir") from None
    return digest.hexdigest()
