"""How good a model's speech is: `python -m benchmarks.quality --models DIR [--unseen DIR] [--real DIR]`.

Speaks held-out sentences and instructions with fixed seeds, has the speech judged by the models of scoring.py, and
prints every score with its threshold as JSON. README.md beside this file says what is measured how, and what the
folders hold.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.scoring import Errors, Heard, Likeness, Listener, check_models, naturalness, rate_of
from cosy_engine.audio.decode import load_audio
from cosy_engine.audio.encode import write_wav
from cosy_engine.checkpoint.default import default_model_dir
from cosy_engine.checkpoint.download import resolve_model_dir
from cosy_engine.config import Settings
from cosy_engine.engine import Engine, SynthesisRequest, Timings
from cosy_engine.errors import CosyError
from cosy_engine.frontend import Prompt
from cosy_engine.text.normalize import Language, language_of
from recipes.embedded.features import SAMPLE_RATE, pitch
from recipes.embedded.instructions import INSTRUCTIONS

HELDOUT = Path(__file__).with_name("heldout.tsv")
RESULTS = "results.jsonl"
PARTS = ("builtin", "streaming", "unseen", "real", "instruct", "speed")
NO_VOICES = "the model has no voices of its own"
PAIRS = 10  # of instructions, for each language and each of two opposites: 40
OPPOSITES = (("fast", "slow"), ("low", "high"))  # the second is longer, or higher
SPEED_SENTENCES = 10  # whose synthesis is timed
SPEED_CORES = 2

console = Console(stderr=True)


@dataclass(frozen=True)
class Score:
    """One line of the report; `at_most` or `at_least` is the threshold, if there is one."""

    what: str
    part: str
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float | None) -> bool | None:
        if value is None or (self.at_most is None and self.at_least is None):
            return None
        return value <= self.at_most if self.at_least is None else value >= self.at_least


SCORES = {
    "wer_en_builtin": Score("WER English, built-in voices", "builtin", at_most=0.08),
    "tones_zh_builtin": Score("pinyin error with tones, Mandarin, built-in voices", "builtin", at_most=0.08),
    "syllables_zh_builtin": Score("the same without tones", "builtin"),
    "cer_zh_builtin": Score("CER, the same sentences", "builtin"),
    "wer_en_unseen": Score("WER English, recordings of unseen voices", "unseen", at_most=0.12),
    "tones_zh_unseen": Score("pinyin error with tones, Mandarin, unseen voices", "unseen", at_most=0.12),
    "syllables_zh_unseen": Score("the same without tones", "unseen"),
    "cer_zh_unseen": Score("CER, the same sentences", "unseen"),
    "similarity_unseen": Score("Resemblyzer similarity to the recording, unseen voices", "unseen", at_least=0.75),
    "similarity_real_gain": Score(
        "similarity to the own real recording above that to the others", "real", at_least=0.1
    ),
    "similarity_real": Score("Resemblyzer similarity to the recording, real voices", "real"),
    "similarity_real_exchanged": Score("the same with the other speakers' recordings", "real"),
    "wer_en_real": Score("WER English, recordings of real voices", "real"),
    "instruct_pairs": Score("pairs of instructions that change duration or pitch as told", "instruct", at_least=0.9),
    "instruct_rate_pairs": Score("slow against fast alone", "instruct"),
    "instruct_pitch_pairs": Score("low against high alone", "instruct"),
    "dnsmos_p808": Score("DNSMOS P.808, built-in voices", "builtin", at_least=3.6),
    "rtf": Score("RTF on two CPU cores, one request, streaming", "speed", at_most=0.5),
    "rtf_whole": Score("the same without streaming", "speed"),
    "first_audio": Score("seconds to the first audio on two CPU cores, saved voice, streaming", "speed", at_most=0.7),
    "first_audio_slowest": Score("the slowest of them", "speed"),
    "streaming_wer_gap": Score("WER English, streaming against non-streaming, difference", "streaming", at_most=0.01),
    "streaming_tones_gap": Score("pinyin error with tones, the same difference", "streaming"),
}


@dataclass(frozen=True)
class Sentence:
    text: str
    language: Language


@dataclass(frozen=True)
class Speaker:
    """A voice to speak with. `recording` is where it comes from, if it is not the model's own."""

    name: str
    language: Language
    prompt: Prompt
    recording: Path | None = None


