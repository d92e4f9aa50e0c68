"""The `spk2info.pt` of CosyVoice directories: saved voices in the public code's form, and in async_cosyvoice's.

Both are a dict of speaker id -> dict of tensors with a batch dimension of one. The names differ:

    ours          public                        async_cosyvoice       fine-tuned speakers
    text          - (`transcript` by us)        prompt_text           -
    text_token    prompt_text                   prompt_text_token     -
    speech_token  flow_prompt_speech_token      speech_token          -
    speech_feat   prompt_speech_feat            speech_feat           -
    embedding     flow_embedding                embedding             embedding

The public form repeats the speech tokens and the embedding for the speech LM (`llm_...`) and has a `..._len` for each
sequence. A fine-tuned speaker is an embedding alone: a voice whose prompt is empty.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosy_engine.errors import InvalidRequestError, ModelDirectoryError, UnsafeModelError
from cosy_engine.files import write_atomically
from cosy_engine.voices.names import MAX_NAME_LENGTH, clean_name, first_free, is_id, slug
from cosy_engine.voices.voice import EMBEDDING_SIZE, MEL_BINS, Voice, checked_prompt

log = logging.getLogger(__name__)

PUBLIC = {
    "text_token": "prompt_text",
    "speech_token": "flow_prompt_speech_token",
    "speech_feat": "prompt_speech_feat",
    "embedding": "flow_embedding",
}
ASYNC = {
    "text_token": "prompt_text_token",
    "speech_token": "speech_token",
    "speech_feat": "speech_feat",
    "embedding": "embedding",
}


def read_spk2info(source: Path | str | bytes, fingerprint: str) -> dict[str, Voice]:
    """Voices of a `spk2info.pt` by speaker id; entries that are not voices are left out with a warning.

    Args:
        source: the file or its bytes; only tensors and plain data are read, no code is run.
        fingerprint: of the model that the file belongs to.

    Raises:
        UnsafeModelError: reading it would need code to be run.
        ModelDirectoryError: it is not a dict of speakers.
    """
    name = "spk2info.pt" if isinstance(source, bytes) else str(source)
    try:
        entries = torch.load(
            io.BytesIO(source) if isinstance(source, bytes) else source, map_location="cpu", weights_only=True
        )
    except pickle.UnpicklingError:
        raise UnsafeModelError(f"{name} is not a file of tensors and plain data alone; it was not loaded.") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ModelDirectoryError(f"{name} cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise ModelDirectoryError(f"{name} is not a dict of speakers.")
    voices: dict[str, Voice] = {}
    ids: set[str] = set()
    for speaker, entry in entries.items():
        try:
            voice = _read_entry(str(speaker), entry, fingerprint, ids)
        except InvalidRequestError as error:
            log.warning("%s: speaker %r is left out. %s", name, speaker, error.message)
            continue
        ids.add(voice.id)
        voices[str(speaker)] = voice
    return voices


def builtin_voices(model_dir: Path, fingerprint: str) -> dict[str, Voice]:
    """Voices of a model directory's `spk2info.pt` by voice id; none when it has no such file."""
    path = Path(model_dir) / "spk2info.pt"
    if not path.is_file():
        return {}
    return {voice.id: voice for voice in read_spk2info(path, fingerprint).values()}


def write_spk2info(path: Path, voices: Mapping[str, Voice]) -> None:
    """Write voices by speaker id in the public form, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({speaker: _write_entry(speaker, voice) for speaker, voice in voices.items()}, buffer)
    write_atomically(Path(path), buffer.getvalue())


def _read_entry(speaker: str, entry: Any, fingerprint: str, taken: set[str]) -> Voice:
    if not isinstance(entry, dict):
        raise InvalidRequestError("It is not a dict.")
    keys = PUBLIC if "flow_prompt_speech_token" in entry else ASYNC
    tensors = {ours: _without_batch(entry[theirs]) for ours, theirs in keys.items() if theirs in entry}
    if set(tensors) == {"embedding"}:
        empty = torch.zeros(0, dtype=torch.int32)
        tensors |= {"text_token": empty, "speech_token": empty, "speech_feat": torch.zeros(0, MEL_BINS)}
    else:
        _agree(tensors)
    if "embedding" in tensors and tensors["embedding"].numel() == EMBEDDING_SIZE:
        tensors["embedding"] = tensors["embedding"].reshape(EMBEDDING_SIZE)
    text = entry.get("transcript") or entry.get("prompt_text")
    display = entry.get("name")
    return Voice(
        id=first_free(speaker if is_id(speaker) else slug(speaker), taken),
        name=clean_name((display if isinstance(display, str) and display.strip() else speaker)[:MAX_NAME_LENGTH]),
        kind="builtin",
        prompt=checked_prompt(text if isinstance(text, str) else "", tensors),
        fingerprint=fingerprint,
        created="",
    )


def _without_batch(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidRequestError("It holds something else where a tensor belongs.")
    return value[0] if value.ndim > 1 and value.shape[0] == 1 else value


def _agree(tensors: dict[str, Tensor]) -> None:
    """Cut speech tokens and mel to the same length, two frames a token."""
    codes, mel = tensors.get("speech_token"), tensors.get("speech_feat")
    if codes is not None and mel is not None and codes.ndim == 1 and mel.ndim == 2:
        length = min(len(codes), len(mel) // 2)
        tensors["speech_token"], tensors["speech_feat"] = codes[:length], mel[: 2 * length]


def _write_entry(speaker: str, voice: Voice) -> dict[str, Any]:
    prompt = voice.prompt
    embedding = prompt.embedding[None]
    name = {"name": voice.name} if voice.name != speaker else {}
    if not len(prompt.speech_token):
        return {"embedding": embedding, **name}
    text, codes, mel = prompt.text_token[None], prompt.speech_token[None], prompt.speech_feat[None]
    return {
        "prompt_text": text,
        "prompt_text_len": _length(text),
        "llm_prompt_speech_token": codes,
        "llm_prompt_speech_token_len": _length(codes),
        "flow_prompt_speech_token": codes,
        "flow_prompt_speech_token_len": _length(codes),
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": _length(mel),
        "llm_embedding": embedding,
        "flow_embedding": embedding,
        **({"transcript": prompt.text} if prompt.text else {}),
        **name,
    }


def _length(sequence: Tensor) -> Tensor:
    return torch.tensor([sequence.shape[1]], dtype=torch.int32)
