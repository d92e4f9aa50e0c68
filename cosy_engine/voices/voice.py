"""A voice, and the one-file form it is stored and passed on in: safetensors with the metadata in its header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cosy_engine.errors import InvalidRequestError
from cosy_engine.voices.names import clean_name

if TYPE_CHECKING:  # naming voices must not cost the import of torch and the front end
    from torch import Tensor

    from cosy_engine.frontend import Prompt

FORMAT = "cosy-voice-1"
MAX_FILE_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 256 * 2**10
MAX_TEXT_CHARACTERS = 20_000  # normalisation spells out numbers
MAX_TEXT_TOKENS = 4000
MAX_SPEECH_TOKENS = 1000  # 40 s
TEXT_IDS = 200_000  # above every known text vocabulary
SPEECH_CODES = 6561
MEL_BINS = 80
EMBEDDING_SIZE = 192

TENSORS = ("text_token", "speech_token", "speech_feat", "embedding")

Kind = Literal["saved", "builtin"]


@dataclass(frozen=True)
class Voice:
    """A prompt under a name. `fingerprint` tells the model it was made with; `created` is UTC, ISO 8601."""

    id: str
    name: str
    kind: Kind
    prompt: Prompt
    fingerprint: str
    created: str


@dataclass(frozen=True)
class VoiceInfo:
    """A line in the list of voices. `problem` says why the voice cannot be used with this model, if so."""

    id: str
    name: str
    kind: Kind
    text: str
    created: str
    problem: str | None = None


def checked_prompt(text: str, tensors: dict[str, Tensor]) -> Prompt:
    """A Prompt of tensors from outside, after looking at every shape, type and value that a model relies on.

    Args:
        text: what is said in the recording.
        tensors: text_token [n], speech_token [m], speech_feat [2m, 80], embedding [192]; n and m may be 0.

    Raises:
        InvalidRequestError: something does not fit; the message says what.
    """
    import torch

    from cosy_engine.frontend import Prompt

    missing = [name for name in TENSORS if not isinstance(tensors.get(name), torch.Tensor)]
    if missing:
        raise _unfit(f"it has no {', '.join(missing)}")
    tokens, codes, mel, embedding = (tensors[name] for name in TENSORS)
    if tokens.ndim != 1 or len(tokens) > MAX_TEXT_TOKENS or codes.ndim != 1 or len(codes) > MAX_SPEECH_TOKENS:
        raise _unfit(f"tokens of shape {tuple(tokens.shape)} and {tuple(codes.shape)}")
    if mel.shape != (2 * len(codes), MEL_BINS) or embedding.shape != (EMBEDDING_SIZE,):
        raise _unfit(
            f"{len(codes)} speech tokens with a mel of shape {tuple(mel.shape)} and an embedding of shape "
            f"{tuple(embedding.shape)}, expected {(2 * len(codes), MEL_BINS)} and {(EMBEDDING_SIZE,)}"
        )
    for ids, limit in ((tokens, TEXT_IDS), (codes, SPEECH_CODES)):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise _unfit(f"tokens of type {ids.dtype}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            raise _unfit(f"a token outside 0..{limit - 1}")
    for values in (mel, embedding):
        if not values.is_floating_point() or not torch.isfinite(values).all():
            raise _unfit("values that are not finite numbers")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise _unfit(f"a text of {len(text)} characters, at most {MAX_TEXT_CHARACTERS} are allowed")
    return Prompt(
        text=text.encode("utf-8", "replace").decode("utf-8"),
        text_token=tokens.to("cpu", torch.int32).contiguous(),
        speech_token=codes.to("cpu", torch.int32).contiguous(),
        speech_feat=mel.to("cpu", torch.float32).contiguous(),
        embedding=embedding.to("cpu", torch.float32).contiguous(),
    )


def metadata(voice: Voice) -> dict[str, str]:
    """Everything about a voice but its tensors, as it stands in its files."""
    return {
        "format": FORMAT,
        "id": voice.id,
        "name": voice.name,
        "kind": voice.kind,
        "text": voice.prompt.text,
        "created": voice.created,
        "fingerprint": voice.fingerprint,
    }


def pack(voice: Voice) -> bytes:
    """The voice as one safetensors file."""
    from safetensors.torch import save

    return save({name: getattr(voice.prompt, name) for name in TENSORS}, metadata(voice))


def unpack(data: bytes) -> Voice:
    """The voice in the bytes of a safetensors file, which may come from anybody.

    Raises:
        InvalidRequestError: this is no voice file, or its content is out of bounds.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if len(data) > MAX_FILE_BYTES:
        raise _unfit(f"it has {len(data)} bytes, at most {MAX_FILE_BYTES} are allowed")
    about = _metadata_of(data[: 8 + MAX_HEADER_BYTES], len(data))
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise _unfit(f"it cannot be read as safetensors, {error}") from None
    return Voice(
        id=about["id"],
        name=clean_name(about["name"]),
        kind="saved",
        prompt=checked_prompt(about["text"], tensors),
        fingerprint=about["fingerprint"],
        created=about["created"],
    )


def read_metadata(path: Path) -> dict[str, str]:
    """`metadata` of a voice file, without its tensors.

    Raises:
        InvalidRequestError: this is no voice file, or a part of one.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        return _metadata_of(file.read(8 + MAX_HEADER_BYTES), path.stat().st_size)


def _metadata_of(head: bytes, file_size: int) -> dict[str, str]:
    """Read a safetensors header: 8 bytes of length, little endian, then JSON; the tensors follow."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 + length:
        raise _unfit("it is no safetensors file, or cut off")
    try:
        header = json.loads(head[8 : 8 + length])
        about = header.pop("__metadata__")
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        fields = {key: about[key] for key in ("format", "id", "name", "kind", "text", "created", "fingerprint")}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise _unfit("it is a safetensors file without a voice's metadata") from None
    if not all(isinstance(value, str) for value in fields.values()) or fields["format"] != FORMAT:
        raise _unfit(f"its format is not {FORMAT}")
    if file_size != end:
        raise _unfit(f"it has {file_size} bytes instead of {end}")
    return fields


def _unfit(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"This voice file cannot be used: {what}.", param="voice", code="bad_voice_file")