@dataclass(frozen=True)
class Job:
    """Something to be spoken; `sub` tells the two of a pair apart."""

    part: str
    number: int
    sentence: Sentence
    speaker: Speaker
    sub: str = ""
    instruct: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (f"{self.number:03d}", self.sentence.language, self.speaker.name, self.sub)))


@dataclass(frozen=True)
class Result:
    """What became of a job; scores that its part does not ask for are None."""

    job: Job
    seconds: float
    heard: Heard | None = None
    mos: float | None = None
    pitch: float | None = None
    voice: np.ndarray | None = None


class Judge(Protocol):
    def listen(self, samples: np.ndarray, rate: int, sentence: Sentence) -> Heard: ...
    def voice(self, samples: np.ndarray, rate: int) -> np.ndarray: ...
    def mos(self, samples: np.ndarray, rate: int) -> float: ...


class ModelJudge:
    """The evaluation models, together."""

    def __init__(self, models: Path) -> None:
        self._models, self._likeness = models, Likeness()

    @cached_property
    def _listener(self) -> Listener:
        return Listener(self._models, threads=1)

    def listen(self, samples: np.ndarray, rate: int, sentence: Sentence) -> Heard:
        return self._listener(samples, rate, sentence.text, sentence.language)

    def voice(self, samples: np.ndarray, rate: int) -> np.ndarray:
        return self._likeness.embed(samples, rate)

    def mos(self, samples: np.ndarray, rate: int) -> float:
        return naturalness(samples, rate)


def read_sentences(count: int) -> list[Sentence]:
    """The first `count` held-out sentences of each language."""
    with HELDOUT.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        Sentence(row["text"], language)
        for language in ("en", "zh")
        for row in itertools.islice((row for row in rows if row["lang"] == language), count)
    ]


def builtin_speakers(engine: Engine) -> list[Speaker]:
    ids = [entry.id for entry in engine.voices.list() if entry.kind == "builtin"]
    prompts = {name: engine.voices.get(name).prompt for name in ids}
    return [Speaker(name, language_of(prompt.text), prompt) for name, prompt in prompts.items()]


def read_speakers(engine: Engine, folder: Path | None) -> list[Speaker]:
    """The recordings that a folder's prompts.tsv (file, name, text) lists; a name is a speaker.

    Raises:
        CosyError: a recording cannot be used.
    """
    if folder is None:
        return []
    with (folder / "prompts.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        Speaker(
            row["name"],
            language_of(row["text"]),
            engine.frontend.make_prompt(folder / row["file"], row["text"]),
            folder / row["file"],
        )
        for row in rows
    ]


def plan(
    part: str, sentences: list[Sentence], speakers: list[Speaker], phrases: dict[str, tuple[str, ...]]
) -> list[Job]:
    """What is spoken for a part: every sentence once, by the speakers of its language in turn.

    For real voices that is English only; for instructions, both of each pair of opposites.

    Args:
        phrases: wordings of instructions by style.
    """
    jobs = []
    for language in ("en",) if part == "real" else ("en", "zh"):
        spoken = [sentence for sentence in sentences if sentence.language == language]
        turn = itertools.cycle([speaker for speaker in speakers if speaker.language == language])
        if part != "instruct":
            jobs += [Job(part, number, *pair) for number, pair in enumerate(zip(spoken, turn, strict=False))]
            continue
        for opposites in OPPOSITES:
            wordings = [[phrase for phrase in phrases[style] if language_of(phrase) == language] for style in opposites]
            for number, (sentence, speaker) in enumerate(zip(spoken[:PAIRS], turn, strict=False)):
                for style, known in zip(opposites, wordings, strict=True):
                    jobs.append(Job(part, number, sentence, speaker, style, known[number % len(known)]))
    return jobs


