"""The command line: `python -m cosy_engine say | enroll | voices | rm | bench | export-onnx | export-vllm | doctor`.

Results go to stdout, everything else to stderr. Exit code 2 means that the input was wrong, 1 that something else was.
torch and the models are imported by the commands that need them, so that the others answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cosy_engine.errors import CosyError, InvalidAudioError, InvalidRequestError, ModelDirectoryError, QueueFullError

if TYPE_CHECKING:
    import numpy as np

    from cosy_engine.engine import Engine, Synthesis
    from cosy_engine.voices import VoiceStore


P = ParamSpec("P")

app = typer.Typer(
    help="Speak with CosyVoice2 and CosyVoice3 models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelDir = Annotated[
    str | None,
    typer.Option("--model-dir", help="Model directory, ModelScope id or Hugging Face id.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
PromptWav = Annotated[str | None, typer.Option("--prompt-wav", help="Recording to speak like, 1-30 s.")]
PromptText = Annotated[
    str, typer.Option("--prompt-text", help="What is said in that recording; some models do without.")
]
LoadTrt = Annotated[bool, typer.Option("--load-trt", help="Run the flow on TensorRT (NVIDIA GPU).")]
LoadVllm = Annotated[bool, typer.Option("--load-vllm", help="Run the speech LM on vLLM.")]
VllmArgs = Annotated[str, typer.Option("--vllm-args", metavar="JSON", help="Arguments of vLLM's engine, by name.")]
VoiceId = Annotated[str | None, typer.Option("--voice", help="Id of a saved voice, instead of a recording.")]


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command of `app`; whatever goes wrong in it becomes a message on stderr and an exit code.

    With COSY_DEBUG=1 in the environment the traceback is shown too.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("COSY_DEBUG"):
                traceback.print_exc()
            typer.echo(f"Error: {_message(error)}", err=True)
            raise typer.Exit(_exit_code(error)) from None

    return app.command()(run)


@command
def say(
    out: Annotated[str, typer.Option("--out", help="WAV file to write; - is stdout.")],
    text: Annotated[str, typer.Argument(help="What to say; not needed for --mode vc.")] = "",
    mode: Annotated[
        Literal["zero_shot", "cross_lingual", "instruct", "vc"],
        typer.Option("--mode", help="vc converts --source-wav; the others speak TEXT."),
    ] = "zero_shot",
    prompt_wav: PromptWav = None,
    prompt_text: PromptText = "",
    voice: VoiceId = None,
    instruct: Annotated[str, typer.Option("--instruct", help="How to say it, for --mode instruct.")] = "",
    source_wav: Annotated[str | None, typer.Option("--source-wav", help="Recording to convert, for --mode vc.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Make the sound chunk by chunk.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same sound.")] = None,
    speed: Annotated[float, typer.Option("--speed", help="0.5 to 2.")] = 1.0,
    load_trt: LoadTrt = False,
    load_vllm: LoadVllm = False,
    vllm_args: VllmArgs = "",
    model_dir: ModelDir = None,
    as_json: Json = False,
) -> None:
    """Speak TEXT and write it to a WAV file."""
    if voice and prompt_wav:
        raise InvalidRequestError("Give --voice or --prompt-wav, not both.", param="voice")
    if not voice and not prompt_wav:
        raise InvalidRequestError(
            "Say in whose voice: --prompt-wav RECORDING with --prompt-text, or --voice ID.", param="voice"
        )
    if out == "-" and as_json:
        raise InvalidRequestError("--out - and --json would both write to stdout; choose one.", param="out")
    if out != "-" and not Path(out).absolute().parent.is_dir():
        raise InvalidRequestError(f"There is no folder {Path(out).parent} to write to.", param="out")
    if Path(out).is_dir():
        raise InvalidRequestError(f"--out {out!r} is a folder; name a file.", param="out")
    with _stdout_kept_clean():
        prompt_data = _read_recording(prompt_wav, "--prompt-wav") if prompt_wav else None
        source_data = _read_recording(source_wav, "--source-wav") if source_wav else None
        backends = _backends(load_trt, load_vllm, vllm_args)
        with _progress() as progress, _engine(progress, model_dir, **backends) as engine:
            samples, synthesis = asyncio.run(
                _say(
                    engine,
                    progress,
                    prompt_data,
                    prompt_text,
                    source_data,
                    text=text,
                    mode=mode,
                    voice=voice,
                    instruct=instruct,
                    stream=stream,
                    seed=seed,
                    speed=speed,
                )
            )
            rate = engine.model.sample_rate
    for notice in synthesis.notices:
        typer.echo(f"Note: {notice.message}", err=True)
    _write_sound(out, samples, rate)
    timings = synthesis.timings
    if as_json:
        result = {
            "audio_seconds": round(timings.audio_seconds, 4),
            "ttfa": round(timings.first_audio, 4),
            "rtf": round(timings.rtf, 4),
            "chunks": timings.chunks,
            "seed": synthesis.seed,
        }
        typer.echo(json.dumps(result))
    elif out != "-":
        typer.echo(
            f"{out}: {timings.audio_seconds:.2f} s, first sound after {timings.first_audio:.2f} s, "
            f"RTF {timings.rtf:.2f}, seed {synthesis.seed}"
        )


@command
def enroll(
    name: Annotated[str, typer.Argument(help="What the voice shall be called.")],
    wav: Annotated[str, typer.Option("--wav", "--prompt-wav", help="Recording of the voice, 1-30 s.")],
    text: Annotated[
        str, typer.Option("--text", "--prompt-text", help="What is said in it; some models do without.")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of the voice of this name.")] = False,
    model_dir: ModelDir = None,
    as_json: Json = False,
) -> None:
    """Save the voice of a recording; prints the id that `say --voice` takes."""
    with _stdout_kept_clean():
        data = _read_recording(wav, "--wav")
        with _progress() as progress, _engine(progress, model_dir) as engine:
            progress.add_task("Reading the voice", total=None)
            saved = asyncio.run(engine.enroll(name, data, text, replace=replace))
    typer.echo(json.dumps({"id": saved.id, "name": saved.name, "kind": saved.kind}) if as_json else saved.id)


@command
def voices(model_dir: ModelDir = None, as_json: Json = False) -> None:
    """List the saved voices and the model's own."""
    with _stdout_kept_clean():
        listed = _store(model_dir).list()
    if as_json:
        rows = [
            {"id": info.id, "name": info.name, "kind": info.kind} | ({"problem": info.problem} if info.problem else {})
            for info in listed
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    table = Table("id", "name", "kind", "says", box=None, pad_edge=False)
    for info in listed:
        cells = (info.id, info.name, info.kind, info.problem or info.text)
        table.add_row(*(_plain(cell) for cell in cells), style="dim" if info.problem else None)
    Console().print(table) if listed else typer.echo("No voices yet; `enroll` saves one.", err=True)


@command
def rm(
    voice_id: Annotated[str, typer.Argument(metavar="ID", help="As `voices` shows it.")], model_dir: ModelDir = None
):
    """Delete a saved voice."""
    _store(model_dir).delete(voice_id)
    typer.echo(f"Deleted {voice_id}.", err=True)


@command
def bench(
    text_file: Annotated[Path, typer.Option("--text-file", help="Texts to speak, one a line.")],
    concurrency: Annotated[str, typer.Option("--concurrency", help="How many at once, for example 1,4.")] = "1",
    voice: VoiceId = None,
    prompt_wav: PromptWav = None,
    prompt_text: PromptText = "",
    load_trt: LoadTrt = False,
    load_vllm: LoadVllm = False,
    vllm_args: VllmArgs = "",
    model_dir: ModelDir = None,
    as_json: Json = False,
) -> None:
    """Measure first-audio time and throughput of streamed speech."""
    from cosy_engine import bench as measure

    levels = measure.read_levels(concurrency)
    texts = measure.read_texts(text_file)
    with _stdout_kept_clean():
        data = _read_recording(prompt_wav, "--prompt-wav") if prompt_wav else None
        with _progress() as progress:
            options = {"concurrency": max(levels), "max_queue": max(levels), "warm_up": True}
            options |= _backends(load_trt, load_vllm, vllm_args)
            with _engine(progress, model_dir, **options) as engine:
                task = progress.add_task(
                    "Measuring", total=sum(measure.request_count(texts, level) for level in levels)
                )
                report = asyncio.run(
                    measure.run(
                        engine, levels, texts, voice, data, prompt_text, on_request=lambda: progress.advance(task)
                    )
                )
    if as_json:
        typer.echo(json.dumps(report))
        return
    keys = list(report["results"][0])
    table = Table(*(key.replace("_", "\n") for key in keys), box=None, pad_edge=False)
    for row in report["results"]:
        table.add_row(*(str(row[key]) for key in keys))
    Console().print(table)


@command
def export_onnx(
    model_dir: Annotated[str, typer.Argument(help="Model directory, ModelScope id or Hugging Face id.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: the model directory.")] = None,
    variant: Annotated[
        Literal["whole", "chunked", "cached"],
        typer.Option("--variant", help="As published; with the streaming mask; one Euler step of a stream."),
    ] = "whole",
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision.")] = False,
) -> None:
    """Write the flow's estimator as ONNX, with the published names of file, inputs and output."""
    if out is not None and not out.is_dir():
        raise InvalidRequestError(f"There is no folder {out} to write to.", param="out")
    with _stdout_kept_clean(), _progress() as progress:
        import torch

        from cosy_engine.checkpoint.load import load_model
        from cosy_engine.token2wav.onnx_export import export_estimator, file_name

        dtype = torch.float16 if fp16 else torch.float32
        task = progress.add_task("Loading the model", total=None)
        model = load_model(_downloaded(model_dir, progress), dtype=dtype)
        path = (out or model.directory) / file_name(variant, dtype)
        progress.update(task, description=f"Exporting {path.name}")
        export_estimator(model.flow.decoder.estimator, path, variant)
    typer.echo(str(path))


@command
def export_vllm(
    model_dir: Annotated[str, typer.Argument(help="Model directory, ModelScope id or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; one that is up to date stays.")],
) -> None:
    """Write the speech LM as the directory that vLLM loads. `--load-vllm` does it by itself, in the cache folder."""
    with _stdout_kept_clean(), _progress() as progress:
        from cosy_engine.speech_lm.vllm_export import export_model

        directory = Path(_downloaded(model_dir, progress))
        progress.add_task("Exporting the speech LM", total=None)
        path = export_model(directory, out)
    typer.echo(str(path))


@command
def doctor(model_dir: ModelDir = None, as_json: Json = False) -> None:
    """Tell what this machine can run, and why not the rest."""
    from cosy_engine.doctor import examine

    with _stdout_kept_clean():
        findings = examine(model_dir)
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], ensure_ascii=False))
    else:
        for finding in findings:
            typer.echo(str(finding))
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


