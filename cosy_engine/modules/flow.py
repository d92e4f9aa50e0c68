"""From speech tokens to mel: the flow of CosyVoice2 (conformer and U-Net) and of CosyVoice3 (look-ahead and DiT)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.errors import InvalidRequestError
from cosy_engine.modules.child_state import child_state
from cosy_engine.modules.flow_matching import CausalConditionalCFM, Trajectory
from cosy_engine.modules.options import require
from cosy_engine.modules.streaming import State
from cosy_engine.modules.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder


class _CausalMaskedDiff(nn.Module):
    """What both flows share; a subclass says how tokens become `mu` and how long a chunk of its masks is.

    Attributes:
        chunk_size: tokens in a chunk of the streaming masks.
        pre_lookahead_len: tokens after a chunk that it needs.
        token_mel_ratio: mel frames a token.
        input_frame_rate: tokens a second.
        vocab_size: number of speech tokens.
    """

    chunk_size: int

    def __init__(
        self,
        *,
        input_size: int,
        output_size: int,
        spk_embed_dim: int,
        output_type: str,
        vocab_size: int,
        input_frame_rate: int,
        only_mask_loss: bool,
        token_mel_ratio: int,
        pre_lookahead_len: int,
        decoder: CausalConditionalCFM,
    ) -> None:
        super().__init__()
        require(output_type=(output_type, "mel"), only_mask_loss=(only_mask_loss, True))
        self.vocab_size = vocab_size
        self.input_frame_rate = input_frame_rate
        self.token_mel_ratio = token_mel_ratio
        self.pre_lookahead_len = pre_lookahead_len
        self.input_embedding = nn.Embedding(vocab_size, input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, output_size)
        self.decoder = decoder

    def encode(
        self, xs: Tensor, xs_lens: Tensor | None, context: Tensor | None, streaming: bool, state: State | None
    ) -> Tensor:
        """`mu [B, token_mel_ratio*n, 80]` of embedded tokens `[B, n, input_size]`; see `UpsampleConformerEncoder`."""
        raise NotImplementedError

    def project_speaker(self, embedding: Tensor) -> Tensor:
        """Speaker embedding `[B, 192]`, of any length, to `spks [B, 80]`."""
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1))

    def encode_chunk(self, token: Tensor, state: State | None, *, streaming: bool = True, finalize: bool) -> Tensor:
        """`mu [B, 80, token_mel_ratio*n]` of the next tokens; the arguments are those of `begin_chunk`.

        Tokens of several streams may come together, with a state of `stack_states`.

        Raises:
            InvalidRequestError: no token is left after the look-ahead.
        """
        new = token.shape[1] - (0 if finalize else self.pre_lookahead_len)
        if new < 1:
            raise InvalidRequestError(
                f"{token.shape[1]} speech tokens are too few for a chunk with finalize={finalize}."
            )
        xs = self.input_embedding(token.clamp(min=0))
        return self.encode(xs[:, :new], None, xs[:, new:], streaming, state).transpose(1, 2)

    def begin_chunk(
        self,
        token: Tensor,
        cond: Tensor,
        spks: Tensor,
        state: State | None,
        *,
        streaming: bool = True,
        finalize: bool,
        n_timesteps: int | None = None,
        mu: Tensor | None = None,
    ) -> Trajectory:
        """The next tokens, prompt tokens included, on their way to mel `[B, 80, token_mel_ratio*n]`.

        Args:
            token: int `[B, n]`; without `finalize`, `[B, n + pre_lookahead_len]`: the last ones are only looked at and
                are fed again with the next chunk.
            cond: `[B, 80, token_mel_ratio*n]`, the prompt's mel on the prompt's frames, 0 elsewhere.
            spks: `[B, 80]`, of `project_speaker`.
            state: of `streaming.init_state`, where the stream stands; None: this is all of it.
            streaming: use the chunk masks; without them the tokens have to be all there are.
            finalize: nothing follows these tokens.
            n_timesteps: Euler steps; None: as many as the model directory says, 10 if it does not.
            mu: of `encode_chunk`, if the tokens have been there.

        Raises:
            InvalidRequestError: no token is left after the look-ahead, or the stream is longer than five minutes.
        """
        if mu is None:
            mu = self.encode_chunk(token, state, streaming=streaming, finalize=finalize)
        return self.decoder.begin(
            mu=mu,
            mask=None,
            n_timesteps=n_timesteps,
            spks=spks,
            cond=cond,
            streaming=streaming,
            state=child_state(state, "decoder"),
        )

    def forward_chunk(self, token: Tensor, cond: Tensor, spks: Tensor, state: State | None, **options: Any) -> Tensor:
        """Mel `[B, 80, token_mel_ratio*n]` of the next tokens; the arguments are those of `begin_chunk`."""
        return self.decoder.solve(self.begin_chunk(token, cond, spks, state, **options))

    def begin_inference(
        self,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        *,
        streaming: bool,
        finalize: bool,
        n_timesteps: int | None = None,
    ) -> Trajectory:
        """`token` from a fresh start, on its way to mel with the prompt's frames.

        Args:
            token: int `[1, n]`; prompt_token: int `[1, p]`.
            prompt_feat: `[1, f, 80]`, the prompt's mel.
            embedding: `[1, 192]`, the speaker embedding.
            streaming, finalize, n_timesteps: as in `begin_chunk`.
        """
        token = torch.cat([prompt_token, token], dim=1)
        new = token.shape[1] - (0 if finalize else self.pre_lookahead_len)
        cond = F.pad(prompt_feat.transpose(1, 2), (0, self.token_mel_ratio * new - prompt_feat.shape[1]))
        return self.begin_chunk(
            token,
            cond,
            self.project_speaker(embedding),
            None,
            streaming=streaming,
            finalize=finalize,
            n_timesteps=n_timesteps,
        )

    def inference(
        self, token: Tensor, prompt_token: Tensor, prompt_feat: Tensor, embedding: Tensor, **options: Any
    ) -> Tensor:
        """Mel of `token` from a fresh start, without the prompt's frames; the arguments are those of `begin_inference`.

        Returns:
            mel `[1, 80, token_mel_ratio*(p + n) - f]`, less those of the look-ahead unless `finalize`.
        """
        trajectory = self.begin_inference(token, prompt_token, prompt_feat, embedding, **options)
        return self.decoder.solve(trajectory)[:, :, prompt_feat.shape[1] :]

    def forward(
        self, token: Tensor, token_len: Tensor, feat: Tensor, embedding: Tensor, streaming: bool = False
    ) -> Tensor:
        """Training loss of a batch; half of its items get up to 30 % of their mel as prompt.

        Args:
            token: int `[B, n]`, the first `token_len [B]` of each row are not padding.
            feat: `[B, token_mel_ratio*n, 80]`, the recorded mel.
            embedding: `[B, 192]`, the speaker embedding.
            streaming: use the chunk masks; the public models saw them in half of their batches.
        """
        feat_len = token_len * self.token_mel_ratio
        token_mask = torch.arange(token.shape[1], device=token.device) < token_len[:, None]
        feat_position = torch.arange(feat.shape[1], device=feat.device)
        mask = (feat_position < feat_len[:, None])[:, None].to(feat.dtype)

        xs = self.input_embedding(token.clamp(min=0)) * token_mask[:, :, None]
        mu = self.encode(xs, token_len, None, streaming, None)
        given, share = torch.rand(2, len(feat), device=feat.device)
        prompt_len = (given < 0.5) * (share * 0.3 * feat_len).long()
        cond = feat * (feat_position < prompt_len[:, None])[:, :, None]
        spks = self.project_speaker(embedding)
        mel, mu, cond = (frames.transpose(1, 2) for frames in (feat, mu, cond))
        return self.decoder.compute_loss(mel, mask, mu, spks, cond, streaming)


class CausalMaskedDiffWithXvec(_CausalMaskedDiff):
    """CosyVoice2's flow. Training-only arguments are accepted: the loss is always masked."""

    def __init__(
        self,
        input_size: int = 512,
        output_size: int = 80,
        spk_embed_dim: int = 192,
        output_type: str = "mel",
        vocab_size: int = 6561,
        input_frame_rate: int = 25,
        only_mask_loss: bool = True,
        token_mel_ratio: int = 2,
        pre_lookahead_len: int = 3,
        *,
        encoder: UpsampleConformerEncoder,
        decoder: CausalConditionalCFM,
    ) -> None:
        super().__init__(
            input_size=input_size,
            output_size=output_size,
            spk_embed_dim=spk_embed_dim,
            output_type=output_type,
            vocab_size=vocab_size,
            input_frame_rate=input_frame_rate,
            only_mask_loss=only_mask_loss,
            token_mel_ratio=token_mel_ratio,
            pre_lookahead_len=pre_lookahead_len,
            decoder=decoder,
        )
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.output_size, output_size)
        self.chunk_size = encoder.static_chunk_size

    def encode(
        self, xs: Tensor, xs_lens: Tensor | None, context: Tensor | None, streaming: bool, state: State | None
    ) -> Tensor:
        features, _ = self.encoder(xs, xs_lens, context, streaming, child_state(state, "encoder"))
        return self.encoder_proj(features)