async def speak(engine: Engine, job: Job, seed: int) -> np.ndarray:
    """Samples `[n]`, none if the model made no sound."""
    request = SynthesisRequest(
        job.sentence.text,
        "instruct" if job.instruct else "zero_shot",
        prompt=job.speaker.prompt,
        instruct=job.instruct,
        stream=job.part == "streaming",
        seed=seed + job.number,
    )
    try:
        return np.concatenate([chunk.samples async for chunk in engine.synthesize(request)])
    except CosyError as error:
        if error.code != "no_sound":
            raise
        return np.zeros(0, np.float32)


def examine(job: Job, samples: np.ndarray, rate: int, judge: Judge) -> Result:
    """Judge a sound by what its part is about."""
    seconds = len(samples) / rate
    if job.part == "instruct":
        return Result(job, seconds, pitch=median_pitch(samples, rate))
    return Result(
        job,
        seconds,
        heard=judge.listen(samples, rate, job.sentence),
        mos=judge.mos(samples, rate) if job.part == "builtin" and len(samples) else None,
        voice=judge.voice(samples, rate) if job.speaker.recording else None,
    )


def median_pitch(samples: np.ndarray, rate: int) -> float | None:
    """Hz, of the voiced part; None if nothing is voiced."""
    assert rate == SAMPLE_RATE, f"the pitch is measured at {SAMPLE_RATE} Hz"
    track = pitch(torch.from_numpy(samples)[None])[0] if len(samples) else torch.zeros(0)
    voiced = track[track > 0]
    return float(voiced.median()) if len(voiced) else None


def measure_speed(directory: Path, sentences: list[Sentence], seed: int) -> dict[str, float]:
    """Times of single requests in the model's own voices, by a process that has two cores and nothing else to do.

    Empty if the model has none.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_take_cores) as pool:
        return pool.submit(_measure_speed, directory, sentences, seed).result()


def _take_cores() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:SPEED_CORES])
    torch.set_num_threads(SPEED_CORES)


def _measure_speed(directory: Path, sentences: list[Sentence], seed: int) -> dict[str, float]:
    with loaded(directory) as engine:
        speakers = builtin_speakers(engine)
        jobs = plan("builtin", sentences, speakers, {})
        jobs = [job for pair in zip(*_by_language(jobs), strict=False) for job in pair][:SPEED_SENTENCES]
        if not jobs:
            return {}

        async def timings(stream: bool) -> list[Timings]:
            measured = []
            for job in jobs:
                request = SynthesisRequest(job.sentence.text, voice=job.speaker.name, stream=stream, seed=seed)
                synthesis = engine.synthesize(request)
                async for _ in synthesis:
                    pass
                measured.append(synthesis.timings)
            return measured

        async def run() -> tuple[list[Timings], list[Timings]]:
            await timings(True)  # a saved voice is one that has been used before
            return await timings(True), await timings(False)

        streamed, whole = asyncio.run(run())
    first = [each.first_audio for each in streamed]
    return {
        "rtf": _rtf(streamed),
        "rtf_whole": _rtf(whole),
        "first_audio": statistics.median(first),
        "first_audio_slowest": max(first),
    }


def _rtf(timings: list[Timings]) -> float:
    return sum(each.work_seconds for each in timings) / sum(each.audio_seconds for each in timings)


def _by_language(jobs: list[Job]) -> list[list[Job]]:
    """One list for each language that there is."""
    lists = [[job for job in jobs if job.sentence.language == language] for language in ("en", "zh")]
    return [each for each in lists if each]


@contextmanager
def loaded(directory: Path) -> Iterator[Engine]:
    """An engine whose saved voices live as long as it does."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.load(directory, Settings(voices_dir=Path(folder), device="cpu"))
        try:
            yield engine
        finally:
            engine.close()