async def _say(
    engine: Engine,
    progress: Progress,
    prompt_data: bytes | None,
    prompt_text: str,
    source_data: bytes | None,
    **fields: object,
) -> tuple[np.ndarray, Synthesis]:
    import numpy as np

    from cosy_engine.audio.decode import load_audio
    from cosy_engine.engine import SynthesisRequest

    task = progress.add_task("Speaking", total=None)
    prompt = await engine.make_prompt(prompt_data, prompt_text) if prompt_data is not None else None
    source = load_audio(source_data) if source_data is not None else None
    synthesis = engine.synthesize(SynthesisRequest(prompt=prompt, source=source, **fields))
    chunks = []
    async for chunk in synthesis:
        chunks.append(chunk.samples)
        if chunk.pieces > 1:
            progress.update(task, total=chunk.pieces, completed=chunk.piece)
    return np.concatenate(chunks), synthesis


@contextlib.contextmanager
def _engine(progress: Progress, model_dir: str | None, **options: object) -> Iterator[Engine]:
    """A loaded engine. One request does not repay a warm-up, so there is none unless `options` ask for it."""
    task = progress.add_task("Loading the model", total=None)
    from cosy_engine.config import Settings
    from cosy_engine.engine import Engine

    settings = Settings(**{"warm_up": False} | options)
    directory = model_dir or settings.model_dir
    engine = Engine.load(_downloaded(directory, progress) if directory else None, settings)
    progress.remove_task(task)
    try:
        yield engine
    finally:
        engine.close()


