"""The two ONNX models of a directory, with graphs small enough to know their answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from cosy_engine.audio.speaker_encoder import SpeakerEncoder
from cosy_engine.audio.speech_tokenizer import SpeechTokenizer
from cosy_engine.errors import ModelDirectoryError
from tests.recordings import hum

CPU = torch.device("cpu")


def save(path: Path, nodes: list[onnx.NodeProto], inputs: list, output: onnx.ValueInfoProto) -> Path:
    graph = helper.make_graph(nodes, "tiny", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def length_echo(tmp_path: Path) -> Path:
    """A speech tokenizer with unusual input names whose only code is the length that it was given."""
    inputs = [
        helper.make_tensor_value_info("first", TensorProto.FLOAT, [1, 128, "frames"]),
        helper.make_tensor_value_info("second", TensorProto.INT32, [1]),
    ]
    node = helper.make_node("Identity", ["second"], ["codes"])
    return save(tmp_path / "t.onnx", [node], inputs, helper.make_tensor_value_info("codes", TensorProto.INT32, [1]))


def test_inputs_go_by_position_and_the_length_is_that_of_the_features(length_echo: Path) -> None:
    tokens = SpeechTokenizer(length_echo, CPU)(hum(2))
    assert tokens.dtype == torch.int32 and tokens.tolist() == [200]


def test_more_than_thirty_seconds_are_read_in_equal_parts(length_echo: Path) -> None:
    assert SpeechTokenizer(length_echo, CPU)(hum(30)).tolist() == [3000]
    assert SpeechTokenizer(length_echo, CPU)(hum(70)).tolist() == [2333, 2333, 2333]


def test_the_mean_over_time_is_taken_off_the_filter_bank(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "frames", 80])]
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)
    path = save(tmp_path / "s.onnx", [node], inputs, helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 80]))
    embedding = SpeakerEncoder(path, CPU)(hum(1))
    assert embedding.shape == (80,) and embedding.dtype == torch.float32
    assert embedding.abs().max() < 1e-4


def test_standin_models(standin_v2: Path) -> None:
    tokens = SpeechTokenizer(standin_v2 / "speech_tokenizer_v2.onnx", CPU)(hum(2))
    assert len(tokens) == 50 and 0 <= tokens.min() <= tokens.max() < 6561
    assert SpeakerEncoder(standin_v2 / "campplus.onnx", CPU)(hum(2)).shape == (192,)


def test_a_missing_or_broken_file_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelDirectoryError, match=r"campplus\.onnx is missing"):
        SpeakerEncoder(tmp_path / "campplus.onnx", CPU)
    (tmp_path / "campplus.onnx").write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ModelDirectoryError, match=r"campplus\.onnx is not an ONNX model"):
        SpeakerEncoder(tmp_path / "campplus.onnx", CPU)
    assert capfd.readouterr() == ("", "")
