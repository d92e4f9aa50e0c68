"""Token-to-wave as the public code does it, for comparison: every chunk recomputes all that came before.

What differs from the default path, and why the default differs, is listed in docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.modules.hift import CausalHiFTGenerator
from cosy_engine.modules.source import draw_public_noise
from cosy_engine.token2wav.speed import change_speed
from cosy_engine.token2wav.work import Making

_CACHED_FRAMES = 8
_FRAME = 480

DrawNoise = Callable[[int], Tensor]


class UpstreamSession:
    """One request of the public streaming loop.

    Args:
        hop: `{"token_hop_len": n}`, shared by all requests of a model: the grown hop stays for the next request.
        draw_noise: Gaussian noise of CosyVoice2's source for a number of samples; default: seeded from `seed`.
    """

    def __init__(
        self,
        flow: nn.Module,
        hift: nn.Module,
        prompt: Prompt,
        hop: dict[str, int],
        hops: HopSettings,
        stream: bool,
        seed: int,
        speed: float,
        draw_noise: DrawNoise | None = None,
    ) -> None:
        self._flow, self._hift = flow, hift
        self._hop, self._hops, self._stream, self._speed = hop, hops, stream, speed
        weight = flow.spk_embed_affine_layer.weight
        self._prompt_token = prompt.speech_token[None].to(weight.device)
        self._prompt_feat = prompt.speech_feat[None].to(weight)
        self._embedding = prompt.embedding[None].to(weight)
        self._tokens: list[int] = []
        self._offset = 0
        self._finished = False
        self.done = False
        if isinstance(hift, CausalHiFTGenerator):
            self._vocode = _CausalVocoder(hift)
        else:
            self._vocode = _FadingVocoder(hift, draw_noise or _seeded_noise(seed))

    def push(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)

    def finish(self) -> None:
        self._finished = True
        self.done = not self._tokens

    @property
    def ready(self) -> bool:
        return not self.done and (self._finished or self._chunk_ready)

    @property
    def _this_hop(self) -> int:
        hop = self._hop["token_hop_len"]
        padding = -self._prompt_token.shape[1] % hop
        return hop + padding if self._offset == 0 else hop

    @property
    def _chunk_ready(self) -> bool:
        needed = self._this_hop + self._flow.pre_lookahead_len
        return self._stream and len(self._tokens) - self._offset >= needed

    def prepare(self) -> Making[None]:
        yield from ()

    def chunk(self) -> Making[Tensor]:
        """The next chunk of sound, `[samples]`, all in one piece of work."""
        yield from ()
        if not self._chunk_ready:
            self.done = True
            mel = self._mel(len(self._tokens), streaming=False, finalize=True)
            return self._vocode(change_speed(mel, self._speed), finalize=True)
        end = self._offset + self._this_hop
        mel = self._mel(end + self._flow.pre_lookahead_len, streaming=True, finalize=False)
        self._offset = end
        grown = self._hop["token_hop_len"] * self._hops.stream_scale_factor
        self._hop["token_hop_len"] = min(self._hops.token_max_hop_len, grown)
        return self._vocode(mel, finalize=False)

    def _mel(self, end: int, *, streaming: bool, finalize: bool) -> Tensor:
        token = torch.tensor([self._tokens[:end]], dtype=torch.int32, device=self._prompt_token.device)
        mel = self._flow.inference(
            token, self._prompt_token, self._prompt_feat, self._embedding, streaming=streaming, finalize=finalize
        )
        return mel[:, :, self._offset * self._flow.token_mel_ratio :].float()


def _seeded_noise(seed: int) -> DrawNoise:
    """The public draws, each call with a seed of its own; the global generator is left as it was."""
    seeds = count(seed)

    def draw(samples: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(next(seeds))
            return draw_public_noise(samples)

    return draw


class _FadingVocoder:
    """CosyVoice2: eight mel frames and their source are vocoded again and cross-faded with what was held back."""

    def __init__(self, hift: nn.Module, draw_noise: DrawNoise) -> None:
        self._hift, self._draw_noise = hift, draw_noise
        self._mel: Tensor | None = None
        self._source: Tensor | None = None
        self._speech: Tensor | None = None

    def __call__(self, mel: Tensor, *, finalize: bool) -> Tensor:
        if self._mel is not None:
            mel = torch.cat([self._mel, mel], dim=2)
        source = mel.new_zeros(1, 1, 0) if self._source is None else self._source
        noise = self._draw_noise(mel.shape[2] * _FRAME).to(mel.device)
        speech, source = self._hift.inference(mel, cache_source=source, noise=noise)
        if self._speech is not None:
            speech = _fade_in(speech, self._speech)
        if finalize:
            return speech[0]
        held_back = _CACHED_FRAMES * _FRAME
        self._mel, self._source = mel[:, :, -_CACHED_FRAMES:], source[:, :, -held_back:]
        self._speech = speech[:, -held_back:]
        return speech[0, :-held_back]


class _CausalVocoder:
    """CosyVoice3: all mel frames so far are vocoded each time and what was sent already is cut off."""

    def __init__(self, hift: nn.Module) -> None:
        self._hift = hift
        self._mel: Tensor | None = None
        self._sent = 0

    def __call__(self, mel: Tensor, *, finalize: bool) -> Tensor:
        self._mel = mel if self._mel is None else torch.cat([self._mel, mel], dim=2)
        speech, _ = self._hift.inference(self._mel, finalize=finalize)
        new = speech[0, self._sent :]
        self._sent += len(new)
        return new


def _fade_in(new: Tensor, old: Tensor) -> Tensor:
    """Cross-fade the start of `new` `[1, n]` with all of `old` `[1, m]` by the halves of a Hamming window."""
    length = old.shape[1]
    window = torch.from_numpy(np.hamming(2 * length)).to(new.device)
    faded = new[:, :length] * window[:length] + old * window[length:]
    return torch.cat([faded.to(new.dtype), new[:, length:]], dim=1)
