"""Repetition-aware sampling inside vLLM: a logits processor of its V1 model runner; `vllm_slots` is for V2.

Each row's id is drawn here, from the closed form of `sampling.ras_distribution` with the request's own random numbers,
and all other ids of the row are excluded, so that vLLM's greedy choice takes it. So the same request with the same seed
gives the same ids as `RasSampler`, whatever else runs, and vLLM spends no time on a generator a request.

Imported by vLLM's processes only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from cosy_engine.config import SamplingSettings
from cosy_engine.speech_lm import sampling
from cosy_engine.speech_lm.sampling import EXCLUDED, RECENT, TOO_OFTEN, TOP_K, TOP_P, UNIFORM, uniform_numbers
from cosy_engine.speech_lm.vllm_plugin import RAS_ARGUMENT, register

logger = logging.getLogger(__name__)

register()  # from a source tree there is no entry point; workers import this module before they load the model


@dataclass
class _Request:
    """One running request.

    The last ids of `row` are a ring: id number k, counted from the first of `earlier`, is in place k modulo `window`.
    """

    row: np.ndarray  # as `sampling.choose` takes it
    window: int
    fewest: int
    earlier: list[int]  # ids that the prompt ends with and that count as recent
    numbers: np.ndarray
    output: list[int]  # vLLM's own list, which grows

    @classmethod
    def of(cls, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Self:
        given = params.extra_args[RAS_ARGUMENT]
        settings = SamplingSettings(**given["settings"])
        row = np.full(RECENT + settings.win_size, -1.0)
        row[[TOP_P, TOP_K, TOO_OFTEN]] = settings.top_p, settings.top_k, settings.win_size * settings.tau_r
        ids = [*given["recent"], *output]  # there is output if vLLM has put the request off and goes on with it now
        for place in range(max(0, len(ids) - settings.win_size), len(ids)):
            row[RECENT + place % settings.win_size] = ids[place]
        generator = torch.Generator().manual_seed(given["seed"])
        numbers = uniform_numbers(generator, given["drawn"] + params.max_tokens)[given["drawn"] :].numpy()
        return cls(row, settings.win_size, given["fewest"], given["recent"], numbers, output)


class _Batch:
    """The rows of the running requests in one array, brought up to date for each step."""

    def __init__(self, requests: list[_Request]) -> None:
        self._outputs = [request.output for request in requests]
        self._numbers = [request.numbers for request in requests]
        self._before = [request.earlier[-1] if request.earlier else -1 for request in requests]
        self._earlier = np.array([len(request.earlier) for request in requests])
        self._windows = np.array([request.window for request in requests])
        self._fewest = np.array([request.fewest for request in requests])
        self._index = np.arange(len(requests))
        self._rows = np.full((len(requests), RECENT + self._windows.max()), -1.0)
        for row, request in zip(self._rows, requests, strict=True):
            mine = row[: RECENT + request.window]
            mine[:] = request.row
            request.row = mine

    def advance(self, codes: int, size: int) -> np.ndarray:
        """The rows for the next ids of all requests, of `size` ids of which the first `codes` do not end the speech."""
        steps = np.fromiter(map(len, self._outputs), np.int64, len(self._outputs))
        last = [output[-1] if output else before for output, before in zip(self._outputs, self._before, strict=True)]
        self._rows[self._index, RECENT + (self._earlier + steps - 1) % self._windows] = last
        self._rows[:, UNIFORM] = [numbers[step] for numbers, step in zip(self._numbers, steps.tolist(), strict=True)]
        self._rows[:, EXCLUDED] = np.where(steps < self._fewest, codes, size)
        return self._rows


class RasLogitsProcessor(LogitsProcessor):
    """Chooses every request's next id. Scores that are not numbers give the id after the last one of the head."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        config = vllm_config.model_config.hf_config
        self._requests: dict[int, _Request] = {}
        self._batch: _Batch | None = None  # None when the requests have changed
        self._codes = config.speech_codes
        self._device = device
        self._pinned = is_pin_memory
        self._choose = _fastest_form(device, config.speech_rows)

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        if RAS_ARGUMENT not in (params.extra_args or {}):
            raise ValueError(f"A request to this model needs extra_args[{RAS_ARGUMENT!r}].")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if process_dict_updates(self._requests, batch_update, _Request.of):
            self._batch = None

    def apply(self, logits: Tensor) -> Tensor:
        """Scores [B, V] -> [B, V + 1], 0 for the chosen id and -inf for all others."""
        if self._batch is None:
            self._batch = _Batch([self._requests[index] for index in range(len(logits))])
        rows = torch.from_numpy(self._batch.advance(self._codes, logits.shape[-1]))
        if self._pinned:
            rows = rows.pin_memory()  # a copy of its own, since the transfer may still be under way in the next step
        return self._choose(logits, rows.to(self._device, non_blocking=True))


def _fastest_form(device: torch.device, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The Triton kernel on a GPU, if there is Triton and it does the same as the torch form; else that."""
    if device.type != "cuda":
        return _a_few_rows_at_a_time
    try:
        from cosy_engine.speech_lm import vllm_kernel

        if vllm_kernel.agrees(device, size):
            return vllm_kernel.choose
        reason = "it does not choose the same ids"
    except Exception as error:
        reason = str(error)
    logger.warning("The sampling kernel is not used (%s); sampling takes longer", reason)
    return sampling.choose


def _a_few_rows_at_a_time(logits: Tensor, rows: Tensor) -> Tensor:
    """`sampling.choose` on arrays that stay in a processor's cache: half the time for 64 rows."""
    parts = zip(logits.split(8), rows.split(8), strict=True)
    return torch.cat([sampling.choose(*part) for part in parts])
