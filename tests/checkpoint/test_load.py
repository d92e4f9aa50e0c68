from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from cosy_engine.audio.features import MelSettings
from cosy_engine.checkpoint.load import load_model
from cosy_engine.errors import ModelDirectoryError, UnsafeModelError
from cosy_engine.speech_lm.sampling import SamplingSettings
from tests.standin import write_standin


@pytest.fixture
def directory(standin_v2: Path, tmp_path: Path) -> Path:
    """A copy of the CosyVoice2 stand-in, to be changed."""
    return Path(shutil.copytree(standin_v2, tmp_path / "model"))


def mel_of(model: object, tokens: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, 6561, (1, tokens), generator=generator)
    return model.flow.inference(
        token, token[:, :4], torch.zeros(1, 8, 80), torch.ones(1, 192), streaming=False, finalize=True
    )


@pytest.mark.parametrize(("name", "fmax"), [("cosyvoice2", 8000), ("cosyvoice3", None)])
def test_a_directory_loads(request: pytest.FixtureRequest, name: str, fmax: int | None) -> None:
    directory = request.getfixturevalue(f"standin_v{name[-1]}")
    model = load_model(directory)
    assert (model.name, model.sample_rate, model.directory) == (name, 24000, directory)
    assert model.mel == MelSettings(fmax=fmax)
    assert model.sampling == SamplingSettings()
    assert model.allowed_special == "all"
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.tokenizer_dir == directory / "CosyVoice-BlankEN"
    assert model.speech_tokenizer_path.name == f"speech_tokenizer_v{name[-1]}.onnx"
    assert model.speaker_encoder_path.name == "campplus.onnx"
    for module in (model.lm, model.flow, model.hift):
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    with torch.inference_mode():
        mel = mel_of(model)
        speech, _ = model.hift.inference(mel)
    assert mel.shape == (1, 80, 16) and speech.shape == (1, 16 * 480)
    assert 0.01 < speech.std() < 1


def test_the_vocoder_has_plain_weights_and_the_values_of_the_file(standin_v3: Path) -> None:
    hift = load_model(standin_v3).hift
    assert not [name for name, _ in hift.named_parameters() if "parametrizations" in name]
    file = torch.load(standin_v3 / "hift.pt", weights_only=True)
    direction = file["conv_post.parametrizations.weight.original1"]
    length = file["conv_post.parametrizations.weight.original0"]
    torch.testing.assert_close(hift.conv_post.weight, length * direction / direction.norm(dim=(1, 2), keepdim=True))


def test_half_precision_leaves_the_vocoder_alone(standin_v2: Path) -> None:
    model = load_model(standin_v2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.lm.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.flow.parameters()} == {torch.bfloat16}
    assert model.hift.conv_post.weight.dtype == torch.float32


def test_safetensors_in_place_of_pt(directory: Path) -> None:
    from safetensors.torch import save_file

    for part in ("llm", "flow", "hift"):
        state = torch.load(directory / f"{part}.pt", weights_only=True)
        state.pop("llm.model.lm_head.weight", None)
        save_file(state, directory / f"{part}.safetensors")
        (directory / f"{part}.pt").unlink()
    model = load_model(directory)
    embedding = model.lm.llm.model.model.embed_tokens.weight
    assert torch.equal(model.lm.llm.model.lm_head.weight, embedding)


def test_the_early_yaml_is_filled_in(published_dir: Path, directory: Path) -> None:
    """The stand-in's weights do not fit the full-size networks; the report shows that these were asked for."""
    (directory / "cosyvoice2.yaml").unlink()
    shutil.copy(published_dir / "cosyvoice2.early.yaml", directory / "cosyvoice.yaml")
    with pytest.raises(ModelDirectoryError, match=r"llm_embedding.weight is \[2, 64\] instead of \[2, 896\]"):
        load_model(directory)


def test_the_early_file_name(directory: Path) -> None:
    (directory / "cosyvoice2.yaml").rename(directory / "cosyvoice.yaml")
    assert load_model(directory).name == "cosyvoice2"


def test_the_reinforcement_learned_weights_are_not_taken(directory: Path) -> None:
    (directory / "llm.rl.pt").write_bytes(b"never read")
    load_model(directory)


def test_everything_missing_is_named_at_once(directory: Path) -> None:
    gone = ["llm.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx", "CosyVoice-BlankEN/vocab.json"]
    for name in gone:
        (directory / name).unlink()
    (directory / "flow.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelDirectoryError) as caught:
        load_model(directory)
    assert all(name in caught.value.message for name in gone)
    assert "flow.pt (only a Git LFS pointer" in caught.value.message
    assert "merges.txt" not in caught.value.message


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="neither cosyvoice2.yaml nor cosyvoice3.yaml"):
        load_model(tmp_path)


