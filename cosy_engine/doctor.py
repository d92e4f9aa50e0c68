"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cosy_engine.config import Settings
from cosy_engine.errors import CosyError

MEMORY_GB = 6  # both 0.5B checkpoints in float32, with room to work
DISK_GB = 6  # one downloaded model directory
NEEDED_PACKAGES = ("torch", "onnxruntime", "transformers", "av", "soxr", "safetensors", "wetext", "gradio")
MODEL_FILES = ("llm", "flow", "hift")


@dataclass(frozen=True)
class Finding:
    """One line of the report. Without what is `needed` nothing runs; the rest makes things faster or possible."""

    name: str
    ok: bool
    detail: str
    needed: bool = False

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        mark = "ok     " if self.ok else ("MISSING" if self.needed else "no     ")
        return f"{mark}  {self.name}: {self.detail}"


def examine(model_dir: str | None = None) -> list[Finding]:
    """Look at everything once; nothing is downloaded, no model is loaded."""
    settings = Settings()
    return [
        _python(),
        *(_package(name) for name in NEEDED_PACKAGES),
        _memory(),
        _cuda(),
        _onnx_cuda(),
        _vllm(),
        _tensorrt(),
        _model(model_dir or settings.model_dir),
        _voices(settings.voices_dir),
    ]


def _python() -> Finding:
    enough = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding("python", enough, detail if enough else f"{detail}; 3.11 or newer is needed", needed=True)


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, version(name), needed=True)
    except PackageNotFoundError:
        return Finding(name, False, "not installed: pip install -r requirements.txt", needed=True)


def _memory() -> Finding:
    try:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return Finding("memory", True, "size unknown")
    if have < MEMORY_GB:
        return Finding("memory", False, f"{have:.0f} GB; the 0.5B models in float32 want {MEMORY_GB} GB")
    return Finding("memory", True, f"{have:.0f} GB")


def _cuda() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("cuda", False, "torch is not installed")
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no NVIDIA GPU or driver"
        return Finding("cuda", False, f"{why}; speech is made on the CPU, slower than real time with the 0.5B models")
    free, total = torch.cuda.mem_get_info()
    return Finding("cuda", True, f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GB free")


def _onnx_cuda() -> Finding:
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding("prompt encoding on the GPU", False, "onnxruntime is not installed")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return Finding("prompt encoding on the GPU", True, "onnxruntime has its CUDA provider")
    return Finding(
        "prompt encoding on the GPU",
        False,
        "onnxruntime has no CUDA provider (onnxruntime-gpu has); recordings are encoded on the CPU",
    )


def _vllm() -> Finding:
    from cosy_engine.speech_lm.vllm_plugin import find_vllm

    try:
        return Finding("vllm backend", True, f"vLLM {find_vllm()}; --load-vllm runs the speech LM on it")
    except CosyError as error:
        return Finding("vllm backend", False, f"{error.message} The speech LM runs on PyTorch.")


def _tensorrt() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("tensorrt backend", False, "torch is not installed")
    import torch

    from cosy_engine.token2wav.tensorrt_plan import Gpu, find_library

    gpu = None
    if torch.cuda.is_available():
        gpu = Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    try:
        library = find_library(gpu)
    except CosyError as error:
        return Finding("tensorrt backend", False, error.message)
    if gpu is None:
        return Finding("tensorrt backend", False, f"{library} is installed, but there is no NVIDIA GPU to run on")
    return Finding("tensorrt backend", True, f"{library} for {gpu}; it is used with --load-trt")


def _model(model_dir: str | None) -> Finding:
    from cosy_engine.checkpoint.default import default_model_dir, is_standin

    try:
        directory = Path(model_dir).expanduser() if model_dir else default_model_dir()
    except CosyError as error:
        return Finding("model", False, error.message)
    if not directory.is_dir():
        free = shutil.disk_usage(Path.home()).free / 2**30
        space = "" if free >= DISK_GB else f"; only {free:.1f} GB of disk are free, {DISK_GB} GB are wanted"
        return Finding(
            "model", False, f"{model_dir} is no local directory; as an id it is downloaded at first use{space}"
        )
    if is_standin(directory):
        return Finding(
            "model", True, f"{directory}: the untrained stand-in, which makes noise; name one by --model-dir"
        )
    missing = [
        part
        for part in MODEL_FILES
        if not any((directory / f"{part}.{kind}").is_file() for kind in ("pt", "safetensors"))
    ]
    missing += [
        pattern
        for pattern in ("cosyvoice*.yaml", "campplus.onnx", "speech_tokenizer_v*.onnx")
        if not any(directory.glob(pattern))
    ]
    if missing:
        return Finding("model", False, f"{directory} lacks {', '.join(missing)}")
    return Finding("model", True, str(directory))


def _voices(folder: Path) -> Finding:
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("saved voices", False, f"{nearest} cannot be written to; set COSY_VOICES_DIR")
    return Finding("saved voices", True, str(folder.absolute()))
