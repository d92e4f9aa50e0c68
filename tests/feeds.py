"""One whole call of the flow with the masks of a stream that was fed in parts: what incremental results are held to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cosy_engine.modules import dit, unet, upsample_encoder


def mask_as_fed(monkeypatch: pytest.MonkeyPatch, ends: Sequence[int]) -> None:
    """From now on a whole call masks as if its tokens had been fed in parts that end at `ends`.

    The chunks of a mask are counted from the start of what is fed at a time, and end with it.
    """

    def masks(pasts: list[int], new: int, chunk: int, device: torch.device, valid: None) -> list[Tensor | None]:
        assert pasts == [0] and valid is None
        if chunk == 0:
            return [None]
        bounds = torch.tensor([0, *ends]) * (new // ends[-1])  # frames, or tokens
        position = torch.arange(new)
        feed = torch.searchsorted(bounds, position, right=True)
        start, end = bounds[feed - 1], bounds[feed]
        seen = torch.minimum(start + ((position - start) // chunk + 1) * chunk, end)
        return [(position < seen[:, None])[None, None]]

    for module in (upsample_encoder, unet, dit):
        monkeypatch.setattr(module, "attention_masks", masks)
