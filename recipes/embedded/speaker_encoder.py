"""Stage b: the speaker encoder.

    python -m recipes.embedded.speaker_encoder --corpus plain ... --kit KIT --checkpoint speaker_encoder.pt

Learns to tell speakers apart with an additive angular margin (arXiv 1801.07698). A speaker played 10 % faster or slower
counts as another one: three times as many voices, and the space between them is filled.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.embedded.data import STYLES, Speech, distort, normalised_fbank
from recipes.embedded.features import SAMPLE_RATE, resample
from recipes.embedded.networks import SpeakerEncoder
from recipes.embedded.training import Average, Differentiated, Run, adamw, add_arguments, is_main, setup

SECONDS = 3
RATIOS = (1.0, 0.9, 1.1)


class Stage(nn.Module):
    """Encoder and one direction a voice."""

    def __init__(self, voices: int) -> None:
        super().__init__()
        self.encoder = SpeakerEncoder()
        self.voices = nn.Parameter(torch.randn(voices, 192))

    def forward(self, fbank: Tensor, voice: Tensor, margin: Tensor) -> dict[str, Tensor]:
        embedding = self.encoder(fbank).float()
        cosine = F.normalize(embedding) @ F.normalize(self.voices).T
        own = torch.arange(len(self.voices), device=voice.device) == voice[:, None]
        angle = cosine.clamp(-0.999, 0.999).acos() + margin * own
        loss = F.cross_entropy(24 * angle.cos(), voice)
        return {"loss": loss, "accuracy": (cosine.argmax(1) == voice).float().mean()}


def make_batch(speech: Speech, rows: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Filter banks of crops played at RATIOS[kind], and the number of the voice."""
    source = round(SECONDS * SAMPLE_RATE * RATIOS[kind] / 960) * 960
    room = (speech.length[rows] - source).clamp(min=0)
    offset = (torch.rand(len(rows), device=speech.device) * (room + 1)).long()
    heard = resample(speech.waveform(rows, offset, source), SECONDS * 16000)
    return normalised_fbank(distort(heard, 0.5)), speech.speaker[rows] * len(RATIOS) + kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, time_limit=200, learning_rate=2e-3, batch=256)
    arguments = parser.parse_args()
    device = setup(arguments)
    speech = Speech(arguments.corpus, arguments.kit, device)
    weights = speech.length.float() * torch.where(speech.style == STYLES.index("real"), 2.0, 1.0)
    stage = Stage(len(speech.speakers) * len(RATIOS)).to(device)
    average = Average(stage)
    optimizer = adamw(stage.parameters(), arguments.learning_rate)
    run = Run(arguments, {"model": stage, "average": average, "optimizer": optimizer}, [optimizer])

    def losses(**batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return stage(**batch)

    differentiated = Differentiated(losses, stage, eager=arguments.eager)
    if is_main():
        size = sum(parameter.numel() for parameter in stage.encoder.parameters())
        print(f"{len(speech.speakers)} speakers, encoder of {size / 1e6:.2f} M", flush=True)
    for step in run:
        fbank, voice = make_batch(speech, speech.random_rows(arguments.batch, weights), step % len(RATIOS))
        margin = torch.full((), 0.2 * min(1.0, 2 * run.fraction), device=device)
        values = differentiated(fbank=fbank, voice=voice, margin=margin)
        run.step(optimizer)
        average.update(step)
        run.log(**values)


if __name__ == "__main__":
    main()
