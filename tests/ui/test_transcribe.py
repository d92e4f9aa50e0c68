from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cosy_engine.ui import transcribe
from cosy_engine.ui.transcribe import find_transcriber

PACKAGES = ("funasr", "faster_whisper", "whisper")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transcribe, "find_spec", lambda name: sys.modules.get(name))
    monkeypatch.setattr(transcribe, "_CACHE", tmp_path)
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    for name in PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def no_model(*_: object, **options: object) -> str:
    assert options.get("local_files_only") is True, "it would download"
    raise RuntimeError("not on the disk")


def test_nothing_installed_is_no_transcriber() -> None:
    assert find_transcriber() is None


def test_a_package_without_its_model_is_no_transcriber(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "funasr", AutoModel=no_model)
    install(monkeypatch, "faster_whisper", download_model=no_model, WhisperModel=no_model)
    install(monkeypatch, "whisper", load_model=no_model)
    assert find_transcriber() is None


def test_a_broken_package_is_no_transcriber(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "whisper", __getattr__=no_model)
    monkeypatch.setattr(transcribe, "import_module", lambda name: 1 / 0)
    assert find_transcriber() is None


def test_funasr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "modelscope" / "hub" / "models" / "iic" / "SenseVoiceSmall"
    folder.mkdir(parents=True)
    (folder / "model.pt").touch()

    def load(model: str, **_: object) -> SimpleNamespace:
        assert model == str(folder)
        return SimpleNamespace(generate=lambda input, **_: [{"text": f"<|zh|><|NEUTRAL|>你好 {input}"}])

    install(monkeypatch, "funasr", AutoModel=load)
    assert find_transcriber()("a.wav") == "你好 a.wav"


def test_faster_whisper_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Model:
        def __init__(self, folder: str) -> None:
            loaded.append(folder)

        def transcribe(self, path: str) -> tuple[list[SimpleNamespace], None]:
            return [SimpleNamespace(text=" Hello"), SimpleNamespace(text=" there.")], None

    install(
        monkeypatch,
        "faster_whisper",
        WhisperModel=Model,
        download_model=lambda size, local_files_only: "/models/base" if size == "base" else no_model(),
    )
    transcriber = find_transcriber()
    assert loaded == []
    assert transcriber("a.wav") == transcriber("b.wav") == "Hello there."
    assert loaded == ["/models/base"]


def test_whisper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "small.pt").touch()
    model = SimpleNamespace(transcribe=lambda path: {"text": f" Heard {path}"})
    install(monkeypatch, "whisper", load_model=lambda file: model if Path(file).is_file() else None)
    assert find_transcriber()("a.wav") == "Heard a.wav"
