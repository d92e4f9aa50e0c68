"""A speech LM of two narrow layers with random weights, and ways to make it want or avoid the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosy_engine.modules.qwen2_lm import CosyVoice3LM, Qwen2Encoder, Qwen2LM

CODES = 50
TEXT_VOCABULARY = 80


def small_lm(version: int = 2) -> Qwen2LM | CosyVoice3LM:
    """CosyVoice2's or CosyVoice3's LM with 50 speech codes and 80 text tokens; the same weights every time."""
    torch.manual_seed(0)
    encoder = Qwen2Encoder(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": TEXT_VOCABULARY,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        }
    )
    lm = (Qwen2LM if version == 2 else CosyVoice3LM)(32, 32, CODES, encoder)
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.3)
    return lm.eval()


def lean(lm: Qwen2LM | CosyVoice3LM, towards_the_end: float) -> Qwen2LM | CosyVoice3LM:
    """Add `towards_the_end` to the logits of all ids that are not speech codes."""

    def shift(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        special = torch.arange(logits.shape[-1]) >= CODES
        return logits + towards_the_end * special

    lm.llm_decoder.register_forward_hook(shift)
    return lm
