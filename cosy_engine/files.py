"""Files that are there completely or not at all, and a lock between processes."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again: `$XDG_CACHE_HOME/cosy_engine`, which is in `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosy_engine"


def stage(path: Path, data: bytes) -> Path:
    """Write `data` under a hidden temporary name beside `path`, down to the disk; `publish` makes it `path`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a staged file its name, replacing what was there, in one step."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file; whoever reads `path` sees the old content or the new, never a part."""
    temporary = stage(path, data)
    try:
        publish(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock; it goes with the process that holds it.

    Raises:
        BlockingIOError: somebody else holds it and `wait` is off.
    """
    with open(folder / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
