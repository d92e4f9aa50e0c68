"""Settings of the engine: defaults, overridden by `COSY_*` environment variables, overridden by arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cosy_engine.errors import BackendUnavailableError

if TYPE_CHECKING:  # listing voices must not cost the import of torch
    import torch


class HopSettings(BaseSettings):
    """How many speech tokens become audio at a time. They belong to a request, not to the model."""

    model_config = SettingsConfigDict(env_prefix="COSY_", frozen=True)

    token_hop_len_first: int | None = Field(None, ge=1, description="the first hop, when it shall be another")
    token_hop_len: int = Field(25, ge=1, description="fewest new tokens in the first chunk of a stream")
    token_max_hop_len: int = Field(100, ge=1, description="the hop stops growing here")
    stream_scale_factor: int = Field(2, ge=1, description="each hop is this many times the one before")


class Settings(BaseSettings):
    """Everything that is decided when an engine starts."""

    model_config = SettingsConfigDict(env_prefix="COSY_", frozen=True, protected_namespaces=())

    model_dir: str | None = Field(None, description="a directory, or a ModelScope or Hugging Face id")
    voices_dir: Path = Field(Path("spk_cache"), description="where saved voices live")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    fp16: bool = Field(False, description="half precision for the speech LM and the flow (GPU)")
    compile: bool = Field(False, description="torch.compile the flow estimator (upstream's load_jit)")
    lm_backend: Literal["torch", "vllm"] = "torch"
    flow_backend: Literal["torch", "tensorrt"] = "torch"
    hops: HopSettings = Field(default_factory=HopSettings)
    concurrency: int = Field(4, ge=1, description="requests worked on at the same time")
    max_queue: int = Field(32, ge=0, description="requests that may wait; more are refused")
    upstream_exact: bool = Field(False, description="the public code's behaviour, see docs/differences.md")
    warm_up: bool = Field(True, description="speak once at start, so that the first request is as fast as the rest")


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one.

    Raises:
        BackendUnavailableError: the device was asked for by name and is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "No CUDA device is usable here: start with --device cpu, or install a CUDA build of torch.", param="device"
        )
    return device
