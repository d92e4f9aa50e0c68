"""The speech LM of a model directory as a Hugging Face style directory that vLLM loads.

A directory is there completely or not at all, names the source that it was made from, and is made again when that has
changed or this module writes another format.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from cosy_engine.checkpoint.build import TEXT_MODEL
from cosy_engine.checkpoint.fingerprint import find_config
from cosy_engine.checkpoint.load import find_weights, load_speech_lm
from cosy_engine.errors import InvalidRequestError
from cosy_engine.files import cache_folder, locked
from cosy_engine.speech_lm.decoding import SpeechCodeLM
from cosy_engine.speech_lm.merged_vocabulary import MergedVocabulary, merged_embedding
from cosy_engine.speech_lm.vllm_plugin import ARCHITECTURE

logger = logging.getLogger(__name__)

_FORMAT = 1
_SOURCE = "cosy_source"  # key of config.json


def export_model(model_dir: Path, out: Path | None = None) -> Path:
    """Export the speech LM of a local model directory, unless `out` already is its export.

    Args:
        out: the directory to write; None is one in the user's cache folder.

    Raises:
        ModelDirectoryError: the model directory is incomplete or its weights do not fit.
        InvalidRequestError: `out` is there and is something else.
    """
    model_dir = model_dir.resolve()
    if out is None:
        place = hashlib.sha256(os.fsencode(model_dir)).hexdigest()[:12]
        out = cache_folder() / "vllm" / f"{model_dir.name}-{place}"
    out = out.absolute()
    source = _source(model_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent):
        if _source_of(out) != source:
            logger.info("Exporting the speech LM of %s for vLLM to %s", model_dir, out)
            _replace(out, load_speech_lm(model_dir), source)
    return out


def write_export(lm: SpeechCodeLM, folder: Path, source: str = "") -> None:
    """Write `config.json` and `model.safetensors` of a speech LM into an existing folder."""
    vocabulary = MergedVocabulary.of(lm)
    head = lm.llm_decoder
    config = lm.llm.model.config.to_dict() | {
        "architectures": [ARCHITECTURE],
        "vocab_size": vocabulary.size,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "speech_codes": vocabulary.codes,
        "speech_rows": vocabulary.speech_rows,
        "speech_head_bias": head.bias is not None,
        _SOURCE: source,
    }
    backbone = lm.llm.model.model.state_dict()
    weights = {f"model.{name}": value for name, value in backbone.items()}
    weights["model.embed_tokens.weight"] = merged_embedding(lm)
    weights |= {f"lm_head.{name}": value for name, value in head.state_dict().items()}
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _replace(out: Path, lm: SpeechCodeLM, source: str) -> None:
    """Write beside `out` and rename; an older export goes."""
    if out.exists() and _source_of(out) is None:
        raise InvalidRequestError(
            f"{out} is there and is not an export of a speech LM; name another folder.", param="out"
        )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        write_export(lm, new, source)
        for path in (*new.iterdir(), new):
            _to_disk(path)
        if out.exists():
            out.rename(old)
        new.rename(out)
        _to_disk(out.parent)


def _source(model_dir: Path) -> str:
    """Hash of everything that decides an export: format, and which files it comes from."""
    digest = hashlib.sha256(f"{_FORMAT} {model_dir}".encode())
    for path in (find_weights(model_dir, "llm"), find_config(model_dir)[0], model_dir / TEXT_MODEL / "config.json"):
        status = path.stat()
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _source_of(out: Path) -> str | None:
    """What an export was made from; None if `out` is none."""
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8")).get(_SOURCE)
    except (OSError, ValueError, AttributeError):
        return None


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
