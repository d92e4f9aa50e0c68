from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cosy_engine.checkpoint.load import load_speech_lm
from cosy_engine.cli import app
from cosy_engine.errors import InvalidRequestError, ModelDirectoryError
from cosy_engine.speech_lm.vllm_export import export_model


@pytest.fixture
def model_dir(standin_v2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(standin_v2, tmp_path / "model"))


def stamp(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_mtime_ns


@pytest.mark.parametrize("version", [2, 3])
def test_an_export_holds_the_speech_lm(version: int, standin_v2: Path, standin_v3: Path, tmp_path: Path) -> None:
    source = standin_v2 if version == 2 else standin_v3
    out = export_model(source, tmp_path / "out")
    lm = load_speech_lm(source)
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    rows = {2: 6564, 3: 6761}[version]
    first_text = {2: 6566, 3: 6761}[version]
    text = lm.llm.model.model.embed_tokens.weight
    assert config["architectures"] == ["CosyVoice2ForCausalLM"]
    assert config["vocab_size"] == len(weights["model.embed_tokens.weight"]) == first_text + len(text)
    assert torch.equal(weights["model.embed_tokens.weight"][:rows], lm.speech_embedding.weight)
    assert torch.equal(weights["model.embed_tokens.weight"][first_text:], text)
    assert weights["lm_head.weight"].shape == (rows, 64)
    assert ("lm_head.bias" in weights) == (version == 2)
    layers = {name for name in weights if name.startswith("model.layers.")}
    assert layers == {f"model.{name}" for name, _ in lm.llm.model.model.layers.named_parameters(prefix="layers")}


def test_an_export_is_reused_until_the_source_changes(model_dir: Path, tmp_path: Path) -> None:
    out = export_model(model_dir, tmp_path / "out")
    first = stamp(out)
    assert export_model(model_dir, out) == out
    assert stamp(out) == first

    state = torch.load(model_dir / "llm.pt", weights_only=True)
    state["llm_decoder.bias"] += 1.0
    torch.save(state, model_dir / "llm.pt")
    export_model(model_dir, out)
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.bias"], state["llm_decoder.bias"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "model", "out"]


def test_without_a_name_it_goes_to_the_cache_folder(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = export_model(model_dir)
    assert out.is_relative_to(tmp_path / "cache" / "cosy_engine")
    assert export_model(Path(os.path.relpath(model_dir))) == out
    assert not (model_dir / "vllm").exists()


def test_a_failed_export_leaves_what_was_there(model_dir: Path, tmp_path: Path) -> None:
    out = export_model(model_dir, tmp_path / "out")
    first = stamp(out)
    (model_dir / "llm.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelDirectoryError):
        export_model(model_dir, out)
    assert stamp(out) == first
    with pytest.raises(ModelDirectoryError):
        export_model(model_dir, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_with_something_else_is_left_alone(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("rain")
    with pytest.raises(InvalidRequestError, match="diary"):
        export_model(model_dir, tmp_path / "diary")
    assert (tmp_path / "diary" / "today.txt").read_text() == "rain"


def test_command(standin_v3: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export-vllm", str(standin_v3), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert str(tmp_path / "out") in result.stdout
