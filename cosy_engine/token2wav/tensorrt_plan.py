"""TensorRT and TensorRT-RTX: which of them is here, and plans, which are what they build from ONNX for one GPU.

The two have the same Python interface. TensorRT measures on the GPU that it builds for; TensorRT-RTX, which is for
consumer and workstation cards, needs no GPU to build. Networks are strongly typed, the one kind that TensorRT 11 and
TensorRT-RTX still have: the precision is the ONNX file's.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from cosy_engine.errors import BackendUnavailableError
from cosy_engine.files import locked, write_atomically

logger = logging.getLogger(__name__)

_MODULES = {"TensorRT": ("tensorrt",), "TensorRT-RTX": ("tensorrt_rtx", "tensorrt_rtx_bindings")}

Range = tuple[int, int, int]
PROFILE: dict[str, Range] = {  # fewest, usual and most of each dimension that the ONNX file leaves open
    "batch": (2, 2, 64),  # two guidance halves a request
    "frames": (2, 200, 3000),  # 3000 frames are a minute
    "past": (0, 300, 3000),
}


@dataclass(frozen=True)
class Library:
    """A TensorRT that can be imported."""

    name: str
    module: ModuleType

    @property
    def is_rtx(self) -> bool:
        return self.name == "TensorRT-RTX"

    def __str__(self) -> str:
        return f"{self.name} {self.module.__version__}"


@dataclass(frozen=True)
class Gpu:
    """A GPU to build for, such as `Gpu("NVIDIA L4", (8, 9))`; the second is its compute capability."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def find_library(gpu: Gpu | None = None) -> Library:
    """TensorRT, or else TensorRT-RTX. Without a `gpu`, whichever is installed.

    Raises:
        BackendUnavailableError: neither is installed, or the one that is does not know this GPU.
    """
    reasons = []
    for name, modules in _MODULES.items():
        module = next((found for found in map(_import, modules) if found), None)
        if module is None:
            reasons.append(f"{name} is not installed")
        elif name == "TensorRT-RTX" and gpu and _rtx_capability(module, gpu) is None:
            reasons.append(f"{name} does not run on {gpu}")
        else:
            return Library(name, module)
    raise BackendUnavailableError(
        f"{' and '.join(reasons)}: pip install -r requirements-tensorrt-rtx.txt (consumer and workstation cards) or "
        "pip install tensorrt (all NVIDIA cards), or leave flow_backend at torch.",
        param="load_trt",
    )


def cached_plan(
    library: Library, gpu: Gpu, label: str, source: bytes, folder: Path, write_onnx: Callable[[Path], None]
) -> Path:
    """The plan of a network for a GPU; built if `folder` does not have it.

    Its name holds all that a plan depends on: the network and its precision, the GPU, the library and its version,
    and a hash of the source and the profile.

    Args:
        label: of network and precision, for the name.
        source: a hash of the weights and of whatever else the ONNX file is made from.
        write_onnx: writes the ONNX file; called only if there is something to build.

    Raises:
        BackendUnavailableError: TensorRT cannot build it; the message names the layer.
    """
    version = f"{library.name}-{library.module.__version__}"
    where = f"{gpu.name}-sm{gpu.capability[0]}{gpu.capability[1]}"
    digest = hashlib.sha256(source + repr(PROFILE).encode()).hexdigest()[:16]
    machine = f"{_slug(where)}.{_slug(version)}"
    path = folder / f"{label}.{machine}.{digest}.plan"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not path.is_file():
            onnx = folder / f".{label}.{digest}.onnx"
            onnx.unlink(missing_ok=True)  # of a build that was killed
            try:
                write_onnx(onnx)
                started = time.perf_counter()
                logger.info("building %s for %s with %s; it is kept", label, gpu, library)
                plan = build_plan(library, gpu, onnx, folder / f"timing.{machine}.cache")
                write_atomically(path, plan)
                logger.info("built %s in %.0f s", path.name, time.perf_counter() - started)
            finally:
                onnx.unlink(missing_ok=True)
    return path


def build_plan(library: Library, gpu: Gpu, onnx: Path, timing_cache: Path | None = None) -> bytes:
    """Build an ONNX file for a GPU.

    Args:
        timing_cache: file of TensorRT's measurements, read and extended; TensorRT-RTX does not measure.

    Raises:
        BackendUnavailableError: the message names the layer that TensorRT cannot build.
    """
    trt = library.module
    log = log_of(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        layers = [f"layer {error.node_name()!r} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise BackendUnavailableError(f"{library} cannot read {onnx.name}: {'; '.join(layers)}", param="load_trt")

    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *_extents(tensor.name, tuple(tensor.shape)))
    config.add_optimization_profile(profile)
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)  # memory by actual shapes
    monitor = _monitor(trt, onnx.name)
    config.progress_monitor = monitor
    cache = None
    if library.is_rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_rtx_capability(trt, gpu), 0)
    elif timing_cache is not None:
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)

    plan = builder.build_serialized_network(network, config)
    monitor.bar.close()
    if plan is None:
        raise BackendUnavailableError(
            f"{library} cannot build {onnx.name} for {gpu}: {'; '.join(log.errors) or 'no reason given'}",
            param="load_trt",
        )
    if cache is not None:
        write_atomically(timing_cache, bytes(cache.serialize()))
    return bytes(plan)


@cache
def log_of(trt: ModuleType) -> Any:
    """The logger of a library, of which it takes only one. Keeps the last `errors`, for an exception to tell them."""
    error_levels = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, message: str) -> None:
            if severity in error_levels:
                self.errors.append(message)
            if severity in error_levels or severity == trt.ILogger.Severity.WARNING:
                logger.debug("%s", message)

    return Log()


def _monitor(trt: ModuleType, title: str) -> Any:
    """A bar on a terminal's stderr that shows the phase of the build that is under way."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bar = tqdm(desc=title, disable=None, leave=False)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.bar.reset(total=steps)
            self.bar.set_description(f"{title}: {phase}")

        def step_complete(self, phase: str, step: int) -> bool:
            self.bar.update()
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _extents(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Fewest, usual and most of an input's shape, in which -1 stands for what is open."""
    names = ("batch", "", "past" if name.startswith("state.") else "frames", "")
    return [
        tuple(PROFILE[names[axis]][which] if size == -1 else size for axis, size in enumerate(shape))
        for which in range(3)
    ]


def _rtx_capability(module: ModuleType, gpu: Gpu) -> Any | None:
    return getattr(module.ComputeCapability, f"SM{gpu.capability[0]}{gpu.capability[1]}", None)


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()
