from __future__ import annotations

import torch

from cosy_engine.frontend import Prompt


def make_prompt(tokens: int = 12, text: str = "今天天气真好。", seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        text=text,
        text_token=torch.randint(0, 1000, (7,), generator=generator, dtype=torch.int32),
        speech_token=torch.randint(0, 6561, (tokens,), generator=generator, dtype=torch.int32),
        speech_feat=torch.randn(2 * tokens, 80, generator=generator),
        embedding=torch.randn(192, generator=generator),
    )


def same_prompt(one: Prompt, other: Prompt) -> bool:
    names = ("text_token", "speech_token", "speech_feat", "embedding")
    return one.text == other.text and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