def test_a_configuration_of_the_other_generation_is_refused(standin_v3: Path, directory: Path) -> None:
    shutil.copy(standin_v3 / "cosyvoice3.yaml", directory / "cosyvoice2.yaml")
    with pytest.raises(ModelDirectoryError, match="CosyVoice3LM"):
        load_model(directory)


def test_weights_of_the_other_generation_are_reported_by_file(standin_v3: Path, directory: Path) -> None:
    for part in ("llm", "flow", "hift"):
        shutil.copy(standin_v3 / f"{part}.pt", directory)
    with pytest.raises(ModelDirectoryError) as caught:
        load_model(directory)
    for line in ("llm.pt: 2 missing: llm_embedding.weight", "llm.pt: 2 of another shape", "flow.pt: ", "hift.pt: "):
        assert line in caught.value.message


@pytest.mark.parametrize("section", ["feat_extractor", "sampling"])
def test_settings_that_make_no_sense_are_an_error(directory: Path, section: str) -> None:
    path = directory / "cosyvoice2.yaml"
    text = path.read_text()
    path.write_text(
        text.replace("feat_extractor:", "other:") if section == "feat_extractor" else text.replace("0.8", "8")
    )
    with pytest.raises(ModelDirectoryError, match=section):
        load_model(directory)


@pytest.mark.parametrize("pause", ["-1", "3600", "true", "soon"])
def test_a_pause_that_makes_no_sense_is_an_error(directory: Path, pause: str) -> None:
    with (directory / "cosyvoice2.yaml").open("a") as file:
        file.write(f"\npause_after_text: {pause}\n")
    with pytest.raises(ModelDirectoryError, match="pause_after_text"):
        load_model(directory)


@pytest.mark.parametrize(("line", "expected"), [("", True), ("\ncontinues_recordings: false\n", False)])
def test_a_directory_may_say_that_its_speech_lm_does_not_continue_prompts(
    directory: Path, line: str, expected: bool
) -> None:
    with (directory / "cosyvoice2.yaml").open("a") as file:
        file.write(line)
    assert load_model(directory).continues_recordings is expected


def test_whether_prompts_are_continued_is_yes_or_no(directory: Path) -> None:
    with (directory / "cosyvoice2.yaml").open("a") as file:
        file.write("\ncontinues_recordings: 3\n")
    with pytest.raises(ModelDirectoryError, match="continues_recordings"):
        load_model(directory)


def test_a_configuration_with_a_call_is_refused_and_nothing_runs(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with (directory / "cosyvoice2.yaml").open("a") as file:
        file.write(f"\nextra: !apply:os.system ['touch {mark}']\n")
    with pytest.raises(UnsafeModelError, match="os.system"):
        load_model(directory)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["llm", "flow", "hift"])
def test_weights_that_need_code_are_refused_and_nothing_runs(directory: Path, tmp_path: Path, part: str) -> None:
    from tests.checkpoint.test_weights import Runs

    mark = tmp_path / "ran"
    torch.save({"weight": Runs(mark)}, directory / f"{part}.pt")
    with pytest.raises(UnsafeModelError, match=f"{part}.pt"):
        load_model(directory)
    assert not mark.exists()


def test_python_files_of_the_directory_are_not_run(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name in ("modeling.py", "cosyvoice.py", "CosyVoice-BlankEN/tokenization.py", "CosyVoice-BlankEN/__init__.py"):
        (directory / name).write_text(f"open({str(mark)!r}, 'w')")
    config = directory / "CosyVoice-BlankEN" / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoConfig": "modeling.Evil"},', 1))
    load_model(directory)
    assert not mark.exists()


def test_the_fingerprint_is_that_of_the_front_end(directory: Path, standin_v2: Path, standin_v3: Path) -> None:
    own = load_model(directory).fingerprint
    assert own == load_model(standin_v2).fingerprint
    assert own != load_model(standin_v3).fingerprint
    other = write_standin(directory.parent / "other", "cosyvoice2", seed=1)
    assert own != load_model(other).fingerprint
    (directory / "llm.pt").write_bytes((other / "llm.pt").read_bytes())
    assert own == load_model(directory).fingerprint
    (directory / "campplus.onnx").write_bytes((other / "campplus.onnx").read_bytes())
    assert own != load_model(directory).fingerprint


def test_loading_is_logged(standin_v2: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cosy_engine"):
        load_model(standin_v2)
    assert [record.args[0] for record in caplog.records] == ["llm.pt", "flow.pt", "hift.pt"]
