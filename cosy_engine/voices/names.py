"""What a voice is called: the name people see and the id that files and requests use."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from cosy_engine.errors import InvalidRequestError

MAX_NAME_LENGTH = 80
MAX_SLUG_LENGTH = 48  # leaves room for a number within an id's 64 characters
JOINERS = "\u200c\u200d"  # invisible, but emoji and some scripts are not written right without them

_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def is_id(text: str) -> bool:
    """Whether `text` can be a voice id, and so a part of a file name."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def clean_name(name: str) -> str:
    """The name as people will see it: one line, no control or text-direction characters, otherwise as written.

    Raises:
        InvalidRequestError: nothing visible is left, or it is longer than `MAX_NAME_LENGTH`.
    """
    one_line = " ".join(name.split())
    cleaned = unicodedata.normalize("NFC", "".join(c for c in one_line if not _is_control(c))).strip()
    if not cleaned.strip(JOINERS):
        raise InvalidRequestError(
            "Give the voice a name with at least one visible character.", param="name", code="name_empty"
        )
    if len(cleaned) > MAX_NAME_LENGTH:
        raise InvalidRequestError(
            f"The voice's name has {len(cleaned)} characters; use at most {MAX_NAME_LENGTH}.",
            param="name",
            code="name_too_long",
            count=len(cleaned),
            most=MAX_NAME_LENGTH,
        )
    return cleaned


def slug(name: str) -> str:
    """A voice id made from a name: its Latin letters and digits, plus a hash when others had to go."""
    folded = unicodedata.normalize("NFKD", name).casefold()
    letters = [c for c in folded if c.isalnum()]
    latin = re.sub(r"[^a-z0-9_]+", "-", "".join(c for c in folded if not unicodedata.combining(c)))
    latin = latin.strip("-_")[:MAX_SLUG_LENGTH].rstrip("-_")
    if latin and all(c.isascii() for c in letters):
        return latin
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{latin[: MAX_SLUG_LENGTH - 9].rstrip('-_') or 'voice'}-{digest}"


def first_free(base: str, taken: set[str]) -> str:
    """`base`, or `base-2`, `base-3`, ... whichever is not taken."""
    candidate, number = base, 1
    while candidate in taken:
        number += 1
        candidate = f"{base}-{number}"
    return candidate


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in JOINERS
