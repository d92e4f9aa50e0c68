"""The flow's estimator on TensorRT, in the place of the PyTorch module.

Streams use the cached Euler step, whose state goes in and comes out as tensors; whole utterances use the estimator of
the published interface. What no plan is made for, or is longer than its profile, runs on PyTorch.
"""

from __future__ import annotations

import hashlib
import logging
import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import getfile
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from cosy_engine import metrics
from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import Settings
from cosy_engine.errors import BackendUnavailableError
from cosy_engine.files import cache_folder
from cosy_engine.modules import attention, key_values, streaming
from cosy_engine.modules.streaming import State, flatten_state, init_state, write_state
from cosy_engine.token2wav import onnx_export
from cosy_engine.token2wav.onnx_export import (
    NEXT_STATE,
    OUTPUT,
    PRECISIONS,
    STATE,
    Variant,
    export_estimator,
    file_name,
)
from cosy_engine.token2wav.tensorrt_plan import Gpu, Library, cached_plan, find_library, log_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16}
_ALIGNMENT = 256  # bytes, of every address that TensorRT is given
_TOLERANCE = 0.02  # of the velocity's norm; TF32 and float16 stay well below, other weights do not


class Pool(Generic[_T]):
    """Things that one thread at a time may use; who finds none idle waits for one."""

    def __init__(self, things: list[_T]) -> None:
        self._idle: queue.SimpleQueue[_T] = queue.SimpleQueue()
        for thing in things:
            self._idle.put(thing)

    @contextmanager
    def borrow(self) -> Iterator[_T]:
        thing = self._idle.get()
        try:
            yield thing
        finally:
            self._idle.put(thing)


class TensorRTEngine:
    """A plan on its GPU, with execution contexts that have a CUDA stream each.

    A call puts its work on a context's stream and returns; events order it after the caller's stream before it and
    before the caller's stream after it. Nothing waits on the host, so a context is idle again at once.

    Raises:
        BackendUnavailableError: the plan cannot be loaded on this GPU.
    """

    def __init__(self, library: Library, plan: Path, device: torch.device, contexts: int) -> None:
        trt = library.module
        self._device = device
        self._log = log_of(trt)
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if self._engine is None:
                raise BackendUnavailableError(
                    f"{library} cannot load {plan}: {'; '.join(self._log.errors)}. Delete the file to have it built "
                    "again.",
                    param="load_trt",
                )
            by_caller = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._pool = Pool(
                [(self._engine.create_execution_context(by_caller), torch.cuda.Stream(device)) for _ in range(contexts)]
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in inputs]
        self._limits = {
            name: tuple(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0)) for name in inputs
        }

    def fits(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the profile has room for these shapes."""
        return all(within(tensor.shape, *self._limits[name]) for name, tensor in inputs.items())

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name, ready on the current stream. The inputs have to fit."""
        caller = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), self._pool.borrow() as (context, stream):
            held = []
            for name, tensor in inputs.items():
                context.set_input_shape(name, tuple(tensor.shape))
                held.append(_addressable(tensor.to(self._dtypes[name])))
                context.set_tensor_address(name, held[-1].data_ptr())
            outputs = {}
            for name in self._outputs:
                shape = tuple(context.get_tensor_shape(name))
                outputs[name] = torch.empty(shape, dtype=self._dtypes[name], device=self._device)
                context.set_tensor_address(name, outputs[name].data_ptr())
            size = context.update_device_memory_size_for_shapes()
            scratch = torch.empty(max(1, size), dtype=torch.uint8, device=self._device)
            context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
            stream.wait_stream(caller)
            started = context.execute_async_v3(stream.cuda_stream)
            caller.wait_stream(stream)
        if not started:
            raise RuntimeError(f"TensorRT did not run the flow estimator: {'; '.join(self._log.errors)}")
        return outputs


class TensorRTEstimator(nn.Module):
    """Takes the place of `estimator` in the flow; same arguments, same result, same state.

    Args:
        engines: one for each variant that shall run on TensorRT: anything with `fits(inputs)` and
            `__call__(inputs) -> outputs`, by the names of the ONNX interface.
    """

    batches_streams = False  # the graph has one length of the past for all rows

    def __init__(self, estimator: nn.Module, engines: Mapping[Variant, TensorRTEngine]) -> None:
        super().__init__()
        self.estimator, self.engines = estimator, engines

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return init_state(self.estimator, batch_size, device, dtype)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        mu: Tensor,
        t: Tensor,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
        state: State | None = None,
    ) -> Tensor:
        """Velocity `[B, 80, T]`; the arguments are those of `unet.CausalConditionalDecoder.forward`."""
        engine = self.engines.get(_variant(streaming, state))
        if engine is not None:
            inputs = {
                "x": x,
                "mask": x.new_ones(x.shape[0], 1, x.shape[2]) if mask is None else mask,
                "mu": mu,
                "t": t,
                "spks": spks,
                "cond": cond,
            }
            inputs |= {STATE + name: tensor for name, tensor in flatten_state(state or {}).items()}
            if engine.fits(inputs):
                outputs = engine(inputs)
                velocity = outputs.pop(OUTPUT)
                if state is not None:
                    write_state(state, {name.removeprefix(NEXT_STATE): value for name, value in outputs.items()})
                return velocity
            metrics.FLOW_OUT_OF_PROFILE.inc()
        return self.estimator(x, mask, mu, t, spks, cond, streaming=streaming, state=state)