def summarise(results: list[Result], recordings: dict[Path, np.ndarray]) -> dict[str, float | None]:
    """Every score that the results allow.

    Args:
        recordings: the voice vector of each recording spoken like.
    """
    of_part = {part: [result for result in results if result.job.part == part] for part in PARTS}
    scores: dict[str, float | None] = {}
    for part in ("builtin", "streaming", "unseen", "real"):
        scores |= {f"{name}_{part}": value for name, value in _understood(of_part[part]).items()}
    scores["dnsmos_p808"] = _mean(result.mos for result in of_part["builtin"])
    for name in ("wer_en", "tones_zh"):
        pair = [scores.get(f"{name}_{part}") for part in ("streaming", "builtin")]
        scores[f"streaming_{name[:-3]}_gap"] = None if None in pair else abs(pair[0] - pair[1])
    own = {
        part: [float(r.voice @ recordings[r.job.speaker.recording]) for r in of_part[part]]
        for part in ("unseen", "real")
    }
    scores["similarity_unseen"] = _mean(own["unseen"])
    scores["similarity_real"] = _mean(own["real"])
    scores["similarity_real_exchanged"] = _mean(_exchanged(of_part["real"], recordings))
    if scores["similarity_real_exchanged"] is not None:
        scores["similarity_real_gain"] = scores["similarity_real"] - scores["similarity_real_exchanged"]
    return scores | _instructed(of_part["instruct"])


def _understood(results: list[Result]) -> dict[str, float | None]:
    heard = {
        language: [result.heard for result in results if result.job.sentence.language == language]
        for language in ("en", "zh")
    }
    rates: dict[str, list[Errors]] = {
        "wer_en": [each.errors for each in heard["en"]],
        "cer_zh": [each.errors for each in heard["zh"]],
        "syllables_zh": [each.syllables for each in heard["zh"]],
        "tones_zh": [each.tones for each in heard["zh"]],
    }
    return {name: rate_of(errors) if errors else None for name, errors in rates.items()}


def _exchanged(results: list[Result], recordings: dict[Path, np.ndarray]) -> Iterator[float]:
    """Each result's likeness to the recordings of the other speakers."""
    names = {result.job.speaker.recording: result.job.speaker.name for result in results}
    for result in results:
        others = [path for path, name in names.items() if name != result.job.speaker.name]
        yield from (float(result.voice @ recordings[path]) for path in others)