def _downloaded(model_dir: str, progress: Progress) -> str:
    """A directory of this machine, for a directory or an id."""
    if Path(model_dir).expanduser().is_dir():
        return model_dir
    from cosy_engine.checkpoint.download import resolve_model_dir

    progress.stop()  # a download shows bars of its own
    directory = str(resolve_model_dir(model_dir))
    progress.start()
    return directory


def _backends(load_trt: bool, load_vllm: bool, vllm_args: str) -> dict[str, object]:
    """Settings for the backends asked for by name."""
    from cosy_engine.config import vllm_options

    return ({"flow_backend": "tensorrt"} if load_trt else {}) | vllm_options(load_vllm, vllm_args)


def _store(model_dir: str | None) -> VoiceStore:
    """The saved voices and those of the model directory, if that is on this machine; the model is not loaded."""
    from cosy_engine.checkpoint.fingerprint import fingerprint_of
    from cosy_engine.config import Settings
    from cosy_engine.voices import VoiceStore

    settings = Settings()
    directory = _local_directory(model_dir or settings.model_dir)
    if directory is None:
        return VoiceStore(settings.voices_dir, None)
    fingerprint = fingerprint_of(directory)
    builtin = {}
    if (directory / "spk2info.pt").is_file():
        from cosy_engine.voices.spk2info import builtin_voices

        builtin = builtin_voices(directory, fingerprint)
    return VoiceStore(settings.voices_dir, fingerprint, builtin)


