"""Drops what is left of long silences from a stream of speech codes."""

from __future__ import annotations

from collections.abc import Collection

SILENT_CODES: dict[str, frozenset[int]] = {
    "cosyvoice2": frozenset(),
    "cosyvoice3": frozenset({1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323}),
}
"""Codes that sound as silence, by the model's name; CosyVoice2's silences are left alone."""


class SilenceFilter:
    """Keeps at most `longest_run` silent codes in a row (whichever they are). One filter a request.

    It decides what reaches the flow; the speech LM goes on from all of its codes.
    """

    def __init__(self, silent_codes: Collection[int], longest_run: int = 5) -> None:
        self.silent_codes = silent_codes
        self.longest_run = longest_run
        self.run = 0

    def keeps(self, code: int) -> bool:
        """Whether the next code of the stream is kept."""
        self.run = self.run + 1 if code in self.silent_codes else 0
        return self.run <= self.longest_run
