"""Stage d: the HiFT vocoder, mel -> waveform.

    python -m recipes.embedded.vocoder --corpus plain slow ... --kit KIT --checkpoint vocoder.pt
    python -m recipes.embedded.vocoder ... --flow flow.pt --speech-tokenizer ... --speaker-encoder ... \
        --checkpoint vocoder.pt --time-limit 90        # goes on with half of the mels made by the flow

The pitch predictor learns the pitch that YIN finds. The generator begins with spectral losses alone; after a while the
discriminators join. Real recordings are left out: they end at 8 kHz.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cosy_engine.modules.f0_predictor import ConvRNNF0Predictor
from cosy_engine.modules.flow_matching import euler_steps
from cosy_engine.modules.hift import HiFTGenerator
from recipes.embedded.data import Speech
from recipes.embedded.discriminators import Discriminators, discriminator_loss, generator_losses
from recipes.embedded.features import CODE_HOP, HOP, SAMPLE_RATE, log_mel, mel_24k_padded
from recipes.embedded.flow import Stage as FlowStage
from recipes.embedded.library import Library, load_speaker_encoder, load_tokenizer
from recipes.embedded.training import Average, Differentiated, Run, adamw, add_arguments, is_main, load_average, setup

FRAMES = 40  # of a training segment
MARGIN = 720  # samples of context that a mel frame needs at either side
SPECTRA = ((512, 128, 64), (1024, 256, 80), (2048, 512, 128))  # FFT size, hop, mel bins
MEL_ONLY = 0.12  # share of the time before the discriminators join

HIFT = {
    "in_channels": 80,
    "base_channels": 192,
    "nb_harmonics": 8,
    "sampling_rate": SAMPLE_RATE,
    "nsf_alpha": 0.1,
    "nsf_sigma": 0.003,
    "nsf_voiced_threshold": 10,
    "upsample_rates": [8, 5, 3],
    "upsample_kernel_sizes": [16, 11, 7],
    "istft_params": {"n_fft": 16, "hop_len": 4},
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "source_resblock_kernel_sizes": [7, 7, 11],
    "source_resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "lrelu_slope": 0.1,
    "audio_limit": 0.99,
}
F0 = {"num_class": 1, "in_channels": 80, "cond_channels": 160}


def build_vocoder() -> HiFTGenerator:
    """HiFT at the embedded model's size."""
    return HiFTGenerator(**HIFT, f0_predictor=ConvRNNF0Predictor(**F0))