def _instructed(results: list[Result]) -> dict[str, float | None]:
    right: dict[str, list[bool]] = {"rate": [], "pitch": []}
    for kind, (lower, higher) in zip(right, OPPOSITES, strict=True):
        pairs: dict[tuple[Language, int], dict[str, Result]] = {}
        for result in results:
            pairs.setdefault((result.job.sentence.language, result.job.number), {})[result.job.sub] = result
        for pair in pairs.values():
            if lower in pair:
                values = [each.seconds if kind == "rate" else each.pitch for each in (pair[lower], pair[higher])]
                right[kind].append(None not in values and values[0] < values[1])
    shares = {f"instruct_{kind}_pairs": _mean(moved) for kind, moved in right.items()}
    return {"instruct_pairs": _mean(right["rate"] + right["pitch"])} | shares


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def report(values: dict[str, float | None], why_not: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every score with its threshold; a score without a value says why."""
    lines = {}
    for key, score in SCORES.items():
        value = values.get(key)
        line: dict[str, Any] = {"what": score.what, "value": None if value is None else round(value, 4)}
        line |= {name: limit for name in ("at_most", "at_least") if (limit := getattr(score, name)) is not None}
        if (met := score.met(value)) is not None:
            line["met"] = met
        if value is None:
            line["why"] = why_not.get(score.part, "nothing was made that it could be measured on")
        lines[key] = line
    return lines


def digest_of(directory: Path) -> str:
    """What the scores belong to: a hash of the model directory's files, texts about them left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(directory).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def completed(result: dict[str, Any], earlier: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """A report with the scores of an earlier one for all other parts, if that is about the same model and sentences."""
    if any(earlier.get(key) != result[key] for key in ("digest", "sentences", "seed")):
        return result
    kept = {key: line for key, line in earlier["scores"].items() if SCORES[key].part not in parts}
    return result | {"machine": earlier["machine"] | result["machine"], "scores": result["scores"] | kept}


def machine() -> dict[str, Any]:
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return {"cpu": name, "cores": os.cpu_count(), "torch": torch.__version__}


@dataclass(frozen=True)
class Task:
    """What is to be spoken and judged.

    Attributes:
        folders: with the prompts of unseen and of real voices, by part.
        seed: of the first sentence; the next has the next.
    """

    parts: list[str]
    sentences: list[Sentence]
    folders: dict[str, Path | None]
    seed: int

    def jobs(self, engine: Engine) -> tuple[list[Job], dict[str, str]]:
        """Everything but the speed, the same for every engine of a model; and why parts have nothing."""
        speakers = {
            part: read_speakers(engine, self.folders[part]) for part in ("unseen", "real") if part in self.parts
        }
        speakers |= dict.fromkeys(("builtin", "streaming", "instruct"), builtin_speakers(engine))
        phrases = engine.frontend.instructions.phrases if engine.frontend.instructions else INSTRUCTIONS
        why_not = {part: NO_VOICES for part in self.parts if not speakers.get(part, part)}
        why_not |= {part: f"no folder was given: --{part}" for part, folder in self.folders.items() if folder is None}
        if "builtin" not in self.parts:
            why_not["streaming"] = "needs the part builtin in the same run"
        spoken = [part for part in self.parts if part != "speed"]
        return [job for part in spoken for job in plan(part, self.sentences, speakers[part], phrases)], why_not


Made = tuple[Result, np.ndarray]
"""What became of a job, and the sound itself."""


def perform(engine: Engine, judge: Judge, job: Job, seed: int) -> Made:
    samples = asyncio.run(speak(engine, job, seed))
    return examine(job, samples, engine.model.sample_rate, judge), samples


def evaluate(
    engine: Engine,
    judge: Judge,
    parts: list[str],
    sentences: list[Sentence],
    folders: dict[str, Path | None],
    seed: int,
    keep: Path | None = None,
    perform_all: Callable[[list[Job]], Iterator[Made]] | None = None,
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Speak and judge all parts but the speed. Gives the scores, and why parts have none.

    Args:
        folders: with the prompts of unseen and of real voices.
        keep: a folder for every sound, by part, each with results.jsonl: what was measured on them.
        perform_all: does the jobs, in their order; by default one after the other, here.
    """
    jobs, why_not = Task(parts, sentences, folders, seed).jobs(engine)
    recorded = {path: load_audio(path) for path in {job.speaker.recording for job in jobs} - {None}}
    recordings = {path: judge.voice(sound.samples, sound.sample_rate) for path, sound in recorded.items()}
    if keep is not None:
        for part in parts:
            (keep / part / RESULTS).unlink(missing_ok=True)
    done = perform_all(jobs) if perform_all else (perform(engine, judge, job, seed) for job in jobs)
    results = []
    with _progress() as progress:
        bars = {
            part: progress.add_task(part, total=len(list(mine))) for part, mine in itertools.groupby(jobs, _part_of)
        }
        for result, samples in done:
            results.append(result)
            progress.advance(bars[result.job.part])
            if keep is not None:
                _write(keep, result, samples, engine.model.sample_rate)
    return summarise(results, recordings), why_not


def _part_of(job: Job) -> str:
    return job.part


class Workers:
    """Processes that do jobs at the same time, each on one core with a model and a judge of its own.

    Used as a context; what comes out does not depend on how many there are.
    """

    def __init__(self, count: int, directory: Path, models: Path, task: Task) -> None:
        arguments = directory, models, task
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, spawn, initializer=_Worker.start, initargs=arguments)

    def __enter__(self) -> Callable[[list[Job]], Iterator[Made]]:
        return self._perform_all

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _perform_all(self, jobs: list[Job]) -> Iterator[Made]:
        for job, (result, samples) in zip(jobs, self._pool.map(_Worker.perform, range(len(jobs))), strict=True):
            yield replace(result, job=job), samples


class _Worker:
    """One of the processes. Jobs are known by their number, as voices are large."""

    def __init__(self, directory: Path, models: Path, task: Task) -> None:
        torch.set_num_threads(1)
        self.context = loaded(directory)
        self.engine, self.judge, self.seed = self.context.__enter__(), ModelJudge(models), task.seed
        # What `atexit` has is not run in this process; this is, before it waits for processes of its own (vLLM's).
        Finalize(None, self.context.__exit__, (None,) * 3, exitpriority=1)
        self.jobs, _ = task.jobs(self.engine)

    @classmethod
    def start(cls, *arguments: Any) -> None:
        cls.one = cls(*arguments)

    @classmethod
    def perform(cls, number: int) -> Made:
        one = cls.one
        result, samples = perform(one.engine, one.judge, one.jobs[number], one.seed)
        return replace(result, job=None), samples


def _progress() -> Progress:
    columns = [TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _write(keep: Path, result: Result, samples: np.ndarray, rate: int) -> None:
    job = result.job
    folder = keep / job.part
    folder.mkdir(parents=True, exist_ok=True)
    write_wav(folder / f"{job.name}.wav", samples, rate)
    row = {"sound": f"{job.name}.wav", "text": job.sentence.text, "instruct": job.instruct}
    row |= {"seconds": round(result.seconds, 2), "mos": result.mos, "pitch": result.pitch}
    row |= asdict(result.heard) if result.heard else {}
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def judged(
    models: Path | None,
    model_dir: str | None,
    folders: dict[str, Path | None],
    sentences: int,
    parts: list[str],
    seed: int,
    keep: Path | None,
    workers: int,
) -> dict[str, Any]:
    """The whole report. `models` are needed for every part but the speed, which has the machine for itself.

    Raises:
        CosyError: the model cannot be loaded, or a recording cannot be used.
    """
    started = time.monotonic()
    directory = resolve_model_dir(model_dir) if model_dir else default_model_dir()
    spoken = read_sentences(sentences)
    values: dict[str, float | None] = {}
    why_not: dict[str, str] = {}
    about = machine()
    if "speed" in parts and (os.cpu_count() or 1) < SPEED_CORES:
        why_not["speed"] = "this machine has one core"
    elif "speed" in parts:
        about["load_before"] = round(os.getloadavg()[0], 2)
        values = measure_speed(directory, spoken, seed)
        why_not["speed"] = NO_VOICES
    if models is not None and parts != ["speed"]:
        task = parts, spoken, folders, seed
        with loaded(directory) as engine, Workers(workers, directory, models, Task(*task)) as perform_all:
            scores, missing = evaluate(engine, ModelJudge(models), *task, keep, perform_all)
        values |= scores
        why_not = missing | why_not
    return {
        "model": directory.name,
        "digest": digest_of(directory),
        "sentences": sentences,
        "seed": seed,
        "machine": about,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "scores": report(values, why_not | {part: "not asked for" for part in PARTS if part not in parts}),
    }


def main(
    models: Annotated[
        Path | None, typer.Option(envvar="COSY_QUALITY_MODELS", help="Folder with the evaluation models.")
    ] = None,
    model_dir: Annotated[
        str | None, typer.Option(help="Directory or id of the model to judge. [default: the one that is shipped]")
    ] = None,
    unseen: Annotated[Path | None, typer.Option(help="Folder with prompts.tsv: voices that no stage has seen.")] = None,
    real: Annotated[
        Path | None, typer.Option(help="Folder with prompts.tsv: English of people not trained on.")
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, max=100, help="Held-out sentences a language.")] = 100,
    parts: Annotated[str, typer.Option(help="What to measure.")] = ",".join(PARTS),
    seed: Annotated[int, typer.Option(help="Of the first sentence; the next has the next.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep every sound there, with what was heard.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that speak and judge. [default: one a core, at most 8]")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report there too; scores of other parts stay in it.")
    ] = None,
) -> None:
    """Measure the quality of a model's speech and print it as JSON."""
    chosen = [part for part in PARTS if part in parts.split(",")]
    if len(chosen) != len(parts.split(",")):
        raise typer.BadParameter(f"choose from {', '.join(PARTS)}", param_hint="--parts")
    if any(part != "speed" for part in chosen):
        models = check_models(models)
    for folder in filter(None, (unseen, real)):
        if not (folder / "prompts.tsv").is_file():
            raise typer.BadParameter(f"there is no {folder / 'prompts.tsv'} (file, name, text)")
    folders = {"unseen": unseen, "real": real}
    workers = workers or min(os.cpu_count() or 1, 8)
    try:
        with redirect_stdout(sys.stderr):
            result = judged(models, model_dir, folders, sentences, chosen, seed, keep, workers)
    except CosyError as error:
        raise SystemExit(error.message) from error
    if json_file is not None and json_file.is_file():
        result = completed(result, json.loads(json_file.read_text(encoding="utf-8")), chosen)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
