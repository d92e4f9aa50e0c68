from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosy_engine.errors import InvalidRequestError, VoiceNotFoundError
from cosy_engine.ui.visitors import KEPT_DAYS, MOST_VOICES, remove_unused, stores_of, welcome
from cosy_engine.voices.store import VoiceStore
from tests.voices.helpers import make_prompt


@pytest.fixture
def engine(tmp_path: Path) -> SimpleNamespace:
    store = VoiceStore(tmp_path, "a fingerprint")
    return SimpleNamespace(settings=SimpleNamespace(voices_dir=tmp_path), voices=store)


def names(store: VoiceStore) -> list[str]:
    return [voice.name for voice in store.list()]


def test_a_visitor_finds_the_voices_again_and_others_do_not(engine: SimpleNamespace, tmp_path: Path) -> None:
    mine, yours = welcome(None), welcome(None)
    stores_of(engine, shared=False)(mine).enroll("Ann", make_prompt())
    again = stores_of(engine, shared=False)
    assert names(again(mine)) == ["Ann"]
    assert names(again(yours)) == names(again(None)) == names(engine.voices) == []
    with pytest.raises(VoiceNotFoundError):
        again(yours).get("ann")
    assert mine not in str(list(tmp_path.rglob("*")))


def test_all_share_the_voices_of_a_shared_page(engine: SimpleNamespace) -> None:
    store_of = stores_of(engine, shared=True)
    store_of(welcome(None)).enroll("Ann", make_prompt())
    assert names(store_of(welcome(None))) == names(engine.voices) == ["Ann"]


def test_a_key_stays_and_a_bad_one_is_replaced(engine: SimpleNamespace, tmp_path: Path) -> None:
    key = welcome(None)
    assert welcome(key) == key
    for bad in (None, "", "short", "../" * 20, 7, ["x" * 43], "ä" * 43):
        made = welcome(bad)
        assert made != bad and len(made) == 43
        stores_of(engine, shared=False)(bad).enroll("Ann", make_prompt())
    assert all(path.is_relative_to(tmp_path / "visitors") for path in tmp_path.rglob("*.safetensors"))


def test_a_visitor_saves_only_so_many_voices(engine: SimpleNamespace) -> None:
    store = stores_of(engine, shared=False)(welcome(None))
    for number in range(MOST_VOICES):
        store.enroll(f"Voice {number}", make_prompt())
    with pytest.raises(InvalidRequestError, match="delete one first"):
        store.enroll("One more", make_prompt())
    store.delete("voice-0")
    store.enroll("One more", make_prompt())


def test_voices_of_those_who_stay_away_are_removed(engine: SimpleNamespace, tmp_path: Path) -> None:
    here, away = welcome(None), welcome(None)
    store_of = stores_of(engine, shared=False)
    for key in (here, away):
        store_of(key).enroll("Ann", make_prompt())
    long_ago = time.time() - (KEPT_DAYS + 1) * 86400
    for key in (here, away):
        os.utime(store_of(key).folder, (long_ago, long_ago))
    store_of(here)
    remove_unused(tmp_path / "visitors")
    assert names(store_of(here)) == ["Ann"]
    assert names(store_of(away)) == []
