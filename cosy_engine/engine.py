"""The engine: requests in, chunks of sound out.

A request waits for its turn, its text becomes pieces, the speech LM turns each piece into tokens and token2wav turns
those into sound, both at the same time and one piece ahead of the listener. Nothing here knows of Gradio or HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, get_args

import numpy as np
import torch

from cosy_engine import metrics
from cosy_engine.admission import AdmissionQueue, PositionCallback
from cosy_engine.audio.decode import Recording, read_recording
from cosy_engine.checkpoint.default import default_model_dir
from cosy_engine.checkpoint.load import CosyVoiceModel, load_model
from cosy_engine.config import Settings, choose_device
from cosy_engine.cores import half_of_the_cores
from cosy_engine.errors import BackendUnavailableError, CosyError, EngineStoppedError, InvalidRequestError
from cosy_engine.frontend import Frontend, Mode, Prompt
from cosy_engine.notices import Notice
from cosy_engine.speech_lm.base import SpeechLM, SpeechLMRequest
from cosy_engine.speech_lm.silence import SILENT_CODES, SilenceFilter
from cosy_engine.speech_lm.torch_lm import TorchSpeechLM
from cosy_engine.speech_lm.vllm_plugin import find_vllm
from cosy_engine.token2wav.hops import PACES
from cosy_engine.token2wav.memory import default_stream_memory
from cosy_engine.token2wav.scheduler import Scheduler, Urgency, first_sound, runs_dry
from cosy_engine.token2wav.static_encoder import StaticEncoder, use_static_encoder
from cosy_engine.token2wav.static_estimator import StaticEstimator, use_graphs
from cosy_engine.token2wav.static_vocoder import ChunkFrames, StaticVocoder
from cosy_engine.token2wav.tensorrt_estimator import TensorRTEstimator, gpu_of, use_tensorrt
from cosy_engine.token2wav.tensorrt_plan import find_library
from cosy_engine.token2wav.token2wav import Session, Token2Wav
from cosy_engine.token2wav.work import Making
from cosy_engine.voices.spk2info import builtin_voices
from cosy_engine.voices.store import VoiceStore
from cosy_engine.voices.voice import Voice

logger = logging.getLogger(__name__)

_SPEED_RANGE = (0.5, 2.0)
_MAX_SEED = 2**32 - 1
_PROMPTS_KEPT = 16
_BATCH = {"cpu": 1, "cuda": 32}
_TEXT_PAUSE = 60.0  # seconds without a piece of a text that arrives piece by piece
_PATIENCE = 10.0  # seconds that who wants no stream can wait while others hear theirs without a gap
_PATIENCE_EACH, _MOST_PATIENCE = 0.00025, 0.002  # seconds that a code may take longer for each who listens as well
_END = None


@dataclass(frozen=True)
class SynthesisRequest:
    """What to say and how.

    Attributes:
        text: what is said; an async iterator of strings for text that arrives piece by piece.
        mode: zero_shot, cross_lingual, instruct or vc (voice conversion of `source`).
        voice: id of a saved voice; or
        prompt: a voice made with `Engine.make_prompt`.
        instruct: how to say it, for the instruct mode.
        source: the recording to convert, for the vc mode.
        stream: sound as soon as it is made; otherwise one chunk a piece of text.
        speed: 0.5 to 2.
        seed: of every random draw; chosen and told when None.
        text_frontend: normalise the text (numbers to words and so on) and split it into sentences.
    """

    text: str | AsyncIterator[str] = ""
    mode: Mode = "zero_shot"
    voice: str | None = None
    prompt: Prompt | None = None
    instruct: str = ""
    source: Recording | None = None
    stream: bool = True
    speed: float = 1.0
    seed: int | None = None
    text_frontend: bool = True


@dataclass(frozen=True)
class AudioChunk:
    """A stretch of sound: float32 `[n]` in -1..1. `piece` of `pieces` is the text piece it belongs to, from 0."""

    samples: np.ndarray
    sample_rate: int
    index: int
    piece: int
    pieces: int
    seed: int


class _TokenStream:
    """Tokens of one piece of text on their way to its sound.

    Args:
        first: after so many tokens whoever puts them waits until the sound asks for more; None: never.
    """

    def __init__(self, first: int | None) -> None:
        self._items: asyncio.Queue[int | BaseException | None] = asyncio.Queue()
        self._put, self._first, self._asked = 0, first, asyncio.Event()

    def end(self, error: BaseException | None = _END) -> None:
        """No token follows."""
        self._items.put_nowait(error)

    async def put(self, token: int) -> None:
        """The next token."""
        self._items.put_nowait(token)
        self._put += 1
        if self._put == self._first:
            await self._asked.wait()

    async def get(self) -> int | BaseException | None:
        """The next token, what went wrong, or `_END`."""
        if self._items.empty() and self._put == self._first:
            self._asked.set()
        return await self._items.get()


@dataclass
class Timings:
    """Seconds, filled in as the request proceeds. `rtf` is seconds of work per second of sound."""

    queue: float = 0.0
    first_token: float | None = None
    first_audio: float | None = None
    audio_seconds: float = 0.0
    work_seconds: float = 0.0
    chunks: int = 0
    tokens: int = 0

    @property
    def rtf(self) -> float | None:
        return self.work_seconds / self.audio_seconds if self.audio_seconds else None


class Synthesis:
    """A running request: `async for chunk in synthesis`; leaving the loop or `cancel()` stops the work.

    `notices` are for whoever asked, from the start: what is not done as the request says.
    """

    def __init__(
        self, seed: int, timings: Timings, chunks: AsyncGenerator[AudioChunk, None], notices: list[Notice]
    ) -> None:
        self.seed = seed
        self.timings = timings
        self.notices = notices
        self._chunks = chunks
        self._turn = asyncio.Lock()  # of whoever runs `_chunks`
        self._step: asyncio.Task[AudioChunk | None] | None = None
        self._cancelled = False

    async def __aiter__(self) -> AsyncGenerator[AudioChunk, None]:
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
        finally:
            await self.cancel()

    async def cancel(self) -> None:
        """Stop generating and free what the request held; whoever listens hears the end. Any task may call this."""
        if self._step is not None and not self._cancelled:
            self._step.cancel()
        self._cancelled = True
        async with self._turn:
            await self._chunks.aclose()

    async def _next(self) -> AudioChunk | None:
        async with self._turn:
            if self._cancelled:
                return None
            self._step = asyncio.ensure_future(anext(self._chunks, None))
            try:
                return await self._step
            except asyncio.CancelledError:
                if self._cancelled and not asyncio.current_task().cancelling():
                    return None
                raise


class Engine:
    """Serves many requests at once from one loaded model. Safe to use from several event loops."""

    def __init__(self, model: CosyVoiceModel, settings: Settings, frontend: Frontend | None = None) -> None:
        self.model = model
        self.settings = settings
        self.frontend = frontend or Frontend(model)
        builtin = builtin_voices(model.directory, model.fingerprint)
        self.voices = VoiceStore(settings.voices_dir, model.fingerprint, builtin)
        self.queue = AdmissionQueue(settings.concurrency, settings.max_queue)
        both_here = model.device.type == "cpu" and settings.lm_backend == "torch"  # the LM and token2wav
        threads = half_of_the_cores() if both_here else None
        self._speech_lm = _speech_lm(model, settings, self.frontend.end_of_prompt, threads)
        self._token2wav = Token2Wav(
            model.flow,
            _static_vocoder(model, settings) if _runs_graphs(model.device, settings) else model.hift,
            upstream_exact=settings.upstream_exact,
            voice_cache=_bytes(settings.voice_cache_mb),
            stream_memory=_bytes(settings.stream_memory_mb),
        )
        self._scheduler = Scheduler(settings.batch or _BATCH[model.device.type], model.device, threads)
        self._prompt_makers = ThreadPoolExecutor(2, thread_name_prefix="prompt")
        self._arrivals = ThreadPoolExecutor(1, thread_name_prefix="arrivals")  # a GPU's come in turn
        self._prompts: OrderedDict[str, Future[Prompt]] = OrderedDict()
        self._closed = False

    @classmethod
    def load(cls, model_dir: str | Path | None = None, settings: Settings | None = None) -> Self:
        """Load a model directory (path or id; None is the one that ships with the project) and get ready.

        Raises:
            ModelDirectoryError: the directory is missing or incomplete.
            BackendUnavailableError: a backend or device that was asked for by name cannot run here.
        """
        settings = settings or Settings()
        _check_backends(settings)
        device = choose_device(settings.device)
        if settings.flow_backend == "tensorrt":
            find_library(gpu_of(device))  # before the model is loaded
        dtype = torch.float16 if settings.fp16 and device.type == "cuda" else torch.float32
        if settings.fp16 and dtype == torch.float32:
            logger.warning("fp16 needs a CUDA device; on %s the model runs in float32", device)
        directory = model_dir or settings.model_dir or default_model_dir()
        model = load_model(directory, device, dtype)
        if settings.flow_backend != "torch":
            use_tensorrt(model, settings)
        elif settings.compile:
            model.flow.decoder.estimator.compile(dynamic=True)
        on_tensorrt = isinstance(model.flow.decoder.estimator, TensorRTEstimator)
        if _runs_graphs(device, settings) and not (settings.compile or on_tensorrt):
            use_graphs(model.flow.decoder, _stream_memory(device, settings))
            use_static_encoder(model.flow, settings.batch or _BATCH["cuda"])
        engine = cls(model, settings)
        try:
            if settings.warm_up or settings.compile:  # compiling happens, or fails, at the first use
                with ThreadPoolExecutor(1) as thread:  # an event loop may be running on this one
                    thread.submit(engine._warm_up).result()
        except Exception as error:
            engine.close()
            if settings.compile:
                _check_compiler(error)
            raise
        return engine

    @property
    def closed(self) -> bool:
        """Whether `close` has been called; requests are refused from then on."""
        return self._closed

    def synthesize(self, request: SynthesisRequest, on_position: PositionCallback | None = None) -> Synthesis:
        """Begin a request. `on_position` hears its place in the queue (1 is next, 0 its turn).

        Raises (here or while iterating):
            InvalidRequestError, VoiceNotFoundError, VoiceMismatchError, QueueFullError, EngineStoppedError
        """
        if self._closed:
            raise EngineStoppedError("The engine has been closed.")
        _check_request(request, self.settings)
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        timings = Timings()
        notices = self.frontend.notices(request.mode, request.instruct)
        return Synthesis(seed, timings, self._run(request, seed, timings, on_position), notices)

    async def make_prompt(self, source: str | Path | bytes, text: str = "") -> Prompt:
        """A voice from a recording and what is said in it. What does not depend on the text is computed only once for
        the same recording, also when it is asked for again before it is there.

        Raises:
            InvalidAudioError: the recording cannot be used.
        """
        data = await asyncio.to_thread(read_recording, source)
        if self._closed:
            raise EngineStoppedError("The engine has been closed.")
        key = hashlib.sha256(data).hexdigest()
        making = self._prompts.pop(key, None)  # the latest comes last; each step holds with several event loops
        if making is None or (making.done() and making.exception()):
            making = self._prompt_makers.submit(self.frontend.make_prompt, data)
        self._prompts[key] = making
        while len(self._prompts) > _PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        prompt = await asyncio.shield(asyncio.wrap_future(making))  # somebody else may wait for it too
        return self.frontend.with_text(prompt, text)

    async def enroll(self, name: str, source: str | Path | bytes, text: str = "", *, replace: bool = False) -> Voice:
        """Save a voice under a name.

        Raises:
            InvalidAudioError, InvalidRequestError, VoiceExistsError
        """
        prompt = await self.make_prompt(source, text)
        await self._scheduler.run(self._token2wav.remember(prompt), runs_dry(time.perf_counter() + _PATIENCE))
        return await asyncio.to_thread(self.voices.enroll, name, prompt, replace=replace)

    def close(self) -> None:
        """Stop the workers; requests in flight end with EngineStoppedError."""
        if self._closed:
            return
        self._closed = True
        self.queue.close()
        self._speech_lm.close()
        self._prompt_makers.shutdown(wait=True)
        self._scheduler.close()
        self._arrivals.shutdown(wait=True)

    async def _run(
        self, request: SynthesisRequest, seed: int, timings: Timings, on_position: PositionCallback | None
    ) -> AsyncGenerator[AudioChunk, None]:
        def report(position: int) -> None:
            self._observe_queue()
            if on_position is not None:
                on_position(position)

        submitted = time.perf_counter()
        outcome = "cancelled"
        try:
            async with self.queue.admit(report):
                started = time.perf_counter()
                timings.queue = started - submitted
                metrics.QUEUE_SECONDS.observe(timings.queue)
                listening = 0.0  # seconds that the listener took between asking for chunks
                async with aclosing(self._speak(request, seed, timings, submitted)) as chunks:
                    async for chunk in chunks:
                        made = time.perf_counter()
                        if timings.first_audio is None:
                            timings.first_audio = made - submitted
                            metrics.FIRST_AUDIO_SECONDS.observe(timings.first_audio)
                        timings.chunks += 1
                        timings.audio_seconds += len(chunk.samples) / chunk.sample_rate
                        timings.work_seconds = made - started - listening
                        yield chunk
                        listening += time.perf_counter() - made
                self.queue.took(time.perf_counter() - started)
            if not timings.chunks:
                raise CosyError(
                    "The model made no sound for this text; try another seed or text.", param="seed", code="no_sound"
                )
            outcome = "done"
        except Exception:
            outcome = "failed"
            raise
        finally:
            metrics.REQUESTS.labels(request.mode, outcome).inc()
            metrics.AUDIO_SECONDS.inc(timings.audio_seconds)
            metrics.SPEECH_TOKENS.inc(timings.tokens)
            if timings.rtf is not None:
                metrics.REAL_TIME_FACTOR.observe(timings.rtf)
            self._observe_queue()

    async def _speak(
        self, request: SynthesisRequest, seed: int, timings: Timings, submitted: float
    ) -> AsyncGenerator[AudioChunk, None]:
        prompt = await self._prompt_of(request)
        pieces = await self._pieces(request)
        ahead: asyncio.Queue[_TokenStream] = asyncio.Queue(maxsize=1)
        pump = asyncio.create_task(self._pump(request, prompt, pieces, seed, ahead))
        index = 0
        try:
            for piece in range(len(pieces)):
                stream = await ahead.get()
                session = self._token2wav.session(
                    prompt, self.settings.hops, stream=request.stream, seed=seed + piece, speed=request.speed
                )
                urgency = partial(_urgency, request, timings, submitted)
                async with aclosing(self._vocode(session, stream, timings, submitted, urgency)) as sounds:
                    async for samples in sounds:
                        if session.done and request.mode != "vc":
                            samples = np.pad(samples, (0, self._pause(request)))
                        yield AudioChunk(samples, self.model.sample_rate, index, piece, len(pieces), seed)
                        index += 1
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    def _pause(self, request: SynthesisRequest) -> int:
        """Samples of silence after a piece of text."""
        return round(self.model.pause * self.model.sample_rate / request.speed)

    async def _vocode(
        self,
        session: Session,
        stream: _TokenStream,
        timings: Timings,
        submitted: float,
        urgency: Callable[[], Urgency],
    ) -> AsyncGenerator[np.ndarray, None]:
        """Sound of one piece, as soon as its tokens allow."""
        silence = SilenceFilter(SILENT_CODES[self.model.name])
        preparing = asyncio.create_task(self._scheduler.run(session.prepare(), urgency()))  # beside the first tokens
        try:
            while not session.done:
                while not session.ready:
                    token = await stream.get()
                    if isinstance(token, BaseException):
                        raise token
                    if token is _END:
                        session.finish()
                        break
                    if timings.first_token is None:
                        timings.first_token = time.perf_counter() - submitted
                    timings.tokens += 1
                    if silence.keeps(token):
                        session.push([token])
                if session.ready:
                    await preparing
                    arriving = await self._scheduler.run(_heard(session), urgency())
                    samples = await self._arrived(arriving)
                    if len(samples):
                        yield samples
        finally:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)

    async def _arrived(self, arriving: Callable[[], np.ndarray]) -> np.ndarray:
        """Wait for a chunk, not in the threads that those share who ask for something new."""
        try:
            arrival = self._arrivals.submit(arriving)
        except RuntimeError:
            if self._closed:
                raise EngineStoppedError("The engine has been closed.") from None
            raise
        return await asyncio.wrap_future(arrival)

    async def _pump(
        self,
        request: SynthesisRequest,
        prompt: Prompt,
        pieces: list[_Piece],
        seed: int,
        ahead: asyncio.Queue[_TokenStream],
    ) -> None:
        """Fill one token stream after the other, at most one piece ahead of the sound."""
        for number, piece in enumerate(pieces):
            first = self._token2wav.first_tokens(self.settings.hops) if request.stream and not number else None
            stream = _TokenStream(first)
            await ahead.put(stream)
            try:
                async with aclosing(self._tokens(request, prompt, piece, seed + number, first)) as tokens:
                    async for token in tokens:
                        await stream.put(token)
                stream.end()
            except Exception as error:
                stream.end(error)
                return

    async def _tokens(
        self, request: SynthesisRequest, prompt: Prompt, piece: _Piece, seed: int, first: int | None
    ) -> AsyncGenerator[int, None]:
        if request.mode == "vc":
            for token in await asyncio.to_thread(self.frontend.speech_tokens, request.source):
                yield int(token)
            return
        text = piece if isinstance(piece, str) else ""
        inputs = self.frontend.inputs(request.mode, text, prompt, request.instruct)
        lm_request = SpeechLMRequest(
            text=inputs.text_token,
            prompt_text=inputs.lm_prompt_text,
            prompt_speech=inputs.lm_prompt_speech,
            seed=seed,
            sampling=self.model.sampling,
            first=first,
            patience=min(_MOST_PATIENCE, (self.queue.active - 1) * _PATIENCE_EACH) if request.stream else 0.0,
        )
        if isinstance(piece, str):
            generated = self._speech_lm.generate(lm_request)
        else:
            arriving = self.frontend.encode_arriving(_in_time(piece))
            generated = self._speech_lm.generate_bistream(lm_request, arriving)
        async with aclosing(generated) as tokens:
            async for token in tokens:
                yield token

    async def _pieces(self, request: SynthesisRequest) -> list[_Piece]:
        if request.mode == "vc":
            return [""]
        if not isinstance(request.text, str):
            return [request.text]
        return await asyncio.to_thread(self.frontend.split, request.text, text_frontend=request.text_frontend)

    async def _prompt_of(self, request: SynthesisRequest) -> Prompt:
        if request.prompt is not None:
            return request.prompt
        return self.frontend.prompt_of(await asyncio.to_thread(self.voices.get, request.voice))

    def _observe_queue(self) -> None:
        metrics.ACTIVE.set(self.queue.active)
        metrics.WAITING.set(self.queue.waiting)

    def _warm_up(self) -> None:
        """Run the whole pipeline once on made-up tokens, so that the first listener does not pay for it."""
        started = time.perf_counter()
        self.frontend.split("Warm up, #1.")
        prompt = Prompt(
            text="",
            text_token=torch.zeros(0, dtype=torch.int32),
            speech_token=torch.zeros(50, dtype=torch.int32),
            speech_feat=torch.zeros(100, self.model.mel.num_mels),
            embedding=torch.ones(self.model.flow.spk_embed_affine_layer.in_features),
        )
        flow = self.model.flow
        for static in (flow.decoder.estimator, getattr(flow, "encoder", None), self._token2wav.hift):
            if isinstance(static, StaticEstimator | StaticEncoder | StaticVocoder):
                self._scheduler.submit(_capturing(static, self._scheduler.batch), first_sound(started)).result()
        for stream in (True, False):
            session = self._token2wav.session(prompt, self.settings.hops, stream=stream, seed=0)
            session.push([0] * 60)
            session.finish()
            while not session.done:
                self._scheduler.submit(session.chunk(), first_sound(started)).result()
        asyncio.run(self._warm_up_lm(prompt))
        logger.info("warmed up in %.1f s", time.perf_counter() - started)

    async def _warm_up_lm(self, prompt: Prompt) -> None:
        inputs = self.frontend.inputs("cross_lingual", "warm up", prompt)
        request = SpeechLMRequest(inputs.text_token, [], [], 0, self.model.sampling)
        async with aclosing(self._speech_lm.generate(request)) as tokens:
            async for _ in tokens:
                break


def _capturing(static: StaticEstimator | StaticEncoder | StaticVocoder, streams: int) -> Making[None]:
    static.warm_up(streams)
    yield from ()


def _bytes(mebibytes: int | None) -> int | None:
    return None if mebibytes is None else mebibytes * 2**20


def _stream_memory(device: torch.device, settings: Settings) -> int:
    """Bytes on a GPU for what streams and voices remember; vLLM takes its share after that."""
    others = settings.vllm.gpu_memory_utilization if settings.lm_backend == "vllm" else 0.0
    given = _bytes(settings.stream_memory_mb)
    return default_stream_memory(device, others) if given is None else given


def _static_vocoder(model: CosyVoiceModel, settings: Settings) -> StaticVocoder:
    frames = ChunkFrames.of(model.flow, model.hift, settings.hops, PACES[model.device.type])
    return StaticVocoder(model.hift, graphs=True, frames=frames)


def _runs_graphs(device: torch.device, settings: Settings) -> bool:
    return device.type == "cuda" and not settings.upstream_exact


def _urgency(request: SynthesisRequest, timings: Timings, submitted: float) -> Urgency:
    """Of the next chunk. Its moment is not in the past, however long ago the listener ran dry, stopped to fetch what
    there is, or began to wait for the whole: who comes new would wait for all that."""
    now = time.perf_counter()
    if not request.stream:
        return runs_dry(now + _PATIENCE)
    if timings.first_audio is None:
        return first_sound(submitted + timings.queue)
    return runs_dry(max(now, submitted + timings.first_audio + timings.audio_seconds))


async def _in_time(text: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """Text as it arrives; a source that stalls must not hold its place for ever."""
    iterator = aiter(text)
    while True:
        try:
            yield await asyncio.wait_for(anext(iterator), _TEXT_PAUSE)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidRequestError(
                f"No more text came for {_TEXT_PAUSE:.0f} seconds; end the text when it is complete.", param="text"
            ) from None


def _heard(session: Session) -> Making[Callable[[], np.ndarray]]:
    """The next chunk of a session, as a function that waits for it to arrive in the host's memory."""
    samples = yield from session.chunk()
    if samples.device.type == "cpu":
        return samples.numpy
    host = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
    host.copy_(samples, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # or who waits would keep a core busy
    arrived.record()

    def wait() -> np.ndarray:
        arrived.synchronize()
        return host.numpy()

    return wait


_Piece = str | AsyncIterator[str]


def _check_backends(settings: Settings) -> None:
    if settings.lm_backend == "vllm":
        find_vllm()
        if settings.upstream_exact:
            raise BackendUnavailableError("upstream_exact needs the speech LM on PyTorch.", param="load_vllm")


def _speech_lm(model: CosyVoiceModel, settings: Settings, end_of_prompt: int | None, threads: int | None) -> SpeechLM:
    if settings.lm_backend == "torch":
        return TorchSpeechLM(
            model.lm,
            model.device,
            end_of_prompt=end_of_prompt,
            upstream_exact=settings.upstream_exact,
            threads=threads,
        )
    from cosy_engine.speech_lm.vllm_export import export_model
    from cosy_engine.speech_lm.vllm_lm import VllmSpeechLM

    model.lm.to("meta")  # vLLM's process has the weights
    return VllmSpeechLM(model.lm, export_model(model.directory), settings.vllm, end_of_prompt=end_of_prompt)


def _check_compiler(error: Exception) -> None:
    """Say what to do when the warm-up of a compiled model failed because of the compiler."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    if isinstance(error, TorchDynamoException):
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise BackendUnavailableError(
            f"torch.compile does not work here ({reason}): install a C++ compiler such as g++, or leave load_jit and "
            "COSY_COMPILE off.",
            param="load_jit",
        ) from error


def _check_request(request: SynthesisRequest, settings: Settings) -> None:
    if request.mode not in get_args(Mode):
        raise InvalidRequestError(f"mode must be one of {', '.join(get_args(Mode))}.", param="mode")
    if not isinstance(request.text, str | AsyncIterable):
        raise InvalidRequestError("text must be a string, or an async iterator of strings.", param="text")
    low, high = _SPEED_RANGE
    if not low <= request.speed <= high:
        raise InvalidRequestError(
            f"speed must be between {low} and {high}, got {request.speed}.",
            param="speed",
            code="bad_speed",
            low=low,
            high=high,
        )
    if request.seed is not None and not 0 <= request.seed <= _MAX_SEED:
        raise InvalidRequestError(
            f"seed must be between 0 and {_MAX_SEED}, got {request.seed}.", param="seed", code="bad_seed"
        )
    if settings.upstream_exact and request.stream and request.speed != 1:
        raise InvalidRequestError(
            "With upstream_exact the speed changes only without streaming.", param="speed", code="speed_of_stream"
        )
    if request.prompt is None and request.voice is None:
        raise InvalidRequestError(
            "Choose a saved voice or give a recording to speak like.", param="voice", code="need_voice"
        )
    if request.mode == "instruct" and not request.instruct.strip():
        raise InvalidRequestError(
            "Say how it shall be spoken, for example: speak slowly.", param="instruct", code="need_instruction"
        )
    if request.mode == "vc" and request.source is None:
        raise InvalidRequestError("Give the recording whose voice shall be converted.", param="source")
