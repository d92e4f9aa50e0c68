"""What every stage's training loop needs: a clock that drives the learning rate, checkpoints, a progress line, several
GPUs, CUDA graphs, an average of the weights.

The learning rate follows the time spent, not the steps: a stage that is given 300 seconds warms up over the first 5 %
and ends at zero after 300 seconds, however fast the machine is. Start with `torchrun --nproc-per-node N` for N GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Hashable, Iterator
from math import cos, pi
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


def add_arguments(parser: argparse.ArgumentParser, *, time_limit: float, learning_rate: float, batch: int) -> None:
    """The options that all stages share."""
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="folders that make_corpus.py wrote")
    parser.add_argument("--kit", type=Path, required=True, help="folder of the data kit, for its corpus.py")
    parser.add_argument("--checkpoint", type=Path, required=True, help="read if it is there, written every minute")
    parser.add_argument("--time-limit", type=float, default=time_limit, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps of this run")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="peak; default: %(default)s")
    parser.add_argument("--batch", type=int, default=batch, help="a GPU; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)


def setup(arguments: argparse.Namespace) -> torch.device:
    """Join the other processes of torchrun, seed, allow TF32; returns this process's device."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if arguments.device == "cuda":
        arguments.device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if arguments.device.startswith("cuda") else "gloo")
    torch.manual_seed(arguments.seed * 1000 + rank)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch.device(arguments.device)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def adamw(parameters: Iterator[nn.Parameter], learning_rate: float, **options: object) -> torch.optim.AdamW:
    """AdamW as all stages use it; `options` go to torch."""
    settings = {"betas": (0.9, 0.98), "weight_decay": 0.01} | options
    return torch.optim.AdamW(parameters, learning_rate, fused=True, **settings)


class Average:
    """Exponential moving average of a module's parameters, over about the last 1 / (1 - decay) steps."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.parameters = list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], weight)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for value, name in zip(self.values, self.names, strict=True):
            value.copy_(state[name])


class Differentiated:
    """Calls `compute` and differentiates the `loss` among the values that it returns; gradients start from nothing.

    The step of a small network is bound by launching its kernels. So on a GPU the fourth call of a kind is recorded as
    a CUDA graph, and later ones replay it: `compute` must not look at values, its arguments have the same shapes in all
    calls of a kind, and it begins and ends autocast itself.

    Args:
        compute: tensors by name -> values by name.
        module: whose parameters get gradients.
    """

    EAGER_CALLS = 3

    def __init__(self, compute: Callable[..., dict[str, Tensor]], module: nn.Module, *, eager: bool = False) -> None:
        self.compute = compute
        self.parameters = list(module.parameters())
        self.eager = eager or self.parameters[0].device.type != "cuda"
        self.calls: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], dict[str, Tensor], list]] = {}

    def __call__(self, kind: Hashable = None, /, **given: Tensor) -> dict[str, Tensor]:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if self.eager or self.calls[kind] <= self.EAGER_CALLS:
            return self._differentiate(given)
        if kind not in self.graphs:
            self.graphs[kind] = self._record(given)
        graph, inputs, values, gradients = self.graphs[kind]
        for name, value in given.items():
            inputs[name].copy_(value)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in values.items()}

    def _differentiate(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        values = self.compute(**given)
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}

    def _record(self, given: dict[str, Tensor]) -> tuple:
        inputs = {name: value.clone() for name, value in given.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            values = self._differentiate(inputs)
        return graph, inputs, values, [parameter.grad for parameter in self.parameters]


class Run:
    """One stage's run.

        run = Run(arguments, {"model": model, "average": average, "optimizer": optimizer}, [optimizer])
        for step in run:
            run.step(optimizer, loss)
            run.log(loss=loss)

    Args:
        parts: what the checkpoint holds, by name; anything with state_dict and load_state_dict.
        optimizers: whose learning rate follows the clock; each group's own rate is the peak.
        warmup: share of the time limit in which the learning rate rises.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        parts: dict[str, object],
        optimizers: list[torch.optim.Optimizer],
        warmup: float = 0.05,
        clip: float = 1.0,
    ) -> None:
        self.path: Path = arguments.checkpoint
        self.device = arguments.device
        self.limit, self.max_steps = arguments.time_limit, arguments.steps
        self.parts, self.optimizers, self.warmup, self.clip = parts, optimizers, warmup, clip
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.first_step = 0
        self.fraction = 0.0  # of the time limit
        self.logged: dict[str, tuple[Tensor | float, int]] = {}  # sum and count
        if self.path.exists():
            self._load()
        for module in (part for part in parts.values() if isinstance(part, nn.Module)):
            self._broadcast(module)

    def __iter__(self) -> Iterator[int]:
        began = printed = saved = time.monotonic()
        printed_step = step = self.first_step
        while True:
            if (step - self.first_step) % 10 == 0:
                self.fraction = self._agree((time.monotonic() - began) / self.limit)
                self._set_rates()
            if self.fraction >= 1 or step - self.first_step >= self.max_steps:
                break
            yield step
            step += 1
            now = time.monotonic()
            if now - printed > 10 and is_main():
                self._print(step, now - began, (step - printed_step) / (now - printed))
                printed, printed_step = now, step
            if now - saved > 60:
                self.save(step)
                saved = now
        self._print(step, time.monotonic() - began, (step - self.first_step) / max(1e-3, time.monotonic() - began))
        self.save(step)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients over the GPUs, clip, update; without an update where they are not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        if world_size() > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= world_size()
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, average in zip(gradients, flat.split(sizes), strict=True):
                gradient.copy_(average.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.found_inf = 1 - norm.isfinite().float()  # where it is 1, the fused optimizer leaves the step out
        optimizer.step()

    def log(self, **values: Tensor) -> None:
        """Remember values for the next progress line, which shows their means."""
        for name, value in values.items():
            total, count = self.logged.get(name, (0.0, 0))
            self.logged[name] = total + value.detach().float(), count + 1

    def save(self, step: int) -> None:
        """Write the checkpoint; only the first process does."""
        if not is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        torch.save({"step": step, **{name: part.state_dict() for name, part in self.parts.items()}}, temporary)
        os.replace(temporary, self.path)

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.first_step = state["step"]
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak

    def _broadcast(self, module: nn.Module) -> None:
        if world_size() > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def _agree(self, value: float) -> float:
        if world_size() == 1:
            return value
        shared = torch.tensor([value], device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _set_rates(self) -> None:
        rising = min(1.0, self.fraction / self.warmup + 0.02)
        falling = 0.5 * (1 + cos(pi * min(1.0, self.fraction)))
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rising * max(0.01, falling)

    def _print(self, step: int, seconds: float, rate: float) -> None:
        if not is_main():
            return
        means = {name: round(float(total) / count, 4) for name, (total, count) in self.logged.items()}
        self.logged = {}
        line = {"stage": self.path.stem, "step": step, "seconds": round(seconds), "steps_a_second": round(rate, 2)}
        print(json.dumps(line | means), flush=True)


def averaged_state(path: Path) -> dict[str, Tensor]:
    """The stage's weights in a checkpoint, averaged where it keeps an average; tied ones are the same tensor."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    last, average = state["model"], state.get("average", {})
    replacement = {last[name].data_ptr(): value for name, value in average.items()}
    return {name: replacement.get(value.data_ptr(), value) for name, value in last.items()}


def load_average(path: Path, module: nn.Module, prefix: str = "") -> nn.Module:
    """Give `module` the averaged weights of a stage's checkpoint whose names start with `prefix`; eval mode."""
    state = averaged_state(path)
    module.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    return module.eval().requires_grad_(False)
