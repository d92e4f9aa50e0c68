"""vLLM's asynchronous engine on an event loop of its own thread, started again when its process dies.

vLLM's engine belongs to one event loop, listeners have many: requests come to its loop, ids go back to theirs.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosy_engine.config import VllmSettings
from cosy_engine.errors import (
    BackendFailedError,
    BackendUnavailableError,
    CosyError,
    EngineStoppedError,
    InvalidRequestError,
)
from cosy_engine.speech_lm.vllm_plugin import find_vllm, register

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_NEW_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_PAUSES = (0.0, 1.0, 4.0, 15.0, 60.0)  # seconds before a start, by the short lives and failures before it
_LONG_LIFE = 300.0  # seconds; a death after them counts as the first
_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # `vllm_ras` or `vllm_slots` samples
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, which a fork would lose
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout may be where the sound goes
}


@dataclass(frozen=True)
class Generation:
    """At most `most` ids after `prompt`, fewer if one of `stop_ids` comes; `extra` is for the logits processor."""

    prompt: list[int]
    most: int
    stop_ids: list[int]
    extra: dict[str, Any]


class _NotNumbersError(Exception):
    """The model's scores were not numbers."""


_Item = list[int] | Exception | None  # ids, what went wrong, or the end


@dataclass(eq=False)
class _Listener:
    """Where the ids of a request go, and the task that gets them from vLLM."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None


class VllmEngine:
    """A running vLLM. The methods above the line are for everyone, those below it for the engine's own loop.

    Args:
        export: directory written by `vllm_export`.
        not_a_number: the id that says that the model's scores are not numbers.
        warm_up: a request that is run alone and then `max_num_seqs` times at once whenever vLLM has started.

    Raises:
        BackendUnavailableError: vLLM is not there, or does not start with these settings.
    """

    def __init__(self, export: Path, settings: VllmSettings, not_a_number: int, warm_up: Generation) -> None:
        find_vllm()
        self._arguments = _engine_arguments(export, settings)
        self._not_a_number = not_a_number
        self._warm_up = warm_up
        self._names = map(str, itertools.count())
        self._listeners: set[_Listener] = set()  # those whose requests vLLM works on
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, _Item]]] = {}
        self._stopping = False
        self._not_numbers = False
        self._loop = asyncio.new_event_loop()
        self._ready: asyncio.Future[AsyncLLM] = self._loop.create_future()
        self._supervisor = self._loop.create_task(self._supervise())
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._running(), self._loop).result()
        except CosyError as error:
            self.close()
            raise BackendUnavailableError(error.message, param="load_vllm") from error

    @property
    def live(self) -> int:
        """Requests that vLLM works on at the moment."""
        return len(self._listeners)

    @property
    def dtype(self) -> str:
        """Precision that the model runs in."""
        return self._arguments["dtype"]

    async def generate(self, generation: Generation) -> AsyncGenerator[int, None]:
        """Ids as they come, the one that ends them included; from any event loop. Leaving it aborts the request.

        Raises:
            BackendFailedError: vLLM's process died or cannot be started.
            EngineStoppedError: `close` was called.
            InvalidRequestError: vLLM refuses the request.
        """
        if self._stopping:
            raise _stopped()
        listener = _Listener(asyncio.get_running_loop())
        work = asyncio.run_coroutine_threadsafe(self._serve(generation, listener), self._loop)
        try:
            while (item := await listener.items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                for token in item:
                    yield token
        finally:
            work.cancel()

    def close(self) -> None:
        """End vLLM's processes; open iterators raise EngineStoppedError."""
        if self._stopping:
            return
        self._stopping = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        gc.collect()  # vLLM's engine is part of cycles, and complains when it is found at the program's exit

    # ------------------------------------------------------------------------------------------------------------------

    async def _running(self) -> AsyncLLM:
        """The engine, as soon as there is one."""
        while (engine := await asyncio.shield(self._ready)).errored:
            await asyncio.sleep(0.05)  # its end has not been noticed yet
        return engine

    async def _serve(self, generation: Generation, listener: _Listener) -> None:
        listener.task = asyncio.current_task()
        try:
            engine = await self._running()
            self._listeners.add(listener)
            async with aclosing(self._ids(engine, generation)) as parts:
                async for ids in parts:
                    self._post(listener, ids)
            self._post(listener, None)
        except Exception as error:
            self._not_numbers |= isinstance(error, _NotNumbersError)
            self._post(listener, _for_the_caller(error))
        finally:
            self._listeners.discard(listener)

    async def _ids(self, engine: AsyncLLM, generation: Generation) -> AsyncGenerator[list[int], None]:
        prompt = {"prompt_token_ids": generation.prompt}
        async with aclosing(engine.generate(prompt, self._sampling(generation), next(self._names))) as outputs:
            async for output in outputs:
                ids = list(output.outputs[0].token_ids)
                if self._not_a_number in ids:
                    raise _NotNumbersError
                yield ids

    def _sampling(self, generation: Generation) -> SamplingParams:
        """Greedy, since our sampling leaves no choice."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=generation.most,
            stop_token_ids=[*generation.stop_ids, self._not_a_number],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=generation.extra,
        )

    def _post(self, listener: _Listener, item: _Item) -> None:
        """Send an item to its listener; what one step of vLLM makes for one loop goes there together."""
        if not self._outbox:
            self._loop.call_soon(self._empty_outbox)
        self._outbox.setdefault(listener.loop, []).append((listener, item))

    def _empty_outbox(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for loop, posts in outbox.items():
            try:
                loop.call_soon_threadsafe(_deliver, posts)
            except RuntimeError:  # the listeners' event loop is closed
                for listener, _ in posts:
                    listener.task.cancel()

    async def _supervise(self) -> None:
        """Start vLLM, wait for its end, pause, start it again."""
        short_lives = 0
        while True:
            await asyncio.sleep(_PAUSES[min(short_lives, len(_PAUSES) - 1)])
            began = time.monotonic()
            try:
                engine = await self._start()
            except Exception as error:
                logger.error("vLLM does not start", exc_info=error)
                self._ready.set_exception(BackendFailedError(f"vLLM does not start: {_first_line(error)}"))
                self._ready.exception()  # somebody has looked at it, even if no request waits
                self._ready = self._loop.create_future()
            else:
                try:
                    self._ready.set_result(engine)
                    while not engine.errored and not self._not_numbers:
                        await asyncio.sleep(0.2)
                    logger.error("vLLM's process has ended or is of no use; starting it again")
                finally:
                    self._ready = self._loop.create_future()  # who comes now waits for the next start
                    await self._end_requests(_stopped() if self._stopping else _failed())
                    engine.shutdown()  # on this loop: its own tasks would take the end for a crash
            short_lives = 1 if time.monotonic() - began > _LONG_LIFE else short_lives + 1

    async def _start(self) -> AsyncLLM:
        """A warm engine, in float32 if the wanted precision does not do."""
        while True:
            self._fall_back_if_needed()
            made: list[AsyncLLM] = []
            making = self._loop.run_in_executor(None, _make, self._arguments, made)
            try:
                await asyncio.shield(making)
                engine = made.pop()
                try:
                    for at_once in (1, self._arguments["max_num_seqs"]):
                        await asyncio.gather(*(self._exhaust(engine) for _ in range(at_once)))
                    return engine
                except BaseException:
                    engine.shutdown()
                    raise
            except _NotNumbersError:
                self._not_numbers = True
            except asyncio.CancelledError:
                await asyncio.gather(making, return_exceptions=True)  # a start cannot be interrupted
                for engine in made:
                    engine.shutdown()
                raise

    async def _exhaust(self, engine: AsyncLLM) -> None:
        async for _ in self._ids(engine, self._warm_up):
            pass

    def _fall_back_if_needed(self) -> None:
        if not self._not_numbers:
            return
        if self.dtype == "float32":
            raise BackendFailedError(
                "The speech LM's scores are not numbers, not even in float32: its weights are broken."
            )
        logger.warning("In %s the speech LM's scores are not numbers; it runs in float32 from now on", self.dtype)
        self._arguments["dtype"] = "float32"
        self._not_numbers = False

    async def _end_requests(self, error: Exception) -> None:
        tasks = [listener.task for listener in self._listeners]
        for listener in self._listeners:
            self._post(listener, error)
            listener.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._empty_outbox()

    async def _shut_down(self) -> None:
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        del self._supervisor  # which holds the engine
        self._ready.set_exception(_stopped())
        self._ready.exception()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        self._empty_outbox()
        await self._loop.shutdown_default_executor()


def _deliver(posts: list[tuple[_Listener, _Item]]) -> None:
    for listener, item in posts:
        listener.items.put_nowait(item)


def _engine_arguments(export: Path, settings: VllmSettings) -> dict[str, Any]:
    return {
        "model": str(export),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "stream_interval": 3,  # ids 1, 4, 7 .. 28 come with those before them: half the work of this process
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.max_num_seqs,
        "max_model_len": settings.max_model_len,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
    } | settings.args


def _make(arguments: dict[str, Any], made: list[AsyncLLM]) -> None:
    """Start vLLM's processes, which takes half a minute or more, and add the engine to `made`.

    It is not the result, because vLLM keeps this call's frame, which would keep the engine.
    """
    with _environment():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        register()
        ours = _NEW_RUNNER not in os.environ

        def start() -> AsyncLLM:
            # As a server: without a context, vLLM takes no more than 2048 tokens of prompts a step on a large GPU, too.
            engine_arguments = AsyncEngineArgs(**_sampling_arguments() | arguments)
            return AsyncLLM.from_engine_args(engine_arguments, usage_context=UsageContext.OPENAI_API_SERVER)

        try:
            made.append(start())
        except ValueError as error:
            if not ours or "Model Runner V2" not in str(error):
                raise
            logger.warning("vLLM's older model runner is used, which is slower: %s", _first_line(error))
            os.environ[_NEW_RUNNER] = "0"
            made.append(start())


def _sampling_arguments() -> dict[str, Any]:
    """How vLLM comes to sample as we do: `vllm_slots` in its V2 model runner, or `vllm_ras`.

    V2 asks less of the host thread, so it is wanted where it can be had: on NVIDIA GPUs whose memory the host can write
    to, with Triton. VLLM_USE_V2_MODEL_RUNNER=0 keeps V1.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils.platform_utils import is_uva_available

    can_be_had = current_platform.is_cuda() and HAS_TRITON and is_uva_available()
    if int(os.environ.setdefault(_NEW_RUNNER, str(int(can_be_had)))):
        return {"worker_extension_cls": "cosy_engine.speech_lm.vllm_worker.Worker"}
    return {"logits_processors": ["cosy_engine.speech_lm.vllm_ras:RasLogitsProcessor"]}


@contextmanager
def _environment() -> Iterator[None]:
    """vLLM's variables, to stay; what else vLLM changes, such as LD_PRELOAD, is for its own processes."""
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {*os.environ, *before}:
            if name.startswith("VLLM_") or os.environ.get(name) == before.get(name):
                continue
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _for_the_caller(error: Exception) -> CosyError:
    if isinstance(error, CosyError):
        return error
    if isinstance(error, _NotNumbersError):
        return BackendFailedError("The speech LM fails in this precision and is started again in float32; try again.")
    if isinstance(error, ValueError):
        return InvalidRequestError(f"The speech LM refuses the request: {_first_line(error)}")
    logger.error("A request failed in vLLM", exc_info=error)
    return _failed()


def _failed() -> BackendFailedError:
    return BackendFailedError("vLLM stopped while it worked on this request; it is started again, try again.")


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("The speech LM has been stopped.")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
