from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosy_engine.checkpoint.read_yaml import Call, read_config
from cosy_engine.errors import ModelDirectoryError, UnsafeModelError


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "cosyvoice2.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


@pytest.mark.parametrize("name", ["cosyvoice2.yaml", "cosyvoice3.yaml", "cosyvoice2.early.yaml"])
def test_the_published_files_read(published_dir: Path, name: str) -> None:
    config = read_config(published_dir / name)
    assert config["sample_rate"] == 24000
    assert config["flow"].kwargs["spk_embed_dim"] == 192
    assert config["flow"].kwargs["decoder"].kwargs["cfm_params"]["sigma_min"] == 1e-6
    assert config["hift"].kwargs["resblock_dilation_sizes"] == [[1, 3, 5]] * 3
    assert config["feat_extractor"].kwargs["hop_size"] == 480
    assert config["tokenize"].kwargs["get_tokenizer"].name == "cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer"


def test_arithmetic_and_lists_of_the_published_files(published_dir: Path) -> None:
    config = read_config(published_dir / "cosyvoice3.yaml")
    estimator = config["flow"].kwargs["decoder"].kwargs["estimator"]
    assert estimator.name == "cosyvoice.flow.DiT.dit.DiT"
    assert estimator.kwargs["static_chunk_size"] == 50
    assert config["feat_extractor"].kwargs["fmax"] is None
    assert config["data_pipeline"][0] == Call("cosyvoice.dataset.processor.parquet_opener")
    assert config["train_conf"]["optim_conf"]["lr"] == 1e-5
    assert config["hifigan"].kwargs["generator"] == config["hift"]


def test_plain_values(tmp_path: Path) -> None:
    text = "a: 1\nb: -0.5\nc: 1e-06\nd: 'x y'\ne: null\nf: [True, false]\ng: {h: ''}\ni: 2024-01-01\n"
    expected = {"a": 1, "b": -0.5, "c": 1e-6, "d": "x y", "e": None, "f": [True, False], "g": {"h": ""}}
    assert read(tmp_path, text) == {**expected, "i": "2024-01-01"}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("<a> * <b>", 50),
        ("<a> + <b> - 1", 26),
        ("<a> / <b>", 12.5),
        ("<a> // <b>", 12),
        ("<a> % <b>", 1),
        ("-(<a>)", -25),
    ],
)
def test_arithmetic(tmp_path: Path, expression: str, value: float) -> None:
    assert read(tmp_path, f"a: 25\nb: 2\nc: !ref {expression}\n")["c"] == value


def test_references_reach_keys_that_come_later(tmp_path: Path) -> None:
    assert read(tmp_path, "a: !ref <b>\nb: [1, !ref <c>]\nc: x\n")["a"] == [1, "x"]


def test_the_seeds_are_read_and_not_called(tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    names = ("random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed_all")
    config = read(tmp_path, "".join(f"__set_seed{i}: !apply:{name} [1986]\n" for i, name in enumerate(names)))
    assert list(config.values()) == [[1986]] * 4
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


MALICIOUS = {
    "an unknown class": "x: !new:subprocess.Popen\n    args: [touch, {mark}]",
    "an unknown function": "x: !name:os.system\n    command: touch {mark}",
    "a call": "x: !apply:os.system ['touch {mark}']",
    "a call with a seed's ending": "x: !apply:os.random.seed [1]",
    "a call of a known class": "x: !apply:cosyvoice.llm.llm.Qwen2LM [1]",
    "a call inside a known class": "x: !new:cosyvoice.llm.llm.Qwen2LM\n    llm: !apply:os.system ['touch {mark}']",
    "a call inside a seed": "x: !apply:random.seed [!apply:os.system ['touch {mark}']]",
    "a call inside a list of a mapping": "x: {{a: [[!new:os.system {{}}]]}}",
    "a call as a key": "? !apply:os.system ['touch {mark}']\n: 1",
    "a python tag": "x: !!python/object/apply:os.system ['touch {mark}']",
    "a python tag with one mark": "x: !python/object/apply:os.system ['touch {mark}']",
    "a python module": "x: !!python/module:os",
    "a python name": "x: !!python/name:os.system",
    "a python tag by its full name": "x: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch {mark}']",
    "a python tag behind a directive": "%TAG !e! tag:yaml.org,2002:python/\n---\nx: !e!object/apply:os.system ['a']",
    "an escaped name": "x: !new:os%2Esystem {{}}",
    "an include": "x: !include:other.yaml",
    "an include with a value": "x: !include other.yaml",
    "a module": "x: !module:os",
    "a call of a reference": "f: 1\nx: !applyref:f [1]",
    "a copy": "f: 1\nx: !copy <f>",
    "a tag on the whole file": "!new:os.system\nx: 1",
    "an object hidden in DictConfig": "x: !new:omegaconf.DictConfig\n    content: !apply:os.getcwd []",
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_what_asks_for_code_is_refused_and_not_run(tmp_path: Path, what: str) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(UnsafeModelError):
        read(tmp_path, MALICIOUS[what].format(mark=mark))
    assert not mark.exists()


def test_the_refusal_says_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(UnsafeModelError, match=r"cosyvoice2.yaml, line 2: .*`os.system`.*nothing of it was run"):
        read(tmp_path, "a: 1\nb: !apply:os.system ['true']\n")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "<a>.__class__",
        "<a>[0]",
        "<a> ** <a>",
        "<a> << 60",
        "<a> if <a> else <a>",
        "[<a> for _ in <b>]",
        "<a> / 0",
        "<a> * 1e308 * 1e308",
        "<s> * <a>",
        "<list> * <a>",
        "<a> + True",
        "<missing> * 2",
        "<missing>",
        "<x>",
        "",
    ],
)
def test_arithmetic_is_nothing_but_arithmetic(tmp_path: Path, expression: str) -> None:
    with pytest.raises(ModelDirectoryError, match="cosyvoice2.yaml, line 4"):
        read(tmp_path, f"a: 3\ns: text\nlist: [1]\nx: !ref '{expression.replace(chr(39), chr(39) * 2)}'\n")


def _doubling(make: str, levels: int = 60) -> str:
    return "a0: [1]\n" + "".join(f"a{i + 1}: {make.format(i=i)}\n" for i in range(levels))


@pytest.mark.parametrize(
    "text",
    [
        _doubling("[!ref <a{i}>, !ref <a{i}>]"),
        "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)),
        "a: &a [*a]",
        "a: !ref <b>\nb: !ref <a>",
        "a0: 10\n" + "".join(f"a{i + 1}: !ref <a{i}> * <a{i}>\n" for i in range(30)),
        "a: " + "[" * 2000 + "]" * 2000,
        "a: !ref " + "(" * 5000 + "1" + ")" * 5000,
        "a: !ref " + "-" * 5000 + "1",
        "a: " + "x" * 300_000,
    ],
    ids=["references", "aliases", "alias of itself", "circle", "squares", "nesting", "brackets", "signs", "size"],
)
def test_bombs_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelDirectoryError):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["", "- 1\n", "a: [1\n", "a: 1\na: 2\n", "a: 1\n---\nb: 2\n", "a: \x00\n", "a: !!int x\n"]
)
def test_what_is_no_configuration_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelDirectoryError, match="cosyvoice2.yaml"):
        read(tmp_path, text)


def test_bytes_that_are_not_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cosyvoice2.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ModelDirectoryError):
        read_config(path)
