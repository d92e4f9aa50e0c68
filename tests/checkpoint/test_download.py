from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosy_engine.checkpoint.download import NEEDED_FILES, resolve_model_dir
from cosy_engine.checkpoint.load import load_model
from cosy_engine.errors import ModelDirectoryError
from tests.checkpoint.hub_server import HubServer, serve_hub

NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(scope="module")
def hub(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Both hubs, with the stand-in and files that nobody needs as `iic/Tiny`."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(standin_v2, folder)
    (folder / "setup.py").write_text("raise SystemExit('ran')")
    (folder / "llm.rl.pt").write_bytes(b"not needed")
    (folder / "CosyVoice-BlankEN" / "model.safetensors").write_bytes(b"not needed")
    with serve_hub("iic/Tiny", folder) as server:
        yield server


@pytest.fixture(autouse=True)
def hubs_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file talks to the real hubs."""
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", NOWHERE)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "")


def test_an_existing_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model_dir(tmp_path) == tmp_path
    assert resolve_model_dir(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("variable", "model_id"),
    [
        ("HF_ENDPOINT", "hf:iic/Tiny"),
        ("MODELSCOPE_ENDPOINT", "iic/Tiny"),
        ("MODELSCOPE_ENDPOINT", "modelscope:iic/Tiny"),
    ],
)
def test_an_id_is_downloaded_and_loads(
    hub: HubServer, variable: str, model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, hub.url)
    hub.downloads.clear()
    directory = resolve_model_dir(model_id, cache_dir=tmp_path)
    assert load_model(directory).name == "cosyvoice2"
    assert hub.downloads <= set(NEEDED_FILES)
    assert {"cosyvoice2.yaml", "llm.pt", "flow.pt", "hift.pt", "campplus.onnx"} <= hub.downloads

    monkeypatch.setenv(variable, NOWHERE)
    assert resolve_model_dir(model_id, cache_dir=tmp_path).samefile(directory)


def test_org_names_choose_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="from ModelScope"):
        resolve_model_dir("iic/CosyVoice2-0.5B", cache_dir=tmp_path)
    with pytest.raises(ModelDirectoryError, match="from Hugging Face"):
        resolve_model_dir("FunAudioLLM/Fun-CosyVoice3-0.5B-2512", cache_dir=tmp_path)
    with pytest.raises(ModelDirectoryError, match="from ModelScope"):
        resolve_model_dir("modelscope:FunAudioLLM/Fun-CosyVoice3-0.5B-2512", cache_dir=tmp_path)


@pytest.mark.parametrize("model_id", ["iic/CosyVoice2-0.5B", "FunAudioLLM/CosyVoice2-0.5B"])
def test_offline_the_error_names_the_ways_out_and_nothing_else_is_printed(
    model_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ModelDirectoryError) as caught:
        resolve_model_dir(model_id, cache_dir=tmp_path)
    message = caught.value.message
    for way in (
        model_id,
        NOWHERE,
        "HF_ENDPOINT",
        "MODELSCOPE_ENDPOINT",
        "hf:",
        "modelscope:",
        "cosyvoice2.yaml",
        "llm.pt",
    ):
        assert way in message
    assert caught.value.__suppress_context__
    assert not caplog.records
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("model_id", ["hf:iic/Unknown", "modelscope:iic/Unknown"])
def test_an_unknown_id_says_so(hub: HubServer, model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    with pytest.raises(ModelDirectoryError, match="404") as caught:
        resolve_model_dir(model_id, cache_dir=tmp_path)
    assert "iic/CosyVoice2-0.5B" in caught.value.message


@pytest.mark.parametrize(
    "typo", ["CosyVoice2-0.5B", "/models/CosyVoice2-0.5B", "./pretrained/x/CosyVoice2", "hf:../x", ""]
)
def test_what_is_neither_a_directory_nor_an_id_lists_what_works(
    typo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelDirectoryError, match="does not exist") as caught:
        resolve_model_dir(typo or "nothing")
    assert "iic/CosyVoice2-0.5B" in caught.value.message
    assert caught.value.param == "model_dir"


def test_a_misspelt_name_in_an_existing_folder_is_not_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.raises(ModelDirectoryError, match="models/CosyVoice9 does not exist"):
        resolve_model_dir("models/CosyVoice9")


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "llm.pt"
    path.touch()
    with pytest.raises(ModelDirectoryError, match="is a file, not a directory"):
        resolve_model_dir(path)
