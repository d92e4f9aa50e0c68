"""Stage c: the flow, codes -> mel.

    python -m recipes.embedded.flow --corpus plain ... --kit KIT --speech-tokenizer speech_tokenizer.pt \
        --speaker-encoder speaker_encoder.pt --checkpoint flow.pt

A training sequence is what the engine makes: codes of a prompt, then codes of another utterance of the same voice; the
prompt's mel and the prompt's speaker embedding are given. The loss counts the frames after the prompt. One batch in
five has longer sequences of four utterances, so that attention knows the distances of long prompts and texts. Half of
the batches use the chunk masks of streaming; in a fifth of the rows the conditions are dropped.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cosy_engine.modules.flow import CausalMaskedDiffWithXvec
from cosy_engine.modules.flow_matching import CausalConditionalCFM
from cosy_engine.modules.unet import CausalConditionalDecoder
from cosy_engine.modules.upsample_encoder import UpsampleConformerEncoder
from recipes.embedded.data import STYLES, Speech
from recipes.embedded.features import MEAN_MEL
from recipes.embedded.library import Library, code_features, load_speaker_encoder, load_tokenizer, structured_embedding
from recipes.embedded.networks import CODES
from recipes.embedded.training import Average, Differentiated, Run, adamw, add_arguments, is_main, setup

RATIOS = (1.0, 0.91, 1.1)  # every voice, and it played slower and faster
LONGEST = 192  # codes of a training sequence of prompt and target
PROMPT = (20, 100)  # codes of its prompt
LONG, LONG_PROMPT = 448, (60, 250)  # the same of a sequence of four utterances

CFM = {
    "sigma_min": 1e-06,
    "solver": "euler",
    "t_scheduler": "cosine",
    "training_cfg_rate": 0.2,
    "inference_cfg_rate": 0.7,
    "reg_loss_type": "l1",
    "n_timesteps": 6,  # ten score 0.01 higher in P.808, and take two thirds more time
}
ENCODER = {
    "output_size": 192,
    "attention_heads": 4,
    "linear_units": 640,
    "num_blocks": 3,
    "num_up_blocks": 2,
    "dropout_rate": 0.1,
    "positional_dropout_rate": 0.1,
    "attention_dropout_rate": 0.1,
    "normalize_before": True,
    "input_layer": "linear",
    "pos_enc_layer_type": "rel_pos_espnet",
    "selfattention_layer_type": "rel_selfattn",
    "input_size": 192,
    "use_cnn_module": False,
    "macaron_style": False,
    "static_chunk_size": 25,
}
ESTIMATOR = {
    "in_channels": 320,
    "out_channels": 80,
    "channels": [192],
    "dropout": 0.0,
    "attention_head_dim": 48,
    "n_blocks": 1,
    "num_mid_blocks": 3,
    "num_heads": 4,
    "act_fn": "gelu",
    "static_chunk_size": 50,
    "num_decoding_left_chunks": -1,
}


def build_flow() -> CausalMaskedDiffWithXvec:
    """The flow at the embedded model's size."""
    estimator = CausalConditionalDecoder(**ESTIMATOR)
    decoder = CausalConditionalCFM(in_channels=240, n_spks=1, spk_emb_dim=80, cfm_params=CFM, estimator=estimator)
    encoder = UpsampleConformerEncoder(**ENCODER)
    flow = CausalMaskedDiffWithXvec(input_size=ENCODER["input_size"], encoder=encoder, decoder=decoder)
    nn.init.constant_(flow.encoder_proj.bias, MEAN_MEL)
    nn.init.constant_(estimator.final_proj.bias, MEAN_MEL)
    with torch.no_grad():
        flow.input_embedding.weight.copy_(structured_embedding(code_features(CODES), ENCODER["input_size"], 1.0))
    return flow


class Stage(nn.Module):
    """The flow and its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = build_flow()

    def forward(
        self, codes: Tensor, count: Tensor, prompt: Tensor, mel: Tensor, embedding: Tensor, streaming: bool
    ) -> dict[str, Tensor]:
        """codes [batch, n], `count` [batch] valid, `prompt` [batch] the prompt's; mel [batch, 80, 2 n]."""
        frame = torch.arange(mel.shape[2], device=mel.device)
        valid = (frame < 2 * count[:, None])[:, None].float()
        is_prompt = (frame < 2 * prompt[:, None])[:, None].float()
        counted = valid * (1 - is_prompt)
        xs = self.flow.input_embedding(codes) * valid[:, 0, ::2, None]
        mu = self.flow.encode(xs, count, None, streaming, None).transpose(1, 2)
        prior = ((mu.float() - mel).abs() * valid).sum() / (valid.sum() * 80)

        batch = len(codes)
        cfm = self.flow.decoder
        t = 1 - torch.cos(torch.rand(batch, 1, 1, device=mel.device) * (math.pi / 2))
        noise = torch.randn_like(mel)
        now = (1 - (1 - cfm.sigma_min) * t) * noise + t * mel
        kept = (torch.rand(batch, 1, 1, device=mel.device) > cfm.training_cfg_rate).float()
        spks = self.flow.project_speaker(embedding) * kept[:, 0]
        velocity = cfm.estimator(
            now, valid, mu * kept, t[:, 0, 0], spks, mel * is_prompt * kept, streaming=streaming
        ).float()
        target = mel - (1 - cfm.sigma_min) * noise
        error = (velocity - target).square() * counted
        velocity_loss = error.sum() / (counted.sum() * 80)
        return {"loss": velocity_loss + 0.3 * prior, "velocity": velocity_loss, "prior": prior}


