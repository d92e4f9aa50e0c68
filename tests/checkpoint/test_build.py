from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cosy_engine.checkpoint.build import CLASSES, build_modules, empty_parameters, with_early_defaults
from cosy_engine.checkpoint.read_yaml import KNOWN_NAMES, MODEL_NAMES, Call, read_config
from cosy_engine.errors import ModelDirectoryError


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cosyvoice2.yaml", [505.8, 112.5, 20.8]),
        ("cosyvoice2.early.yaml", [505.8, 112.5, 20.8]),
        ("cosyvoice3.yaml", [506.1, 332.3, 20.8]),
    ],
)
def test_published_parameter_counts(published_dir: Path, name: str, millions: list[float]) -> None:
    config = with_early_defaults(read_config(published_dir / name))
    with empty_parameters():
        modules = build_modules(config, published_dir)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    assert [round(count / 1e6, 1) for count in counts] == millions


def test_the_early_release_streams_like_the_later_one(published_dir: Path) -> None:
    with empty_parameters():
        flows = [
            build_modules(with_early_defaults(read_config(published_dir / name)), published_dir)[1]
            for name in ("cosyvoice2.early.yaml", "cosyvoice2.yaml")
        ]
    early, later = flows
    assert early.state_dict().keys() == later.state_dict().keys()
    assert early.chunk_size == later.chunk_size == 25
    assert early.decoder.estimator.static_chunk_size == later.decoder.estimator.static_chunk_size == 50


def test_every_model_name_of_the_allow_list_has_a_class() -> None:
    assert set(CLASSES) == MODEL_NAMES <= KNOWN_NAMES


def config_of(directory: Path) -> dict[str, Any]:
    return read_config(next(directory.glob("*.yaml")))


def test_the_text_model_comes_from_the_directory_whatever_the_file_says(standin_v2: Path) -> None:
    config = config_of(standin_v2)
    config["llm"].kwargs["llm"].kwargs["pretrain_path"] = "/somewhere/else"
    with empty_parameters():
        lm, _, _ = build_modules(config, standin_v2)
    assert lm.llm.model.config.hidden_size == 64


def test_training_switches_of_other_releases_are_accepted(standin_v2: Path) -> None:
    config = config_of(standin_v2)
    config["flow"].kwargs["encoder"].kwargs["use_dynamic_chunk"] = True
    with empty_parameters():
        build_modules(config, standin_v2)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("flow", None, "no `flow: !new:...` section"),
        ("hift", Call("cosyvoice.hifigan.hifigan.HiFiGan"), "no place"),
        ("flow", Call("cosyvoice.flow.flow.CausalMaskedDiffWithDiT", {"colour": 1}), "CausalMaskedDiffWithDiT.*colour"),
        ("flow", Call("cosyvoice.flow.DiT.dit.DiT", {"dim": 64}), "`flow` cannot be a DiT"),
        ("hift", Call("cosyvoice.hifigan.generator.HiFTGenerator", {"base_channels": "x"}), "HiFTGenerator"),
    ],
)
def test_a_configuration_that_fits_no_model_is_an_error(
    standin_v2: Path, part: str, value: object, message: str
) -> None:
    with empty_parameters(), pytest.raises(ModelDirectoryError, match=message):
        build_modules(config_of(standin_v2) | {part: value}, standin_v2)


def test_empty_parameters_are_those_of_this_thread_inside_only() -> None:
    elsewhere: list[nn.Module] = []
    with empty_parameters():
        here = nn.Linear(2, 3)
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(2, 3)))
        thread.start()
        thread.join()
    assert [parameter.device.type for parameter in here.parameters()] == ["meta", "meta"]
    assert torch.isfinite(elsewhere[0].weight).all()
    assert torch.isfinite(nn.Linear(2, 3).weight).all()


def test_empty_parameters_stay_tied_and_buffers_are_real(standin_v3: Path) -> None:
    with empty_parameters():
        lm, flow, _ = build_modules(config_of(standin_v3), standin_v3)
    assert lm.llm.model.lm_head.weight is lm.llm.model.model.embed_tokens.weight
    assert flow.decoder.rand_noise.std() > 0.9
