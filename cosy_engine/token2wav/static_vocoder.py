"""The vocoder's usual chunks as CUDA graphs.

After its first chunk a stream's state has the same form from chunk to chunk, as long as the hop stays. A form that
comes again is captured; what comes once runs as it is, and so do the ends of streams, which have any length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from cosy_engine.modules.streaming import State, flatten_state, form_of, map_state
from cosy_engine.token2wav.graphs import captured, uncaptured

_MOST_GRAPHS = 64
_NOISE_POSITION = "m_source.noise_position"


@dataclass
class _Step:
    """A captured chunk: where its inputs go, and what it leaves.

    Attributes:
        mel, noise: given; `inputs`: the tensors of the state before, by name.
        run: gives the sound and the state after, in tensors that the next replay overwrites.
    """

    mel: Tensor
    noise: Tensor
    inputs: dict[str, Tensor]
    run: Callable[[], tuple[Tensor, State]]


class StaticVocoder(nn.Module):
    """Takes the place of a vocoder for streams.

    Args:
        graphs: capture each form as a CUDA graph when it comes for the second time.
    """

    def __init__(self, hift: nn.Module, *, graphs: bool) -> None:
        super().__init__()
        self.hift = hift
        self.init_state = hift.init_state
        self.lookahead_frames = hift.lookahead_frames
        self._capture = captured if graphs else uncaptured
        self._samples: dict[Hashable, int] = {}  # of noise that a form takes
        self._steps: dict[Hashable, _Step] = {}

    def forward_chunk(self, mel: Tensor, state: State, *, finalize: bool) -> Tensor:
        """As the vocoder's own."""
        key = (tuple(mel.shape), form_of(state))
        position = state["m_source"]["noise_position"]
        if finalize or mel.shape[2] == 0 or not self._comes_again(key):
            sound = self.hift.forward_chunk(mel, state, finalize=finalize)
            if not finalize:
                self._samples[key] = int(state["m_source"]["noise_position"][0] - position[0])
            return sound
        samples = self._samples[key]
        noise = self.hift.m_source.noise_from(position, samples, mel.device)
        step = self._steps.get(key) or self._steps.setdefault(key, self._step(mel, noise, state))
        step.mel.copy_(mel)
        step.noise.copy_(noise)
        given = flatten_state(state)
        for name, tensor in step.inputs.items():
            tensor.copy_(given[name])
        sound, after = step.run()
        state.clear()
        state.update(map_state(after, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf))
        state["m_source"]["noise_position"] = position + samples
        return sound.clone()

    def _comes_again(self, key: Hashable) -> bool:
        return key in self._steps or key in self._samples and len(self._steps) < _MOST_GRAPHS

    def _step(self, mel: Tensor, noise: Tensor, state: State) -> _Step:
        mel, noise = mel.clone(), noise.clone()
        before = map_state(state, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        inputs = {
            name: tensor for name, tensor in flatten_state(before).items() if tensor.dim() and name != _NOISE_POSITION
        }

        def run() -> tuple[Tensor, State]:
            after = map_state(before, lambda leaf: leaf)
            return self.hift.forward_chunk(mel, after, finalize=False, noise=noise), after

        return _Step(mel, noise, inputs, self._capture(run, mel.device))
