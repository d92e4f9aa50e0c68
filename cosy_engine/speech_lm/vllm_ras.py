"""Repetition-aware sampling inside vLLM: a logits processor of its V1 model runner.

Each row's id is drawn here, from the closed form of `sampling.ras_distribution` with the request's own random numbers,
and all other ids of the row are excluded, so that vLLM's greedy choice takes it. So the same request with the same seed
gives the same ids as `RasSampler`, whatever else runs, and vLLM spends no time on a generator a request.

Imported by vLLM's processes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from cosy_engine.config import SamplingSettings
from cosy_engine.speech_lm.sampling import draw, ras_distribution, uniform_numbers
from cosy_engine.speech_lm.vllm_plugin import RAS_ARGUMENT, register

register()  # from a source tree there is no entry point; workers import this module before they load the model


@dataclass
class _Row:
    """One running request."""

    settings: SamplingSettings
    fewest: int
    recent: list[int]
    numbers: list[float]
    output: list[int]  # vLLM's own list, which grows

    @classmethod
    def of(cls, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Self:
        given = params.extra_args[RAS_ARGUMENT]
        generator = torch.Generator().manual_seed(given["seed"])
        numbers = uniform_numbers(generator, given["drawn"] + params.max_tokens)[given["drawn"] :].tolist()
        return cls(SamplingSettings(**given["settings"]), given["fewest"], given["recent"], numbers, output)

    def window(self) -> list[int]:
        """The last ids, -1 where there are none yet: `win_size` of them."""
        size = self.settings.win_size
        last = self.output[-size:]
        last = [*self.recent, *last][-size:]
        return [-1] * (size - len(last)) + last


class RasLogitsProcessor(LogitsProcessor):
    """Chooses every request's next id. Scores that are not numbers give the id after the last one of the head."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._codes = vllm_config.model_config.hf_config.speech_codes
        self._device = device
        self._pinned = is_pin_memory

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        if RAS_ARGUMENT not in (params.extra_args or {}):
            raise ValueError(f"A request to this model needs extra_args[{RAS_ARGUMENT!r}].")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _Row.of)

    def apply(self, logits: Tensor) -> Tensor:
        """Scores [B, V] -> [B, V + 1], 0 for the chosen id and -inf for all others."""
        batch, size = logits.shape
        rows = [self._rows[index] for index in range(batch)]
        broken = ~logits.sum(dim=-1, keepdim=True).isfinite()
        logits = logits.masked_fill(broken, 0.0)
        chosen = logits.new_empty(batch, 1, dtype=torch.long)
        for settings, indices in _by_settings(rows).items():
            whole = len(indices) == batch
            members = slice(None) if whole else torch.tensor(indices, device=self._device)
            chosen[members, 0] = self._draw(logits[members], [rows[index] for index in indices], settings)
        chosen = chosen.masked_fill(broken, size)
        return logits.new_full((batch, size + 1), float("-inf")).scatter_(-1, chosen, 0.0)

    def _draw(self, logits: Tensor, rows: list[_Row], settings: SamplingSettings) -> Tensor:
        steps = [len(row.output) for row in rows]
        recent = self._moved(torch.tensor([row.window() for row in rows]))
        too_few = self._moved(torch.tensor([[step < row.fewest] for row, step in zip(rows, steps, strict=True)]))
        uniform = self._moved(
            torch.tensor([row.numbers[step] for row, step in zip(rows, steps, strict=True)], dtype=torch.float64)
        )
        ends = torch.arange(logits.shape[-1], device=self._device) >= self._codes
        return draw(ras_distribution(logits.masked_fill(ends & too_few, float("-inf")), recent, settings), uniform)

    def _moved(self, tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if self._pinned else tensor).to(self._device, non_blocking=True)


def _by_settings(rows: list[_Row]) -> dict[SamplingSettings, list[int]]:
    groups: dict[SamplingSettings, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.settings, []).append(index)
    return groups