class Recorded:
    """Segments of the corpus with their own mel."""

    def __init__(self, speech: Speech) -> None:
        self.speech = speech

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """mel [count, 80, FRAMES], samples [count, FRAMES * HOP], pitch [count, FRAMES] in Hz."""
        speech = self.speech
        rows = speech.random_rows(count)
        room = (speech.length[rows] // HOP - FRAMES).clamp(min=1)
        offset = (torch.rand(count, device=speech.device) * room).long() * HOP
        padded = speech.waveform(rows, offset - MARGIN, FRAMES * HOP + 2 * MARGIN)
        padded = padded * 10 ** ((torch.rand(count, 1, device=speech.device) - 0.6) * 0.6)
        moment = offset[:, None] + torch.arange(FRAMES, device=speech.device) * HOP
        return mel_24k_padded(padded), padded[:, MARGIN:-MARGIN], speech.pitch_at(rows, moment)


class FlowMade:
    """Segments whose mel the flow has made from their codes and another utterance's prompt.

    It starts from the recorded mel under noise, FIRST_STEP steps on its way: so the mel has the flow's flaws, but the
    recording's pitch, without which the waveform would not be what the mel says.

    Args:
        crops: how many crops of TARGET codes to make.
    """

    PROMPT, TARGET = 50, 75
    STEPS, FIRST_STEP = 10, 5

    def __init__(self, speech: Speech, flow: nn.Module, library: Library, crops: int, batch: int) -> None:
        device = speech.device
        self.speech = speech
        long_enough = torch.nonzero(library.count > self.TARGET + 1)[:, 0]
        by_speaker = [long_enough[speech.speaker[long_enough] == number] for number in range(len(speech.speakers))]
        rows = long_enough[torch.randint(len(long_enough), (crops,), device=device)]
        candidates = [by_speaker[number] for number in speech.speaker[rows].tolist()]
        prompts = torch.stack([same[torch.randint(len(same), (), device=device)] for same in candidates])
        self.rows = rows
        self.first = (torch.rand(crops, device=device) * (library.count[rows] - self.TARGET)).long()
        mel = library.mel.view(-1, 2, 80)
        made = []
        for some in torch.arange(crops, device=device).split(batch):
            given = library.start[prompts[some], None] + torch.arange(self.PROMPT, device=device)
            wanted = (library.start[rows[some]] + self.first[some])[:, None] + torch.arange(self.TARGET, device=device)
            place = torch.cat([given, wanted], 1)
            recorded = mel[place].float().flatten(1, 2).transpose(1, 2)
            spks = flow.project_speaker(library.embedding[prompts[some]])
            whole = self._remake(flow, library.codes[place].long(), spks, recorded, streaming=len(made) % 2 == 0)
            made.append(whole[:, :, 2 * self.PROMPT :].half())
        self.mel = torch.cat(made)

    @torch.no_grad()
    def _remake(self, flow: nn.Module, codes: Tensor, spks: Tensor, recorded: Tensor, streaming: bool) -> Tensor:
        """`recorded` [batch, 80, frames] as the flow would have it; the engine's steps from FIRST_STEP on."""
        mu = flow.encode(flow.input_embedding(codes), None, None, streaming, None).transpose(1, 2)
        cond = recorded.clone()
        cond[:, :, 2 * self.PROMPT :] = 0
        given = [torch.cat([value, torch.zeros_like(value)]) for value in (mu, spks, cond)]
        steps = euler_steps(self.STEPS)[self.FIRST_STEP :]
        x = (1 - steps[0][0]) * torch.randn_like(recorded) + steps[0][0] * recorded
        guidance = flow.decoder.inference_cfg_rate
        for t, dt in steps:
            moment = torch.full((2 * len(x),), t, device=x.device)
            velocity = flow.decoder.estimator(
                torch.cat([x, x]), None, given[0], moment, given[1], given[2], streaming=streaming
            )
            guided, unguided = velocity.chunk(2)
            x = x + dt * ((1 + guidance) * guided - guidance * unguided)
        return x

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `Recorded.draw`."""
        device = self.speech.device
        crop = torch.randint(len(self.rows), (count,), device=device)
        frame = torch.randint(2 * self.TARGET - FRAMES, (count,), device=device)
        place = frame[:, None] + torch.arange(FRAMES, device=device)
        mel = self.mel[crop[:, None], :, place].float().transpose(1, 2)
        offset = self.first[crop] * CODE_HOP + frame * HOP
        samples = self.speech.waveform(self.rows[crop], offset, FRAMES * HOP)
        moment = offset[:, None] + torch.arange(FRAMES, device=device) * HOP
        return mel, samples, self.speech.pitch_at(self.rows[crop], moment)


def spectral_loss(made: Tensor, real: Tensor) -> Tensor:
    """Mean distance of log-mel spectra over all SPECTRA."""
    total = made.new_zeros(())
    for n_fft, hop, bins in SPECTRA:
        pair = log_mel(torch.cat([made, real]), n_fft, hop, bins, 12000.0)
        total = total + (pair[: len(made)] - pair[len(made) :]).abs().mean()
    return total / len(SPECTRA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, time_limit=600, learning_rate=5e-4, batch=48)
    parser.add_argument("--flow", type=Path, help="checkpoint of stage c: train on its mels too")
    parser.add_argument("--speech-tokenizer", type=Path, help="with --flow: checkpoint of stage a")
    parser.add_argument("--speaker-encoder", type=Path, help="with --flow: checkpoint of stage b")
    parser.add_argument("--crops", type=int, default=4000, help="with --flow: three-second crops to make")
    arguments = parser.parse_args()
    device = setup(arguments)
    limit = arguments.crops if arguments.flow else None  # utterances a folder; few are needed, so they load fast
    speech = Speech(arguments.corpus, arguments.kit, device, limit=limit)
    speech.add_pitch()
    sources: list[Recorded | FlowMade] = [Recorded(speech)]
    if arguments.flow:
        tokenizer = load_tokenizer(arguments.speech_tokenizer, device)
        encoder = load_speaker_encoder(arguments.speaker_encoder, device)
        trained = load_average(arguments.flow, FlowStage()).flow.to(device)
        rendering = Library(speech, tokenizer, encoder)
        sources.append(FlowMade(speech, trained, rendering, arguments.crops, arguments.batch * 2))
        del trained, rendering
    model, judges = build_vocoder().to(device), Discriminators().to(device)
    average = Average(model, 0.999)
    optimizer = adamw(model.parameters(), arguments.learning_rate, betas=(0.8, 0.99))
    judge_optimizer = adamw(judges.parameters(), arguments.learning_rate, betas=(0.8, 0.99))
    parts = {"model": model, "average": average, "judges": judges}
    parts |= {"optimizer": optimizer, "judge_optimizer": judge_optimizer}
    run = Run(arguments, parts, [optimizer, judge_optimizer], warmup=0.02, clip=5.0)
    resumed = run.first_step > 0
    harmonics = HIFT["nb_harmonics"] + 1

    def losses(mel: Tensor, real: Tensor, pitch: Tensor, judged: bool) -> dict[str, Tensor]:
        said_pitch = model.f0_predictor(mel)
        pitch_loss = (said_pitch - pitch).abs().mean() / 50
        noise = torch.randn(len(mel), FRAMES * HOP, harmonics, device=device)
        made = model.decode(mel, model.m_source(said_pitch.detach() if judged else pitch, noise=noise))
        spectral = spectral_loss(made, real)
        values = {"spectral": spectral, "pitch": pitch_loss, "loss": 15 * spectral + pitch_loss}
        if judged:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                verdicts = judges(torch.cat([real, made.detach()]))
                halves = [((s[: len(real)], [f[: len(real)] for f in fs]), (s[len(real) :], fs)) for s, fs in verdicts]
                fixed = {name: parameter.detach() for name, parameter in judges.named_parameters()}
                judged_made = torch.func.functional_call(judges, fixed, made)
            judge_loss = discriminator_loss([real_half for real_half, _ in halves], [half for _, half in halves])
            adversarial, features = generator_losses([real_half for real_half, _ in halves], judged_made)
            values |= {"judges": judge_loss, "adversarial": adversarial, "features": features}
            values["loss"] = values["loss"] + adversarial + 4 * features + judge_loss
        return values

    both = nn.ModuleList([model, judges])
    alone, judged = (
        Differentiated(partial(losses, judged=value), both, eager=arguments.eager) for value in (False, True)
    )
    if is_main():
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{speech.hours:.1f} h, vocoder of {size / 1e6:.2f} M", flush=True)
    for step in run:
        drawn = [source.draw(arguments.batch // len(sources)) for source in sources]
        mel, real, pitch = (torch.cat(values) for values in zip(*drawn, strict=True))
        if resumed or run.fraction > MEL_ONLY:
            values = judged(mel=mel, real=real, pitch=pitch)
            run.step(judge_optimizer)
        else:
            values = alone(mel=mel, real=real, pitch=pitch)
        run.step(optimizer)
        average.update(step)
        run.log(**values)


if __name__ == "__main__":
    main()
