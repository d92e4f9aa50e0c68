from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from cosy_engine.doctor import examine
from cosy_engine.errors import BackendUnavailableError
from cosy_engine.modules.streaming import init_state
from cosy_engine.token2wav import tensorrt_plan
from cosy_engine.token2wav.tensorrt_estimator import plan_of, source_hash
from cosy_engine.token2wav.tensorrt_plan import Gpu, Library, build_plan, cached_plan, find_library
from tests.modules.small_flow import small_estimator

L4, BLACKWELL, H200 = Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA RTX PRO 6000", (12, 0)), Gpu("NVIDIA H200", (9, 0))


@pytest.fixture(scope="module")
def rtx() -> Library:
    try:
        library = find_library(L4)
    except BackendUnavailableError:
        pytest.skip("TensorRT-RTX is not installed: pip install -r requirements-tensorrt-rtx.txt")
    if not library.is_rtx:
        pytest.skip(f"{library} takes the place of TensorRT-RTX and builds only where there is a GPU")
    return library


def _onnx(path: Path, *nodes: NodeProto, **constants: np.ndarray) -> Path:
    """A network from x `[batch, 4]` to y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "network", [x], [y], values), opset_imports=opsets), path)
    return path


def _relu(path: Path) -> None:
    _onnx(path, helper.make_node("Relu", ["x"], ["y"]))


@pytest.mark.tensorrt
@pytest.mark.parametrize("options", [("whole",), ("chunked", "--fp16"), ("cached",)], ids=" ".join)
def test_builds_what_is_exported(rtx: Library, options: tuple[str, ...], exported: Callable[..., Path]) -> None:
    path = exported(*options)
    weights = sum(numpy_helper.to_array(weight).nbytes for weight in onnx.load(path).graph.initializer)
    for gpu in (L4, BLACKWELL):
        assert len(build_plan(rtx, gpu, path)) > weights


@pytest.mark.tensorrt
def test_takes_the_published_file_as_it_is(rtx: Library, exported: Callable[..., Path], tmp_path: Path) -> None:
    published = onnx.load(exported("whole"))
    for value in (*published.graph.input, *published.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2  # the published file knows one request only
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    onnx.save(published, model_dir / "flow.decoder.estimator.fp32.onnx")
    nothing_to_export = nn.Linear(1, 1)
    assert plan_of(nothing_to_export, "whole", rtx, L4, tmp_path / "plans", model_dir).is_file()


@pytest.mark.tensorrt
def test_names_the_layer_that_cannot_be_read(rtx: Library, tmp_path: Path) -> None:
    unknown = helper.make_node("Mystery", ["x"], ["y"], name="the_unknown_one", domain="elsewhere")
    with pytest.raises(BackendUnavailableError, match=r"'the_unknown_one' \(Mystery\)"):
        build_plan(rtx, L4, _onnx(tmp_path / "unknown.onnx", unknown))


@pytest.mark.tensorrt
def test_names_the_layer_that_cannot_be_built(rtx: Library, tmp_path: Path) -> None:
    impossible = helper.make_node("Reshape", ["x", "shape"], ["y"], name="the_impossible_one")
    with pytest.raises(BackendUnavailableError, match="the_impossible_one"):
        build_plan(rtx, L4, _onnx(tmp_path / "impossible.onnx", impossible, shape=np.array([7, 3])))


@pytest.mark.tensorrt
def test_a_plan_is_built_once_and_again_when_what_it_depends_on_changes(rtx: Library, tmp_path: Path) -> None:
    written: list[Path] = []

    def write(path: Path) -> None:
        written.append(path)
        _relu(path)

    newer = ModuleType("newer")
    newer.__dict__.update(vars(rtx.module), __version__="99.0")
    cases = [
        (rtx, L4, "flow.fp32", b"weights"),
        (rtx, BLACKWELL, "flow.fp32", b"weights"),
        (rtx, L4, "flow.fp16", b"weights"),
        (rtx, L4, "flow.fp32", b"other weights"),
        (Library(rtx.name, newer), L4, "flow.fp32", b"weights"),
    ]
    plans = [cached_plan(*case, tmp_path, write) for case in cases]
    assert len(set(plans)) == len(written) == len(cases)
    before = [(plan.read_bytes(), plan.stat().st_mtime_ns) for plan in plans]
    assert [cached_plan(*case, tmp_path, write) for case in cases] == plans
    assert [(plan.read_bytes(), plan.stat().st_mtime_ns) for plan in plans] == before
    assert len(written) == len(cases)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", *(plan.name for plan in plans)}
    for part in ("flow.fp32", "nvidia-l4", "tensorrt-rtx", rtx.module.__version__):
        assert part in plans[0].name


@pytest.mark.tensorrt
def test_a_failed_build_leaves_nothing_and_is_tried_again(rtx: Library, tmp_path: Path) -> None:
    def write_nonsense(path: Path) -> None:
        path.write_bytes(b"nonsense")

    arguments = (rtx, L4, "flow.fp32", b"weights", tmp_path)
    with pytest.raises(BackendUnavailableError, match="cannot read"):
        cached_plan(*arguments, write_nonsense)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert cached_plan(*arguments, _relu).is_file()


@pytest.mark.tensorrt
def test_rtx_tells_which_gpu_it_does_not_know(rtx: Library) -> None:
    with pytest.raises(BackendUnavailableError, match=r"does not run on NVIDIA H200 \(compute capability 9.0\)"):
        find_library(H200)


@pytest.mark.tensorrt
def test_doctor_reports_the_library(rtx: Library) -> None:
    assert str(rtx) in _doctors_finding()


def test_doctor_and_error_tell_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plan, "_MODULES", {"TensorRT": ("no_such_module",)})
    with pytest.raises(BackendUnavailableError, match="pip install -r requirements-tensorrt-rtx.txt") as raised:
        find_library(L4)
    assert raised.value.message == _doctors_finding()


@pytest.mark.parametrize("version", ["cosyvoice2", "cosyvoice3"])
def test_the_source_hash_follows_weights_and_sizes(version: str) -> None:
    estimator = small_estimator(version)
    before = source_hash(estimator)
    init_state(estimator, 2, *next((weight.device, weight.dtype) for weight in estimator.parameters()))
    assert source_hash(estimator) == before
    estimator.static_chunk_size = 25
    assert source_hash(estimator) != before
    estimator.static_chunk_size = 50
    weight = list(estimator.parameters())[-1]
    weight.data.view(-1)[-1] += 1e-3
    assert source_hash(estimator) != before


def _doctors_finding() -> str:
    return next(finding.detail for finding in examine() if finding.name == "tensorrt backend")