def _local_directory(named: str | None) -> Path | None:
    from cosy_engine.checkpoint.default import default_model_dir

    try:
        directory = Path(named).expanduser() if named else default_model_dir()
    except ModelDirectoryError:
        return None
    return directory if directory.is_dir() else None


def _progress() -> Progress:
    """Bars on stderr if that is a terminal, gone when done."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What libraries print goes to stderr, and so does the log."""
    debug = bool(os.environ.get("COSY_DEBUG"))
    logging.basicConfig(stream=sys.stderr, level="DEBUG" if debug else "WARNING", format="%(levelname)s: %(message)s")
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _read_recording(path: str, option: str) -> bytes:
    """The content of a recording's file, no more of it than the decoder takes."""
    from cosy_engine.audio.decode import MAX_BYTES

    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidAudioError(f"{option} {path!r} cannot be read: {reason}.", param=option) from None


def _write_sound(out: str, samples: np.ndarray, rate: int) -> None:
    from cosy_engine.audio.encode import wav_bytes, write_wav

    if out == "-":
        sys.stdout.buffer.write(wav_bytes(samples, rate))
    else:
        write_wav(out, samples, rate)


def _plain(text: str) -> str:
    """Text that stands for itself: one line, no console markup."""
    from rich.markup import escape

    return escape(" ".join(text.split()))


def _message(error: Exception) -> str:
    if isinstance(error, CosyError):
        return error.message
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {error}. This is a defect; COSY_DEBUG=1 shows where."


def _exit_code(error: Exception) -> int:
    callers_fault = isinstance(error, CosyError) and 400 <= error.http_status < 500
    return 2 if callers_fault and not isinstance(error, QueueFullError) else 1
