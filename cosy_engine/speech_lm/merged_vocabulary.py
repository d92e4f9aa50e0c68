"""The speech LM's ids as one vocabulary with speech first, so that what the model emits is already its next input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cosy_engine.modules.qwen2_lm import Qwen2LM
from cosy_engine.speech_lm.decoding import SpeechCodeLM


@dataclass(frozen=True)
class MergedVocabulary:
    """Speech rows, then CosyVoice2's sos and task id (CosyVoice3 has them among the speech rows), then the text.

    Attributes:
        codes: ids below are speech codes.
        speech_rows: ids below can be generated; those from `codes` on end the speech.
        sos, task: what starts a sequence, and what stands between text and speech.
        first_text: id of text token 0.
        size: number of all ids.
    """

    codes: int
    speech_rows: int
    sos: int
    task: int
    first_text: int
    size: int

    @classmethod
    def of(cls, lm: SpeechCodeLM) -> Self:
        """The vocabulary of a model, whose weights need not be there."""
        codes, rows = lm.speech_token_size, lm.speech_embedding.num_embeddings
        own_rows = isinstance(lm, Qwen2LM)
        sos, task = (rows, rows + 1) if own_rows else (codes, codes + 2)
        first_text = rows + 2 * own_rows
        return cls(codes, rows, sos, task, first_text, first_text + lm.llm.model.model.embed_tokens.num_embeddings)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end the speech when they are generated."""
        return list(range(self.codes, self.speech_rows))

    @property
    def not_a_number(self) -> int:
        """What is reported instead of an id when the model's scores are not numbers; it cannot be generated."""
        return self.speech_rows

    def text(self, tokens: Iterable[int]) -> list[int]:
        """Ids of text tokens."""
        return [self.first_text + token for token in tokens]

    def prompt(self, text: Iterable[int], prompt_speech: Iterable[int]) -> list[int]:
        """What generation starts from: sos, text, task id, speech codes of the prompt."""
        return [self.sos, *self.text(text), self.task, *prompt_speech]


def merged_embedding(lm: SpeechCodeLM) -> Tensor:
    """Input embeddings `[size, D]` in the order of `MergedVocabulary`."""
    special = [lm.llm_embedding.weight] if isinstance(lm, Qwen2LM) else []
    return torch.cat([lm.speech_embedding.weight, *special, lm.llm.model.model.embed_tokens.weight])
