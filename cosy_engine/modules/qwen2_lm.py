"""The speech language models: a Qwen2 backbone that continues text with speech codes.

The backbone's parameters are those of transformers' `Qwen2ForCausalLM`, so that public checkpoints load as they are.
The forward pass is written here: it is the same arithmetic with a cache that grows in place, and it leaves out the
text head, which speech never uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from cosy_engine.errors import ModelDirectoryError

IGNORE = -1
_SMALLEST_CAPACITY = 256


@dataclass
class KVCache:
    """What a backbone remembers of one sequence (or of a batch in lock step). Starts empty; belongs to the request."""

    length: int = 0
    capacity: int = 0  # a power of two
    keys: Tensor | None = None  # [layers, B, key heads, capacity, head size], `length` filled, finite numbers after it
    values: Tensor | None = None
    cosine: Tensor | None = None  # rotary tables [capacity, head size]
    sine: Tensor | None = None


class Qwen2Encoder(nn.Module):
    """Qwen2 without its text head, from input embeddings to the hidden states after the final norm.

    Args:
        pretrain_path: a directory whose `config.json` gives the sizes (nothing else in it is read), or the
            configuration itself.

    Raises:
        ModelDirectoryError: `config.json` is missing or is not a Qwen2 configuration.
    """

    def __init__(self, pretrain_path: str | Path | Mapping[str, Any] | Qwen2Config) -> None:
        super().__init__()
        config = pretrain_path if isinstance(pretrain_path, Qwen2Config) else _read_qwen2_config(pretrain_path)
        self.model = Qwen2ForCausalLM(config)
        del (
            self.model.model.rotary_emb
        )  # the cache has its tables; without this buffer a module made on "meta" loads whole
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        self.norm_eps = config.rms_norm_eps
        self.rope_theta = float(config.rope_parameters["rope_theta"])
        self.single_step: Callable[[Tensor, KVCache], Tensor] | None = None  # a faster way to feed one position

    def forward(self, embeddings: Tensor, cache: KVCache | None = None) -> Tensor:
        """Feed `embeddings` [B, T, D] after what `cache` holds and extend it; returns hidden states [B, T, D]."""
        if cache is None:
            cosine, sine = self._rotary(embeddings.shape[1], embeddings)
            return self._layers(embeddings, cosine, sine, self._seen(embeddings, 0), lambda _, *new: new)
        if self.single_step is not None and embeddings.shape[:2] == (1, 1) and cache.length:
            return self.single_step(embeddings, cache)
        return self.extend(embeddings, cache)

    def extend(self, embeddings: Tensor, cache: KVCache) -> Tensor:
        """`forward`, always by the layers as they are."""
        start, end = cache.length, cache.length + embeddings.shape[1]
        self.reserve(cache, end, embeddings)
        keys, values = cache.keys[..., :end, :].unbind(), cache.values[..., :end, :].unbind()

        def remember(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            keys[layer][:, :, start:] = key
            values[layer][:, :, start:] = value
            return keys[layer], values[layer]

        cosine, sine = cache.cosine[start:end], cache.sine[start:end]
        cache.length = end
        return self._layers(embeddings, cosine, sine, self._seen(embeddings, start), remember)

    def step(self, embeddings: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """`forward` of one position [B, 1, D] with shapes that do not depend on how many came before it, so that it can
        be recorded and run again: `position` [1] says how many, and `cache`, whose length is not looked at, has room.
        """
        mask = torch.arange(cache.capacity, device=position.device) <= position

        def remember(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = cache.keys[layer], cache.values[layer]
            return keys.index_copy_(2, position, key), values.index_copy_(2, position, value)

        return self._layers(embeddings, cache.cosine[position], cache.sine[position], mask.unsqueeze(0), remember)

    def reserve(self, cache: KVCache, count: int, like: Tensor) -> None:
        """Room for `count` positions of `like`'s batch, dtype and device."""
        if count <= cache.capacity:
            return
        capacity = max(_SMALLEST_CAPACITY, 1 << (count - 1).bit_length())
        shape = (len(self.model.model.layers), like.shape[0], self.key_heads, capacity, self.head_size)
        for side in ("keys", "values"):
            grown = like.new_zeros(shape)
            if cache.length:
                grown[..., : cache.length, :] = getattr(cache, side)[..., : cache.length, :]
            setattr(cache, side, grown)
        cache.cosine, cache.sine = self._rotary(capacity, like)
        cache.capacity = capacity

    def _layers(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        mask: Tensor | None,
        remember: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """All layers and the final norm, on [B, T, D].

        Args:
            cosine, sine: rotary tables of the T positions.
            mask: [T, keys], True where a key is seen; None if all are.
            remember: takes a layer's number and its T new keys and values [B, key heads, T, head size], and returns
                all that are attended to.
        """
        batch, new, _ = x.shape
        if mask is not None:  # the queries that share a key head stand one after the other
            mask = mask.repeat(self.queries_per_key, 1)
        for number, layer in enumerate(self.model.model.layers):
            attention = layer.self_attn
            h = self._norm(x, layer.input_layernorm)
            heads = torch.cat([attention.q_proj(h), attention.k_proj(h)], dim=-1)
            heads = heads.view(batch, new, -1, self.head_size).transpose(1, 2)
            heads = torch.addcmul(heads * cosine, heads.roll(self.head_size // 2, dims=-1), sine)
            query, key = heads.split([heads.shape[1] - self.key_heads, self.key_heads], dim=1)
            value = attention.v_proj(h).view(batch, new, -1, self.head_size).transpose(1, 2)
            keys, values = remember(number, key, value)
            query = query.reshape(batch, self.key_heads, -1, self.head_size)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            mixed = mixed.reshape(batch, -1, new, self.head_size).transpose(1, 2)
            x = x + attention.o_proj(mixed.reshape(batch, new, -1))
            x = x + layer.mlp(self._norm(x, layer.post_attention_layernorm))
        return self._norm(x, self.model.model.norm)

    @staticmethod
    def _seen(embeddings: Tensor, start: int) -> Tensor | None:
        """Which keys each of the positions from `start` on sees: [T, start + T]; None if it is a single one."""
        new = embeddings.shape[1]
        everything = torch.ones(new, start + new, dtype=torch.bool, device=embeddings.device)
        return everything.tril(start) if new > 1 else None

    def _norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), norm.weight, self.norm_eps)

    def _rotary(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [count, head size] of the first positions, in `like`'s dtype."""
        exponents = torch.arange(0, self.head_size, 2, device=like.device) / self.head_size
        angles = torch.outer(torch.arange(count, device=like.device).float(), self.rope_theta**-exponents)
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([cosine, cosine], dim=-1).to(like.dtype), torch.cat([-sine, sine], dim=-1).to(like.dtype)


def _read_qwen2_config(source: str | Path | Mapping[str, Any]) -> Qwen2Config:
    if not isinstance(source, Mapping):
        path = Path(source) / "config.json"
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelDirectoryError(f"Cannot read the text model's configuration {path}: {error}") from error
    if not isinstance(source, Mapping) or source.get("model_type", "qwen2") != "qwen2":
        raise ModelDirectoryError("The text model's configuration is not one of a Qwen2 model.")
    return Qwen2Config.from_dict(dict(source))


class _SpeechCodeLM(nn.Module):
    """What both generations share. Ids below `speech_token_size` are speech codes; all others end the speech, but for
    `fill_token`, which follows a block of it in text streaming."""

    llm: Qwen2Encoder
    speech_embedding: nn.Embedding
    llm_decoder: nn.Linear
    speech_token_size: int
    eos_token: int
    fill_token: int
    mix_ratio: tuple[int, int]  # text tokens : speech codes of a block in text streaming

    def __init__(
        self,
        llm: Qwen2Encoder,
        speech_token_size: int,
        mix_ratio: Sequence[int],
        length_normalized_loss: bool,
        lsm_weight: float,
        sampling: object,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.speech_token_size = speech_token_size
        self.mix_ratio = (mix_ratio[0], mix_ratio[1])
        self.length_normalized_loss = length_normalized_loss
        self.lsm_weight = lsm_weight
        self.sampling = sampling

    @property
    def sos(self) -> Tensor:
        """Embedding [1, 1, D] that starts every sequence."""
        raise NotImplementedError

    @property
    def task_id(self) -> Tensor:
        """Embedding [1, 1, D] between the text and the speech."""
        raise NotImplementedError

    def embed_text(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Text token ids (n of them) -> [1, n, D]."""
        return _embed(self.llm.model.model.embed_tokens, ids)

    def embed_speech(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Speech codes, or the model's own special ids (n of them) -> [1, n, D]."""
        return _embed(self.speech_embedding, ids)

    def prompt(self, text: Sequence[int], prompt_speech: Sequence[int]) -> Tensor:
        """What generation starts from, [sos, text, task id, prompt speech]: [1, n, D]. `text` includes the prompt's."""
        return torch.cat([self.sos, self.embed_text(text), self.task_id, self.embed_speech(prompt_speech)], dim=1)

    def next_scores(self, embeddings: Tensor, cache: KVCache) -> Tensor:
        """Feed `embeddings` [B, n, D] after what `cache` holds; log-probabilities [B, V], float32, of the next id."""
        hidden = self.llm(embeddings, cache)
        return self.llm_decoder(hidden[:, -1]).float().log_softmax(dim=-1)

    def loss(self, text: Tensor, text_len: Tensor, speech: Tensor, speech_len: Tensor) -> Tensor:
        """Cross entropy of the speech codes and the end after them, given the text: a scalar.

        Args:
            text: text token ids [B, n], right-padded; text_len [B].
            speech: speech codes [B, m], right-padded; speech_len [B].
        """
        inputs, targets = [], []
        for words, codes in zip(_unpad(text, text_len), _unpad(speech, speech_len), strict=True):
            inputs.append(self.prompt(words, codes)[0])
            silent = codes.new_full((1 + len(words),), IGNORE)
            targets.append(torch.cat([silent, codes, codes.new_tensor([self.eos_token])]))
        hidden = self.llm(nn.utils.rnn.pad_sequence(inputs, batch_first=True))
        target = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE).long()
        counted = target != IGNORE
        total = F.cross_entropy(
            self.llm_decoder(hidden[counted]).float(), target[counted], label_smoothing=self.lsm_weight, reduction="sum"
        )
        return total / (counted.sum() if self.length_normalized_loss else len(text))


class Qwen2LM(_SpeechCodeLM):
    """CosyVoice2's speech LM. Beside the codes it knows an end, a second stop id and the fill id; sos and task id are
    rows 0 and 1 of an embedding of their own.

    Args:
        llm_input_size, llm_output_size: width of the backbone.
        speech_token_size: number of speech codes.
        llm: the backbone.
        sampling: the sampling settings of the model directory, kept for whoever builds requests.
        length_normalized_loss, lsm_weight: average over codes rather than sequences, and label smoothing (training).
        mix_ratio: text tokens and speech codes of a block in text streaming.
    """

    def __init__(
        self,
        llm_input_size: int,
        llm_output_size: int,
        speech_token_size: int,
        llm: Qwen2Encoder,
        sampling: object = None,
        length_normalized_loss: bool = True,
        lsm_weight: float = 0.0,
        mix_ratio: Sequence[int] = (5, 15),
    ) -> None:
        super().__init__(llm, speech_token_size, mix_ratio, length_normalized_loss, lsm_weight, sampling)
        self.eos_token = speech_token_size
        self.fill_token = speech_token_size + 2
        self.llm_embedding = nn.Embedding(2, llm_input_size)
        self.speech_embedding = nn.Embedding(speech_token_size + 3, llm_input_size)
        self.llm_decoder = nn.Linear(llm_output_size, speech_token_size + 3)

    @property
    def sos(self) -> Tensor:
        return self.llm_embedding.weight[None, 0:1]

    @property
    def task_id(self) -> Tensor:
        return self.llm_embedding.weight[None, 1:2]


class CosyVoice3LM(_SpeechCodeLM):
    """CosyVoice3's speech LM: 200 special ids after the codes, of which the first four are sos, end, task id and fill.

    Args: as `Qwen2LM`.
    """

    def __init__(
        self,
        llm_input_size: int,
        llm_output_size: int,
        speech_token_size: int,
        llm: Qwen2Encoder,
        sampling: object = None,
        length_normalized_loss: bool = True,
        lsm_weight: float = 0.0,
        mix_ratio: Sequence[int] = (5, 15),
    ) -> None:
        super().__init__(llm, speech_token_size, mix_ratio, length_normalized_loss, lsm_weight, sampling)
        self.eos_token = speech_token_size + 1
        self.fill_token = speech_token_size + 3
        self.speech_embedding = nn.Embedding(speech_token_size + 200, llm_input_size)
        self.llm_decoder = nn.Linear(llm_output_size, speech_token_size + 200, bias=False)

    @property
    def sos(self) -> Tensor:
        return self.speech_embedding.weight[None, self.speech_token_size : self.speech_token_size + 1]

    @property
    def task_id(self) -> Tensor:
        return self.speech_embedding.weight[None, self.speech_token_size + 2 : self.speech_token_size + 3]


def _embed(embedding: nn.Embedding, ids: Sequence[int] | Tensor) -> Tensor:
    return embedding(torch.as_tensor(ids, dtype=torch.long, device=embedding.weight.device)).unsqueeze(0)


def _unpad(padded: Tensor, lengths: Tensor) -> list[Tensor]:
    return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]
