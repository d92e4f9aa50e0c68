"""The folder of saved voices: `ID.safetensors` holds the prompt, `ID.json` the catalogue entry; both make a voice.

Whoever changes the folder holds its lock. A voice is written like this: both files are staged under hidden names, then
the tensors get their name, then the entry - at that moment the voice exists. It is deleted in the opposite order, the
entry being moved to a hidden name first. So whenever a process dies, a hidden entry without a visible one is the trace
of a voice that is not there (yet or any more), and the next one to hold the lock removes what belongs to it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cosy_engine.errors import (
    CosyError,
    InvalidRequestError,
    VoiceExistsError,
    VoiceMismatchError,
    VoiceNotFoundError,
)
from cosy_engine.files import locked, publish, stage, write_atomically
from cosy_engine.voices.names import clean_name, first_free, is_id, slug
from cosy_engine.voices.voice import (
    MAX_FILE_BYTES,
    TENSORS,
    Voice,
    VoiceInfo,
    checked_prompt,
    metadata,
    pack,
    read_metadata,
    unpack,
)

if TYPE_CHECKING:
    from cosy_engine.frontend import Prompt

log = logging.getLogger(__name__)

_HIDDEN = re.compile(r"\.(?P<id>[a-z0-9_-]+)\.(?P<kind>json|safetensors)\.[a-z0-9]+\.tmp")


class VoiceStore:
    """Saved voices of a folder, beside those that came with the model.

    Args:
        folder: where saved voices live; made when the first one is saved.
        fingerprint: of the model that will speak; None when none is at hand, then `get` refuses no voice.
        builtin: the model's own voices, by id. A saved voice of the same id hides one.
        limit: how many voices may be saved; None for any number.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str | None,
        builtin: Mapping[str, Voice] | None = None,
        limit: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.builtin = dict(builtin or {})
        self.limit = limit
        with suppress(OSError), locked(self.folder, wait=False):
            self._remove_leftovers()

    def enroll(self, name: str, prompt: Prompt, *, replace: bool = False) -> Voice:
        """Save a prompt under a name; its id is made from the name.

        Args:
            replace: take the place of the saved voice of the same name, if there is one.

        Raises:
            VoiceExistsError: a voice has this name.
            InvalidRequestError: the name or the prompt cannot be stored, or no further voice may be saved.
        """
        return self._save(clean_name(name), prompt, replace)

    def get(self, voice_id: str) -> Voice:
        """The voice with this id, ready for use.

        Raises:
            VoiceNotFoundError: there is none, or its files are damaged.
            VoiceMismatchError: it was made with another model.
        """
        if not is_id(voice_id):
            raise _not_found(voice_id)
        try:
            name = self._read_name(voice_id)
            with open(self._tensors(voice_id), "rb") as file:
                voice = dataclasses.replace(unpack(file.read(MAX_FILE_BYTES + 1)), id=voice_id, name=name)
        except FileNotFoundError:
            if voice_id in self.builtin:
                return self.builtin[voice_id]
            raise _not_found(voice_id) from None
        except InvalidRequestError as error:
            raise VoiceNotFoundError(
                f"The voice {voice_id!r} is damaged; delete it and save it again. {error.message}",
                param="voice",
                code="voice_damaged",
            ) from None
        problem = self._mismatch(voice.fingerprint)
        if problem:
            raise VoiceMismatchError(f"The voice {voice_id!r} {problem}", param="voice", code="voice_mismatch")
        return voice

    def list(self) -> list[VoiceInfo]:
        """All voices: the saved ones by name, then the model's own. One that cannot be used says so and why."""
        saved = sorted(self._saved(), key=lambda info: (info.name.casefold(), info.id))
        ids = {info.id for info in saved}
        builtin = [
            VoiceInfo(voice.id, voice.name, "builtin", voice.prompt.text, voice.created)
            for voice in self.builtin.values()
            if voice.id not in ids
        ]
        return saved + builtin

    def rename(self, voice_id: str, new_name: str) -> None:
        """Change the name people see; the id stays.

        Raises:
            VoiceNotFoundError: no saved voice has this id.
            VoiceExistsError: another voice has this name.
        """
        new_name = clean_name(new_name)
        with self._changing(voice_id):
            if new_name in self._names(but=voice_id):
                raise _exists(new_name)
            try:
                about = read_metadata(self._tensors(voice_id))
            except (InvalidRequestError, OSError):
                raise VoiceNotFoundError(
                    f"The voice {voice_id!r} is damaged; delete it.", param="voice", code="voice_damaged"
                ) from None
            write_atomically(self._entry(voice_id), _json(about | {"id": voice_id, "name": new_name}))

    def delete(self, voice_id: str) -> None:
        """Remove a saved voice, damaged ones included.

        Raises:
            VoiceNotFoundError: no saved voice has this id.
        """
        with self._changing(voice_id):
            self._entry(voice_id).replace(self.folder / f".{voice_id}.json.deleted.tmp")
            self._remove_leftovers()

    def export_voice(self, voice_id: str) -> bytes:
        """A voice as the bytes of one safetensors file, for `import_voice` elsewhere."""
        return pack(self.get(voice_id))

    def import_voice(self, data: bytes, name: str | None = None) -> Voice:
        """Save a voice that `export_voice` wrote; nothing in the bytes is trusted.

        Args:
            name: another name than the one in the file.

        Raises:
            InvalidRequestError: this is no voice file, or it is damaged, or no further voice may be saved.
            VoiceMismatchError: it was made with another model.
            VoiceExistsError: a voice has this name.
        """
        voice = unpack(data)
        problem = self._mismatch(voice.fingerprint)
        if problem:
            raise VoiceMismatchError(f"The voice {voice.name!r} {problem}", param="voice", code="voice_mismatch")
        return self._save(clean_name(voice.name if name is None else name), voice.prompt, False)

    def _save(self, name: str, prompt: Prompt, may_replace: bool) -> Voice:
        if self.fingerprint is None:
            raise InvalidRequestError("Saving a voice needs a model: name its directory.", param="model_dir")
        prompt = checked_prompt(prompt.text, {tensor: getattr(prompt, tensor) for tensor in TENSORS})
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            self._remove_leftovers()
            voice_id = self._choose_id(name, may_replace)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            voice = Voice(voice_id, name, "saved", prompt, self.fingerprint, created)
            entry = stage(self._entry(voice_id), _json(metadata(voice)))
            publish(stage(self._tensors(voice_id), pack(voice)), self._tensors(voice_id))
            publish(entry, self._entry(voice_id))
        log.info("saved voice %s", voice_id)
        return voice

    def _choose_id(self, name: str, may_replace: bool) -> str:
        saved = list(self._saved())
        same = [info for info in saved if info.name == name]
        if same and may_replace:
            return same[0].id
        if name in self._names():
            raise _exists(name)
        if self.limit is not None and len(saved) >= self.limit:
            raise InvalidRequestError(
                f"{len(saved)} voices are saved already, and no more may be: delete one first.",
                param="name",
                code="too_many_voices",
                count=len(saved),
            )
        stems = {path.stem for pattern in ("*.json", "*.safetensors") for path in self.folder.glob(pattern)}
        return first_free(slug(name), stems | set(self.builtin))

    def _names(self, but: str | None = None) -> set[str]:
        return {info.name for info in self.list() if info.id != but}

    def _saved(self) -> Iterator[VoiceInfo]:
        for path in self.folder.glob("*.json"):
            if is_id(path.stem):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    yield self._info(path.stem)

    def _info(self, voice_id: str) -> VoiceInfo:
        try:
            name = self._read_name(voice_id)
            about = read_metadata(self._tensors(voice_id))
        except InvalidRequestError as error:
            return VoiceInfo(voice_id, voice_id, "saved", "", "", f"is damaged; delete it. {error.message}")
        return VoiceInfo(voice_id, name, "saved", about["text"], about["created"], self._mismatch(about["fingerprint"]))

    def _read_name(self, voice_id: str) -> str:
        try:
            entry = json.loads(self._entry(voice_id).read_bytes())
            return clean_name(entry["name"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequestError):
            raise InvalidRequestError("Its catalogue entry cannot be read.", param="voice") from None

    def _mismatch(self, fingerprint: str) -> str | None:
        if self.fingerprint is None or fingerprint == self.fingerprint:
            return None
        return (
            f"was made with another model (its speech tokenizer or speaker encoder differs: {fingerprint[:12]} there, "
            f"{self.fingerprint[:12]} here); save it again with this model."
        )

    @contextmanager
    def _changing(self, voice_id: str) -> Iterator[None]:
        """Hold the lock for a change of a saved voice, which must be there."""
        if not is_id(voice_id):
            raise _not_found(voice_id)
        if not self.folder.is_dir():
            raise self._not_saved(voice_id)
        with locked(self.folder):
            self._remove_leftovers()
            if not self._entry(voice_id).is_file():
                raise self._not_saved(voice_id)
            yield

    def _not_saved(self, voice_id: str) -> CosyError:
        if voice_id in self.builtin:
            return InvalidRequestError(
                f"The voice {voice_id!r} comes with the model; it stays as it is.",
                param="voice",
                code="voice_builtin",
            )
        return _not_found(voice_id)

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left; the lock is held, so every hidden file is a leftover."""
        for path in self.folder.glob(".*.tmp"):
            hidden = _HIDDEN.fullmatch(path.name)
            if hidden is None:
                continue
            if hidden["kind"] == "json" and not self._entry(hidden["id"]).exists():
                self._tensors(hidden["id"]).unlink(missing_ok=True)
            path.unlink()

    def _entry(self, voice_id: str) -> Path:
        return self.folder / f"{voice_id}.json"

    def _tensors(self, voice_id: str) -> Path:
        return self.folder / f"{voice_id}.safetensors"


def _json(about: dict[str, str]) -> bytes:
    return json.dumps(about, ensure_ascii=False, indent=2).encode("utf-8")


def _shown(text: object) -> str:
    """A caller's string in a message: quoted, escaped, short."""
    text = str(text)
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _not_found(voice_id: object) -> VoiceNotFoundError:
    return VoiceNotFoundError(
        f"There is no voice {_shown(voice_id)}; list the voices to see their ids.",
        param="voice",
        code="voice_not_found",
    )


def _exists(name: str) -> VoiceExistsError:
    return VoiceExistsError(
        f"There is a voice named {name!r} already; choose another name or delete it.",
        param="name",
        code="voice_exists",
        name=name,
    )