class Pairs:
    """Draws prompts and targets of one voice from the libraries of RATIOS."""

    def __init__(self, speech: Speech, libraries: list[Library]) -> None:
        rows = len(speech)
        self.device = speech.device
        self.codes = torch.cat([library.codes for library in libraries])
        self.mel = torch.cat([library.mel for library in libraries])
        self.embedding = torch.cat([library.embedding for library in libraries])
        self.count = torch.cat([library.count for library in libraries])
        self.start = self.count.cumsum(0) - self.count
        kinds = torch.arange(len(libraries), device=self.device).repeat_interleave(rows)
        voice = kinds * len(speech.speakers) + speech.speaker.repeat(len(libraries))
        self.by_voice = voice.argsort(stable=True)
        sizes = voice.bincount()
        self.voice_first = (sizes.cumsum(0) - sizes)[voice]
        self.voice_size = sizes[voice]
        style = speech.style.repeat(len(libraries))
        real = style == STYLES.index("real")
        self.weights = self.count * torch.where(real, 1.3, 1.0) * torch.where(kinds > 0, 0.4, 1.0)

    def draw(self, batch: int, *, long: bool = False) -> dict[str, Tensor]:
        """A batch of `Stage.forward`'s arguments but for `streaming`. Sequences of crops of a prompt and a target, or
        long ones of four whole utterances, that many fewer."""
        longest = LONG if long else LONGEST
        target = torch.multinomial(self.weights, batch * LONGEST // longest, replacement=True)
        given = self._same_voice(target)
        if long:
            rows = torch.stack([given, target, self._same_voice(target), self._same_voice(target)], 1)
            start, count = self.start[rows], self.count[rows]
            prompt = torch.randint(*LONG_PROMPT, target.shape, device=self.device).minimum(count.sum(1) // 2)
        else:
            wanted = torch.randint(*PROMPT, target.shape, device=self.device)
            wanted = torch.where(torch.rand(target.shape, device=self.device) < 0.1, 0, wanted)
            prompt = torch.minimum(wanted, self.count[given])
            count = torch.stack([prompt, torch.minimum(LONGEST - prompt, self.count[target])], 1)
            rows = torch.stack([given, target], 1)
            room = self.count[rows] - count + 1
            start = self.start[rows] + (torch.rand(rows.shape, device=self.device) * room).long()
        end = count.cumsum(1)
        position = torch.arange(longest, device=self.device).expand(len(target), -1)
        part = (position[:, :, None] >= end[:, None, :-1]).sum(2)
        place = ((start - end + count).gather(1, part) + position).clamp(0, len(self.codes) - 1)
        total = end[:, -1].clamp(max=longest)
        inside = position < total[:, None]
        mel = self.mel.view(-1, 2, 80)[place].float() * inside[:, :, None, None]
        return {
            "codes": self.codes[place].long() * inside,
            "count": total,
            "prompt": prompt,
            "mel": mel.flatten(1, 2).transpose(1, 2).contiguous(),
            "embedding": self.embedding[given],
        }

    def _same_voice(self, rows: Tensor) -> Tensor:
        """An utterance of the same voice for each."""
        other = (torch.rand(rows.shape, device=self.device) * self.voice_size[rows]).long()
        return self.by_voice[self.voice_first[rows] + other]


def load_pairs(arguments: argparse.Namespace, speech: Speech) -> Pairs:
    """The libraries that this stage and the vocoder's last phase train on."""
    tokenizer = load_tokenizer(arguments.speech_tokenizer, speech.device)
    encoder = load_speaker_encoder(arguments.speaker_encoder, speech.device)
    settings = [{"ratio": ratio, "gain": (-5.0, 5.0), "distorted": 0.2 * (ratio != 1)} for ratio in RATIOS]
    return Pairs(speech, [Library(speech, tokenizer, encoder, **setting) for setting in settings])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, time_limit=480, learning_rate=1e-3, batch=64)
    parser.add_argument("--speech-tokenizer", type=Path, required=True, help="checkpoint of stage a")
    parser.add_argument("--speaker-encoder", type=Path, required=True, help="checkpoint of stage b")
    arguments = parser.parse_args()
    device = setup(arguments)
    pairs = load_pairs(arguments, Speech(arguments.corpus, arguments.kit, device))
    stage = Stage().to(device).train()
    average = Average(stage, 0.9995)
    optimizer = adamw(stage.parameters(), arguments.learning_rate)
    run = Run(arguments, {"model": stage, "average": average, "optimizer": optimizer}, [optimizer])

    def losses(**batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return stage(**batch)

    whole, chunked = (
        Differentiated(partial(losses, streaming=streaming), stage, eager=arguments.eager)
        for streaming in (False, True)
    )
    if is_main():
        size = sum(parameter.numel() for parameter in stage.parameters())
        print(f"{pairs.count.sum() / 90000:.1f} h of codes, flow of {size / 1e6:.2f} M", flush=True)
    for step in run:
        long = step % 5 == 4
        values = (whole if step % 2 else chunked)(long, **pairs.draw(arguments.batch, long=long))
        run.step(optimizer)
        average.update(step)
        run.log(**values)


if __name__ == "__main__":
    main()