class CausalMaskedDiffWithDiT(_CausalMaskedDiff):
    """CosyVoice3's flow. Training-only arguments are accepted: the loss is always masked."""

    def __init__(
        self,
        input_size: int = 80,
        output_size: int = 80,
        spk_embed_dim: int = 192,
        output_type: str = "mel",
        vocab_size: int = 6561,
        input_frame_rate: int = 25,
        only_mask_loss: bool = True,
        token_mel_ratio: int = 2,
        pre_lookahead_len: int = 3,
        *,
        pre_lookahead_layer: PreLookaheadLayer,
        decoder: CausalConditionalCFM,
    ) -> None:
        super().__init__(
            input_size=input_size,
            output_size=output_size,
            spk_embed_dim=spk_embed_dim,
            output_type=output_type,
            vocab_size=vocab_size,
            input_frame_rate=input_frame_rate,
            only_mask_loss=only_mask_loss,
            token_mel_ratio=token_mel_ratio,
            pre_lookahead_len=pre_lookahead_len,
            decoder=decoder,
        )
        self.pre_lookahead_layer = pre_lookahead_layer
        self.chunk_size = decoder.estimator.static_chunk_size // token_mel_ratio

    def encode(
        self, xs: Tensor, xs_lens: Tensor | None, context: Tensor | None, streaming: bool, state: State | None
    ) -> Tensor:
        mixed = self.pre_lookahead_layer(xs, context, child_state(state, "pre_lookahead_layer"))
        return mixed.repeat_interleave(self.token_mel_ratio, dim=1)
