"""Whose voices a visitor of the page sees: a folder for each visitor, or one for all.

A visitor is known by a long random key that the server makes and the browser keeps. The folder's name is a hash of the
key, so that neither somebody who reads the folders nor somebody who makes up keys gets at the voices of others.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.voices.store import VoiceStore

logger = logging.getLogger(__name__)

MOST_VOICES = 50  # a visitor
KEPT_DAYS = 180  # since the visitor was last here
_FOLDER = "visitors"
_KEY_LENGTH = 43  # 32 random bytes in base 64

StoreOf = Callable[[str | None], VoiceStore]


def key_kept_by_browser() -> gr.BrowserState:
    """The visitor's key. Gradio gives the storage's secret to every browser, so it hides nothing: it only has to stay
    the same when the server starts again."""
    return gr.BrowserState(None, storage_key="cosy-engine-visitor", secret="cosy-engine")


def welcome(key: object) -> str:
    """The key that the browser has, or a new one."""
    return key if _is_key(key) else secrets.token_urlsafe(32)


def stores_of(engine: Engine, shared: bool) -> StoreOf:
    """From a visitor's key to the voices that this visitor may use and change."""
    if shared:
        return lambda key: engine.voices
    everybody = engine.settings.voices_dir / _FOLDER
    remove_unused(everybody)

    def store_of(key: str | None) -> VoiceStore:
        folder = everybody / hashlib.sha256(welcome(key).encode()).hexdigest()[:32]
        if folder.is_dir():
            os.utime(folder)
        return VoiceStore(folder, engine.voices.fingerprint, engine.voices.builtin, MOST_VOICES)

    return store_of


def remove_unused(everybody: Path) -> None:
    """Remove the folders of visitors who have not been here for long."""
    oldest = time.time() - KEPT_DAYS * 86400
    for folder in everybody.glob("*"):
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            logger.info("removing the voices of a visitor who has been away for %d days", KEPT_DAYS)
            shutil.rmtree(folder, ignore_errors=True)


def _is_key(key: object) -> bool:
    return isinstance(key, str) and len(key) == _KEY_LENGTH and key.isascii()
