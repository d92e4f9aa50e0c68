"""What every speech LM backend offers: requests in, speech codes out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from cosy_engine.config import SamplingSettings


@dataclass(frozen=True)
class SpeechLMRequest:
    """One text piece to be spoken.

    `text` and `prompt_text` are text token ids, `prompt_speech` the speech codes of the prompt. At least
    `int(min_ratio * len(text))` and at most `int(max_ratio * len(text))` codes come out. The same request with the
    same seed gives the same codes, whatever else runs.

    After the `first` ones a backend may rest until it is asked for the next, so that it leaves a GPU to whoever makes
    sound of those. Each code after them may take `patience` seconds longer: a step for few requests takes a GPU as long
    as one for many, so where many are heard at once it is better to let them gather.
    """

    text: list[int]
    prompt_text: list[int] = field(default_factory=list)
    prompt_speech: list[int] = field(default_factory=list)
    seed: int = 0
    sampling: SamplingSettings = SamplingSettings()
    min_ratio: float = 2.0
    max_ratio: float = 20.0
    first: int | None = None
    patience: float = 0.0

    def length_limits(self, text_tokens: int) -> tuple[int, int]:
        """Fewest and most speech codes for so many text tokens."""
        return int(self.min_ratio * text_tokens), int(self.max_ratio * text_tokens)


class SpeechLM(Protocol):
    """Generates speech codes (ids below the codebook's size; neither stop nor fill ids).

    Leaving an iterator early (`aclose()`, cancellation, or dropping it) ends the work for it. Iterators that are open
    when `close()` is called raise EngineStoppedError, and so does every later one.
    """

    name: str

    def generate(self, request: SpeechLMRequest) -> AsyncIterator[int]:
        """Codes for a text that is known."""
        ...

    def generate_bistream(self, request: SpeechLMRequest, text: AsyncIterator[int]) -> AsyncIterator[int]:
        """Codes for `request.text` and then the text token ids that arrive from `text`, spoken as they arrive."""
        ...

    def close(self) -> None:
        """Stop all work and free what it held."""
        ...
