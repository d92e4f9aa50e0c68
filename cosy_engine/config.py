"""Settings of the engine: defaults, overridden by `COSY_*` environment variables, overridden by arguments."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from cosy_engine.errors import BackendUnavailableError, InvalidRequestError

if TYPE_CHECKING:  # listing voices must not cost the import of torch
    import torch
    from pydantic_core import ErrorDetails


class _Settings(BaseSettings):
    """Settings whose mistakes are told in one line.

    Raises:
        InvalidRequestError: a value of the environment, or an argument, does not fit.
    """

    model_config = SettingsConfigDict(env_prefix="COSY_", env_ignore_empty=True, frozen=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(map(self._told, error.errors()))
            raise InvalidRequestError(f"A setting does not fit: {problems}.", param="settings") from None
        except SettingsError as error:
            raise InvalidRequestError(f"A setting does not fit: {error}.", param="settings") from None

    def _told(self, problem: ErrorDetails) -> str:
        first, *rest = problem["loc"] or ("",)
        variable = f"{self.model_config['env_prefix']}{first}".upper()
        name = ".".join(map(str, (first, *rest)))
        return f"{name} (in the environment {variable}): {problem['msg']}, got {problem['input']!r}"


@dataclass(frozen=True)
class SamplingSettings:
    """Nucleus of at most `top_k` ids up to probability `top_p`; an id that occurs at least `win_size * tau_r` times
    among the last `win_size` is drawn again, without it."""

    top_p: float = 0.8
    top_k: int = 25
    win_size: int = 10
    tau_r: float = 0.1

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("win_size", self.win_size >= 1, "at least 1"),
            ("tau_r", self.tau_r > 0, "above 0"),
        ):
            if not fits:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it must be {wanted}.", param=name)


class HopSettings(_Settings):
    """How many speech tokens become audio at a time. They belong to a request, not to the model."""

    token_hop_len_first: int | None = Field(
        None, ge=1, description="tokens in the first chunk of a stream; by default 22, on a GPU fewer: see hops.py"
    )
    token_hop_len: int = Field(25, ge=1, description="tokens in a chunk after that")
    token_max_hop_len: int = Field(100, ge=1, description="the hop stops growing here")
    stream_scale_factor: int = Field(2, ge=1, description="a grown hop is this many times the one before; 1: none")


class VllmSettings(_Settings):
    """How the speech LM runs on vLLM, for `lm_backend="vllm"`."""

    model_config = SettingsConfigDict(env_prefix="COSY_VLLM_")

    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="share of the memory; on a CPU, of the machine's"
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences in a batch")
    max_model_len: int = Field(4096, ge=64, description="most tokens of prompt, text and speech together")
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one model")
    args: dict[str, Any] = Field(default_factory=dict, description="further arguments of vLLM's engine, by their names")


class Settings(_Settings):
    """Everything that is decided when an engine starts."""

    model_dir: str | None = Field(None, description="a directory, or a ModelScope or Hugging Face id")
    voices_dir: Path = Field(Path("spk_cache"), description="where saved voices live")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    fp16: bool = Field(False, description="half precision for the speech LM and the flow (GPU)")
    compile: bool = Field(False, description="torch.compile the flow estimator (upstream's load_jit)")
    lm_backend: Literal["torch", "vllm"] = "torch"
    flow_backend: Literal["torch", "tensorrt", "auto"] = Field("torch", description="auto: TensorRT if it can be had")
    trt_concurrent: int = Field(1, ge=1, description="threads that TensorRT can serve at a time")
    vllm: VllmSettings = Field(default_factory=VllmSettings)
    hops: HopSettings = Field(default_factory=HopSettings)
    concurrency: int = Field(4, ge=1, description="requests worked on at the same time")
    max_queue: int = Field(32, ge=0, description="requests that may wait; more are refused")
    max_upload_mb: int = Field(30, ge=1, description="largest recording that the page takes")
    shared_voices: bool = Field(False, description="a voice saved on the page is there for every visitor")
    voice_cache_mb: int | None = Field(
        None,
        ge=0,
        description="for what the flow remembers of voices used last; by default 1024, or 1/8 of a GPU's memory, where "
        "it is part of stream_memory_mb",
    )
    stream_memory_mb: int | None = Field(
        None, ge=0, description="for all streams; by default 1/4 of the machine's memory, or 1/2 of a GPU's free memory"
    )
    batch: int | None = Field(
        None,
        ge=1,
        le=32,
        description="streams that the flow and the vocoder serve in one call; by default 32 on a GPU, else 1",
    )
    upstream_exact: bool = Field(False, description="the public code's behaviour, see docs/differences.md")
    warm_up: bool = Field(True, description="speak once at start, so that the first request is as fast as the rest")


def vllm_options(load_vllm: bool, vllm_args: str) -> dict[str, Any]:
    """Fields of `Settings` for `--load-vllm` and `--vllm-args`, a JSON object.

    Raises:
        InvalidRequestError: the arguments are no JSON object, or are given without `--load-vllm`.
    """
    if not load_vllm:
        if vllm_args:
            raise InvalidRequestError("--vllm-args is for --load-vllm; give both.", param="vllm_args")
        return {}
    settings = VllmSettings()
    try:
        args = settings.args | json.loads(vllm_args or "{}")
    except (ValueError, TypeError):
        raise InvalidRequestError(
            """--vllm-args takes a JSON object, for example '{"enforce_eager": true}'.""", param="vllm_args"
        ) from None
    return {"lm_backend": "vllm", "vllm": settings.model_copy(update={"args": args})}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one; a CUDA device has its number.

    Raises:
        BackendUnavailableError: the device was asked for by name and is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BackendUnavailableError(f"There is no device {name!r}: use auto, cpu, cuda or cuda:1.", param="device")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "No CUDA device is usable here: set COSY_DEVICE=cpu, or install a CUDA build of torch.", param="device"
        )
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"There is no device {name}: this machine has {torch.cuda.device_count()}, counted from cuda:0.",
            param="device",
        )
    return device
