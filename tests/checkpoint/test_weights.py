from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosy_engine.checkpoint.build import empty_parameters
from cosy_engine.checkpoint.weights import Part, load_parts, load_state
from cosy_engine.errors import ModelDirectoryError, UnsafeModelError

CPU = torch.device("cpu")


class Runs:
    """An object whose unpickling would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.conv = weight_norm(nn.Conv1d(4, 4, 3))
        self.register_buffer("table", torch.arange(3.0))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def empty() -> Small:
    with empty_parameters():
        return Small()


def saved(state: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Small:
    module = empty()
    load_parts([Part(path, module, dtype)], CPU)
    return module


def assert_same(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)


@pytest.mark.parametrize("zipped", [True, False])
def test_pt_files_load(tmp_path: Path, zipped: bool) -> None:
    state = small().state_dict()
    torch.save(state, tmp_path / "flow.pt", _use_new_zipfile_serialization=zipped)
    assert_same(load(tmp_path / "flow.pt"), state)


def test_a_safetensors_file_names_a_tied_tensor_once(tmp_path: Path) -> None:
    state = small().state_dict()
    once = {name: value for name, value in state.items() if name != "head.weight"}
    module = load(saved(once, tmp_path / "flow.safetensors"))
    assert_same(module, state)
    assert module.head.weight.data_ptr() == module.embedding.weight.data_ptr()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_converted(tmp_path: Path, stored: torch.dtype) -> None:
    state = {name: value.to(stored) for name, value in small().state_dict().items()}
    assert_same(load(saved(state, tmp_path / "llm.pt")), {name: value.float() for name, value in state.items()})


def test_parameters_get_the_precision_asked_for_and_tables_keep_theirs(tmp_path: Path) -> None:
    module = load(saved(small().state_dict(), tmp_path / "llm.pt"), torch.float16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert module.table.dtype == torch.float32


def test_a_gan_checkpoint_gives_its_generator(tmp_path: Path) -> None:
    state = small().state_dict()
    gan = {f"generator.{name}": value for name, value in state.items()}
    gan |= {"discriminator.conv.weight": torch.ones(1), "epoch": 3, "step": 100}
    assert_same(load(saved(gan, tmp_path / "hift.pt")), state)


def test_older_names_of_weight_norm_load(tmp_path: Path) -> None:
    state = small().state_dict()
    old = dict(state)
    old["conv.weight_g"] = old.pop("conv.parametrizations.weight.original0")
    old["conv.weight_v"] = old.pop("conv.parametrizations.weight.original1")
    assert_same(load(saved(old, tmp_path / "hift.pt")), state)


def test_a_file_can_be_replaced_while_the_model_lives(tmp_path: Path) -> None:
    state = small().state_dict()
    path = saved(state, tmp_path / "llm.pt")
    module = load(path)
    path.write_bytes(b"")
    assert_same(module, state)


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    short = small().state_dict()
    del short["embedding.weight"], short["head.weight"]
    short["surplus"] = torch.ones(1)
    misshapen = small().state_dict() | {"conv.bias": torch.ones(9)}
    many = small().state_dict() | {f"extra.{i}": torch.ones(1) for i in range(40)}
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK\x03\x04 cut off")
    paths = [
        saved(short, tmp_path / "llm.pt"),
        saved(misshapen, tmp_path / "flow.pt"),
        saved(many, tmp_path / "hift.pt"),
        broken,
    ]
    with pytest.raises(ModelDirectoryError) as caught:
        load_parts([Part(path, empty(), torch.float32) for path in paths], CPU)
    message = caught.value.message
    assert "llm.pt: 1 missing: embedding.weight\n" in message
    assert "llm.pt: 1 unexpected: surplus\n" in message
    assert "flow.pt: 1 of another shape: conv.bias is [9] instead of [4]\n" in message
    assert "hift.pt: 40 unexpected: extra.0, " in message
    assert "and 35 more" in message
    assert "broken.pt is truncated or damaged" in message


def pickled(content: object, path: Path, how: str) -> None:
    if how == "torch":
        torch.save(content, path)
    elif how == "torch legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(how)))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "torch legacy", "0", "2", "4"])
def test_a_file_that_needs_code_is_refused_and_nothing_runs(tmp_path: Path, how: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "llm.pt"
    pickled({"weight": torch.ones(2), "payload": Runs(mark)}, path, how)
    with pytest.raises(UnsafeModelError, match="llm.pt"):
        load_state(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if how.startswith("torch") else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file was no threat, so the test showed nothing"


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "flow.pt")
    with pytest.raises(UnsafeModelError, match="torch.nn.modules.linear.Linear"):
        load_state(tmp_path / "flow.pt")


@pytest.mark.filterwarnings("ignore")  # torch announces the end of TorchScript
def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "flow.pt"))
    with pytest.raises(UnsafeModelError, match="TorchScript"):
        load_state(tmp_path / "flow.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["empty", "half", "noise", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = saved({"weight": torch.ones(1000)}, tmp_path / f"flow.{suffix}")
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "noise": bytes(range(256)) * 9, "text": b"<html>"}[damage]
    )
    with pytest.raises(ModelDirectoryError, match=f"flow.{suffix}"):
        load_state(path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}, torch.ones(1)])
def test_a_file_without_named_tensors_is_an_error(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "llm.pt")
    with pytest.raises(ModelDirectoryError, match="llm.pt"):
        load_state(tmp_path / "llm.pt")
