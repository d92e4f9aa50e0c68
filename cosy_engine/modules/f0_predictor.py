"""Pitch from mel: five convolutions and a linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosy_engine.modules.streaming import State
from cosy_engine.modules.streaming_layers import StreamingConv1d, substate


class ConvRNNF0Predictor(nn.Module):
    """CosyVoice2's pitch predictor; sees 5 frames to either side.

    Computes in float64: the source sums the pitch up and compares it with a threshold, and only with digits to spare
    does the waveform not depend on how the mel was cut into chunks.
    """

    context: tuple[tuple[int, int], ...] = ((1, 1),) * 5  # frames (left, right) that each convolution sees

    def __init__(self, num_class: int = 1, in_channels: int = 80, cond_channels: int = 512) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for left, right in self.context:
            conv = StreamingConv1d(in_channels, cond_channels, left + 1 + right, left=left, right=right)
            layers += [weight_norm(conv), nn.ELU()]
            in_channels = cond_channels
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(cond_channels, num_class)

    def ready(self, n: int) -> int:
        """Number of pitch values known after n frames."""
        return max(0, n - sum(right for _, right in self.context))

    def forward(self, mel: Tensor, state: State | None = None, *, finalize: bool = True) -> Tensor:
        """mel [B, in_channels, T] -> f0 [B, T] in Hz, in the dtype of the mel."""
        state = {} if state is None else state
        x = mel.double()
        for name, conv in self.condnet.named_children():
            if isinstance(conv, StreamingConv1d):
                x = F.elu(conv(x, substate(state, f"condnet.{name}"), finalize=finalize))
        x = F.linear(x.transpose(1, 2), self.classifier.weight.double(), self.classifier.bias.double())
        return x.squeeze(-1).abs().to(mel.dtype)


class CausalConvRNNF0Predictor(ConvRNNF0Predictor):
    """CosyVoice3's pitch predictor; sees 3 frames ahead and 8 back."""

    context = ((0, 3),) + ((2, 0),) * 4
