"""Repetition-aware sampling for vLLM's V2 model runner: all that a request's draws need is in its row of one table.

The table is on the GPU, and so are the ids: a step asks nothing of the CPU but to launch one kernel, and the next step
can be prepared before its ids are known. What is drawn is what `sampling.choose` draws, with the request's own random
numbers, so the same request with the same seed gives the same ids, whatever else runs.

Imports nothing of vLLM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosy_engine.config import SamplingSettings
from cosy_engine.speech_lm import sampling
from cosy_engine.speech_lm.sampling import uniform_numbers
from cosy_engine.speech_lm.vllm_plugin import RAS_ARGUMENT, ras_argument

logger = logging.getLogger(__name__)

TOP_P, TOP_K, TOO_OFTEN, FEWEST, PROMPT, KNOWN, EARLIER, WINDOW, COUNT, RING = range(10)
"""Columns of the table: the settings, with `win_size * tau_r`; how many ids must come before one may end the speech;
lengths of the prompt and of all that was known when the request came; how many ids at the prompt's end count as recent;
the ring's length; how many random numbers there are. From `RING` on come the ring of the last ids (id number k, counted
from the first of those at the prompt's end, is in place k modulo its length) and the numbers, one for each id."""
_NEUTRAL = [1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0, 0.0]


class Batch(NamedTuple):
    """What one step is about; all but `logits` are whole numbers.

    `logits` [B, V] are of the tokens `token` [B], each the last of its request's in this step. `slot` [B] is the
    request's row of the table; `positions` and `ids` [n] are of all tokens of the step.
    """

    logits: Tensor
    slot: Tensor
    token: Tensor
    positions: Tensor
    ids: Tensor


