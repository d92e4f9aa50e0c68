from __future__ import annotations

from pathlib import Path

import pytest

from cosy_engine.checkpoint import default
from cosy_engine.errors import ModelDirectoryError


def test_the_embedded_model_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_EMBEDDED", tmp_path)
    assert default.default_model_dir() == tmp_path
    assert default.is_embedded(tmp_path) and not default.is_standin(tmp_path)
    assert not default.is_embedded(tmp_path / "another")


def test_the_standin_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_EMBEDDED", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = default.default_model_dir()
    written = (first / "llm.pt").stat().st_mtime_ns
    assert default.is_standin(first)
    assert default.default_model_dir() == first
    assert (first / "llm.pt").stat().st_mtime_ns == written
    assert [entry.name for entry in first.parent.iterdir()] == [first.name]


def test_without_either_the_ways_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_EMBEDDED", tmp_path / "none")
    monkeypatch.setattr(default, "_STANDIN_SCRIPT", tmp_path / "none.py")
    with pytest.raises(ModelDirectoryError, match="--model-dir"):
        default.default_model_dir()