def use_tensorrt(model: CosyVoiceModel, settings: Settings) -> None:
    """Move the estimator of a model to TensorRT: find or build its plans, load them, compare them with PyTorch.

    For whole utterances, the model directory's `flow.decoder.estimator.fp32.onnx` (or fp16) is taken as it is if it is
    there; everything else is exported from the loaded weights.

    Raises:
        BackendUnavailableError: TensorRT was asked for by name and there is no GPU, no library for it, no plan can be
            built, or it gives other values than PyTorch. With `flow_backend="auto"` a warning says so.
    """
    decoder = model.flow.decoder
    try:
        decoder.estimator = _on_tensorrt(decoder.estimator, model.directory, settings)
    except BackendUnavailableError as error:
        if settings.flow_backend == "tensorrt":
            raise
        logger.warning("The flow runs on PyTorch. %s", error.message)


def _on_tensorrt(estimator: nn.Module, model_dir: Path, settings: Settings) -> TensorRTEstimator:
    weight = next(estimator.parameters())
    gpu = gpu_of(weight.device)
    library = find_library(gpu)
    streamed: Variant = "chunked" if settings.upstream_exact else "cached"
    engines = {}
    for variant in ("whole", streamed):
        plan = plan_of(estimator, variant, library, gpu, cache_folder() / "tensorrt", model_dir)
        engines[variant] = TensorRTEngine(library, plan, weight.device, settings.trt_concurrent)
        _compare(estimator, engines, variant)
    logger.info("the flow runs on %s", library)
    return TensorRTEstimator(estimator, engines)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device.

    Raises:
        BackendUnavailableError: it is none.
    """
    if device.type != "cuda":
        raise BackendUnavailableError(
            "TensorRT needs an NVIDIA GPU, and the model is on the CPU: leave flow_backend at torch.", param="load_trt"
        )
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def plan_of(estimator: nn.Module, variant: Variant, library: Library, gpu: Gpu, folder: Path, model_dir: Path) -> Path:
    """The plan of a variant, built if `folder` has none; from the ONNX file in `model_dir` if that has one."""
    dtype = next(estimator.parameters()).dtype
    if dtype not in PRECISIONS:
        raise BackendUnavailableError(f"TensorRT runs the flow in float32 or float16, not in {dtype}.", param="fp16")
    label = f"flow-{variant}.{PRECISIONS[dtype]}"
    published = model_dir / file_name(variant, dtype)
    if published.is_file():

        def link(path: Path) -> None:
            path.symlink_to(published.absolute())

        return cached_plan(library, gpu, label, _hash_of_file(published), folder, link)
    return cached_plan(
        library,
        gpu,
        label,
        source_hash(estimator),
        folder,
        lambda path: export_estimator(estimator, path, variant),
    )


def within(shape: tuple[int, ...], low: tuple[int, ...], usual: tuple[int, ...], high: tuple[int, ...]) -> bool:
    """Whether every extent of `shape` is between those of `low` and `high`."""
    return all(least <= size <= most for size, least, most in zip(shape, low, high, strict=True))


def _variant(streaming: bool, state: State | None) -> Variant | None:
    if state is None:
        return "chunked" if streaming else "whole"
    return "cached" if streaming else None


@torch.inference_mode()
def _compare(estimator: nn.Module, engines: Mapping[Variant, TensorRTEngine], variant: Variant) -> None:
    """Two calls of 50 frames; a stale ONNX file or a broken plan is noticed here and not by the listener."""
    weight = next(estimator.parameters())
    numbers = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers).to(weight)

    replaced = TensorRTEstimator(estimator, engines)
    states = [init_state(estimator, 2, weight.device, weight.dtype) if variant == "cached" else None for _ in range(2)]
    for _ in range(2):
        frames, spks = draw(3, 2, 80, 50), draw(2, 80)
        t = torch.full((2,), 0.3, device=weight.device)
        want, got = (
            step(frames[0], None, frames[1], t, spks, frames[2], streaming=variant != "whole", state=state).float()
            for step, state in zip((estimator, replaced), states, strict=True)
        )
        error = float((got - want).norm() / want.norm())
        if not error < _TOLERANCE:
            raise BackendUnavailableError(
                f"The TensorRT engine of the flow ({variant}) differs from the loaded weights by {error:.1%}. If the "
                "model directory has an ONNX file of other weights, write it again: python -m cosy_engine export-onnx "
                "MODEL_DIR.",
                param="load_trt",
            )


def _addressable(tensor: Tensor) -> Tensor:
    """The tensor as TensorRT takes it: contiguous, aligned, and with an address of its own even if it is empty."""
    if tensor.numel() == 0:
        return torch.empty(_ALIGNMENT, dtype=torch.uint8, device=tensor.device)
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _hash_of_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def source_hash(estimator: nn.Module) -> bytes:
    """Of the weights, of what the constructors were given, and of the code that makes the graph."""
    digest = hashlib.sha256()
    for path in (
        getfile(type(estimator)),
        attention.__file__,
        key_values.__file__,
        streaming.__file__,
        onnx_export.__file__,
    ):
        digest.update(Path(path).read_bytes())
    for name, module in estimator.named_modules():
        sizes = {key: value for key, value in vars(module).items() if isinstance(value, int) and key != "training"}
        digest.update(repr((name, sorted(sizes.items()))).encode())
    for name, tensor in estimator.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()