class Slots:
    """The table, and the draw.

    Args:
        slots: most requests at a time.
        longest: most tokens of a request, its prompt included.
        codes: ids from this one on end the speech.
        size: ids of the head. Scores that are not numbers give the id after the last one.
    """

    def __init__(self, slots: int, longest: int, codes: int, size: int, device: torch.device) -> None:
        self.table = torch.zeros(slots, RING + 3 * longest, dtype=torch.float64, device=device)
        self.table[:, : len(_NEUTRAL)] = torch.tensor(_NEUTRAL, dtype=torch.float64, device=device)
        self._windows = np.ones(slots, np.int64)
        self._patience, self._before = np.zeros(slots), 0.0
        self._codes = codes
        self._kernel = _kernel(device, size)

    def add(self, slot: int, given: dict[str, Any] | None, most: int, prompt: int, output: list[int]) -> None:
        """A request comes, or comes back after it was put off.

        Args:
            given: as `vllm_plugin.ras_argument` makes it; without it (vLLM warms up) the likeliest id is drawn.
            most: how many ids it may have.
            prompt: length of its prompt.
            output: the ids that it has already.
        """
        row = torch.tensor(_NEUTRAL, dtype=torch.float64)
        if given is not None:
            settings, earlier = SamplingSettings(**given["settings"]), given["recent"]
            generator = torch.Generator().manual_seed(given["seed"])
            numbers = uniform_numbers(generator, given["drawn"] + most)[given["drawn"] :]
            window = min(settings.win_size, len(earlier) + most)
            row = torch.full((RING + window + most,), -1.0, dtype=torch.float64)
            row[[TOP_P, TOP_K, TOO_OFTEN]] = torch.tensor(
                [settings.top_p, settings.top_k, settings.win_size * settings.tau_r], dtype=torch.float64
            )
            row[[FEWEST, EARLIER, WINDOW, COUNT]] = torch.tensor(
                [given["fewest"], len(earlier), window, most], dtype=torch.float64
            )
            ids = [*earlier, *output]
            for place in range(max(0, len(ids) - window), len(ids)):
                row[RING + place % window] = ids[place]
            row[RING + window :] = numbers
        row[PROMPT], row[KNOWN] = prompt, prompt + len(output)
        self._windows[slot] = int(row[WINDOW])
        self._patience[slot] = 0.0 if given is None else given["patience"]
        if self.table.is_cuda:
            row = row.pin_memory()
        self.table[slot, : len(row)].copy_(row, non_blocking=True)

    def choose(self, batch: Batch, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """Draw the next id of each row; `slots` are `batch.slot` on the CPU.

        Returns:
            The ids, int64 [B], and int32 [B]: 1, or 0 where the prompt is not complete yet, so that the id means
            nothing and the next draw takes the same random number.
        """
        if self._kernel is not None:
            return self._kernel(batch, self.table, self._codes)
        return choose(batch, self.table, self._codes, int(self._windows[slots].max()))

    def rest(self, slots: np.ndarray) -> None:
        """Sleep for as long as all of these can wait for the next step: then more come together in one.

        vLLM sends the ids of the step before when this step has been launched, so that one's requests wait, too.
        """
        if len(slots):
            can_wait = float(self._patience[slots].min())
            seconds, self._before = min(can_wait, self._before), can_wait
            if seconds:
                time.sleep(seconds)


def choose(batch: Batch, table: Tensor, codes: int, widest: int) -> tuple[Tensor, Tensor]:
    """`Slots.choose` in torch operations; `widest` is the longest of the rings."""
    slot, rows = batch.slot.long(), table[batch.slot.long()]
    known = batch.positions[batch.token.long()].long() + 1
    prompt, complete_from, earlier, window, count = rows[:, [PROMPT, KNOWN, EARLIER, WINDOW, COUNT]].long().unbind(1)
    step, complete = known - prompt, known >= complete_from
    place = RING + torch.where(complete & (step > 0), (earlier + step - 1) % window, 0)
    last = torch.where(
        complete & (step > 0), batch.ids[batch.token.long()].double(), rows.gather(1, place[:, None])[:, 0]
    )
    rows.scatter_(1, place[:, None], last[:, None])
    table[slot, place] = last
    size = batch.logits.shape[1]
    number = rows.gather(1, (RING + window + torch.minimum(step.clamp(min=0), count - 1))[:, None])
    excluded = torch.where(step < rows[:, FEWEST], codes, size).double()
    ring = rows[:, RING : RING + widest]
    ring = ring.masked_fill(torch.arange(ring.shape[1], device=ring.device) >= window[:, None], -1.0)
    given = torch.cat([number, rows[:, [TOP_P, TOP_K, TOO_OFTEN]], excluded[:, None], ring], dim=1)
    return sampling.choose(batch.logits.float(), given).argmax(1), complete.int()


def _kernel(device: torch.device, size: int) -> Callable[[Batch, Tensor, int], tuple[Tensor, Tensor]] | None:
    """The Triton kernel on a GPU, if it does the same as the torch form."""
    if device.type != "cuda":
        return None
    try:
        from cosy_engine.speech_lm import vllm_kernel

        if vllm_kernel.agrees(device, size) and _agrees(vllm_kernel.choose_in_slots, device, size):
            return vllm_kernel.choose_in_slots
        reason = "it does not choose the same ids"
    except Exception as error:
        reason = str(error)
    logger.warning("The sampling kernel is not used (%s); sampling takes longer", reason)
    return None


def _agrees(kernel: Callable[[Batch, Tensor, int], tuple[Tensor, Tensor]], device: torch.device, size: int) -> bool:
    """Whether a kernel does the same to the table as `choose`, for requests at their start, later, and before it."""
    codes, given, most, prompt = size - 3, [5, 6, 5], 30, 20
    slots = Slots(6, 64, codes, size, torch.device("cpu"))
    for slot, output in ((1, []), (2, [7, 8, 9]), (3, []), (4, list(range(12))), (5, list(range(12)))):
        settings = SamplingSettings(top_k=25 - slot, tau_r=0.1 * slot)
        slots.add(slot, ras_argument(settings, slot, given, 6)[RAS_ARGUMENT], most, prompt, output)
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(5, size, generator=generator)
    last = torch.tensor([prompt - 1, prompt + 3, prompt - 7, prompt + 12, prompt + 1])  # two are not complete
    slot, ids = torch.arange(1, 6, dtype=torch.int32), torch.arange(11, 16, dtype=torch.int32)
    parts = logits, slot, torch.arange(5), last, ids
    batch, tables = Batch(*(part.to(device) for part in parts)), [slots.table.to(device, copy=True) for _ in range(2)]
    (ours, sampled), (theirs, expected) = kernel(batch, tables[0], codes), choose(batch, tables[1], codes, 10)
    kept = expected.bool()
    return torch.equal(sampled, expected) and torch.equal(ours[kept], theirs[kept]) and torch.equal(*tables)
