"""The speech LM on plain PyTorch: one thread that steps all sequences in turn."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import torch

from cosy_engine.cores import use_cores
from cosy_engine.errors import EngineStoppedError
from cosy_engine.modules.half_linear import read_as_half
from cosy_engine.speech_lm import decoding, upstream
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import Choose, SpeechCodeLM, Steps, TextInbox, Waiting
from cosy_engine.speech_lm.graphed_step import GraphedStep
from cosy_engine.speech_lm.sampling import RasSampler, ras_two_step

logger = logging.getLogger(__name__)


class _End:
    """Follows the last code of a sequence."""


class _Sequence:
    """A live sequence, and the way to whoever listens to it."""

    def __init__(self, steps: Steps, inbox: TextInbox) -> None:
        self.steps = steps
        self.inbox = inbox
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[int | Exception | type[_End]] = asyncio.Queue()
        self.waiting = False
        self.abandoned = False

    @property
    def runnable(self) -> bool:
        return self.abandoned or not self.waiting or bool(self.inbox.tokens) or self.inbox.closed

    def deliver(self, item: int | Exception | type[_End]) -> None:
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:  # the listener's event loop is closed
            self.abandoned = True


class TorchSpeechLM:
    """`SpeechLM` on one device.

    The worker thread gives every live sequence one step in turn, always alone in its batch, so the codes of a request
    do not depend, to the last bit, on what runs beside it. Random numbers come from the request's seed, on the CPU.

    Args:
        lm: the model; it is moved to `device`.
        end_of_prompt: id of `<|endofprompt|>` in CosyVoice3, where text streaming has to know it.
        upstream_exact: sample and stream as the public code does.
        threads: that an operation may use on a CPU; None: as many as torch likes.
    """

    name = "torch"

    def __init__(
        self,
        lm: SpeechCodeLM,
        device: torch.device | str = "cpu",
        *,
        end_of_prompt: int | None = None,
        upstream_exact: bool = False,
        threads: int | None = None,
    ) -> None:
        self._lm = lm.to(device).eval()
        self._threads = threads
        if torch.device(device).type == "cuda":
            try:
                lm.llm.single_step = GraphedStep(lm.llm)
            except RuntimeError as error:
                logger.warning("The speech LM runs without CUDA graphs and takes longer: %s", error)
        elif not upstream_exact:
            read_as_half(lm)
        self._end_of_prompt = end_of_prompt
        self._upstream_exact = upstream_exact
        self._decoding = upstream if upstream_exact else decoding
        self._sequences: list[_Sequence] = []
        self._stopping = False
        self._changed = threading.Condition()  # guards what is above, and every inbox
        self._worker = threading.Thread(target=self._work, name="speech-lm", daemon=True)
        self._worker.start()

    @property
    def live(self) -> int:
        """Sequences that hold memory at the moment."""
        return len(self._sequences)

    def generate(self, request: SpeechLMRequest) -> AsyncGenerator[int, None]:
        """Speech codes for `request.text`, as they are generated."""
        return self._listen(self._decoding.unistream(self._lm, request, self._sampler(request)), TextInbox())

    async def generate_bistream(self, request: SpeechLMRequest, text: AsyncIterator[int]) -> AsyncGenerator[int, None]:
        """Speech codes for `request.text` and what arrives from `text`; an exception of `text` is raised here."""
        inbox, failures = TextInbox(), []
        steps = self._decoding.bistream(self._lm, request, inbox, self._sampler(request), self._end_of_prompt)
        reader = asyncio.create_task(self._read(text, inbox, failures))
        try:
            async with aclosing(self._listen(steps, inbox)) as codes:
                async for code in codes:
                    if failures:
                        break
                    yield code
            if failures:
                raise failures[0]
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def close(self) -> None:
        """Stop the thread after its current step; every open iterator raises EngineStoppedError."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._worker.join()

    def _sampler(self, request: SpeechLMRequest) -> Choose:
        if not self._upstream_exact:
            return RasSampler(request.sampling, request.seed)
        generator = torch.Generator().manual_seed(request.seed)
        return lambda scores, decoded: ras_two_step(scores, decoded, request.sampling, generator)

    async def _listen(self, steps: Steps, inbox: TextInbox) -> AsyncGenerator[int, None]:
        sequence = _Sequence(steps, inbox)
        with self._changed:
            if self._stopping:
                raise EngineStoppedError("The speech LM has been stopped.")
            self._sequences.append(sequence)
            self._changed.notify_all()
        try:
            while (item := await sequence.items.get()) is not _End:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            with self._changed:
                sequence.abandoned = True
                self._changed.notify_all()

    async def _read(self, text: AsyncIterator[int], inbox: TextInbox, failures: list[Exception]) -> None:
        try:
            async for token in text:
                with self._changed:
                    inbox.tokens.append(token)
                    self._changed.notify_all()
        except Exception as error:
            failures.append(error)
        finally:
            with self._changed:
                inbox.closed = True
                self._changed.notify_all()

    @torch.inference_mode()
    def _work(self) -> None:
        use_cores(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or any(s.runnable for s in self._sequences))
                turn = [sequence for sequence in self._sequences if sequence.runnable]
            for sequence in turn:
                if self._stopping:
                    break
                self._step(sequence)
            if self._stopping:
                break
        for sequence in list(self._sequences):
            self._remove(sequence, EngineStoppedError("The speech LM has been stopped."))

    def _step(self, sequence: _Sequence) -> None:
        if sequence.abandoned:
            self._remove(sequence, _End)
            return
        try:
            item = next(sequence.steps, _End)
        except Exception as error:  # it is the caller's; the other sequences go on
            item = error
        sequence.waiting = item is Waiting.FOR_TEXT
        if item is _End or isinstance(item, Exception):
            self._remove(sequence, item)
        elif not sequence.waiting:
            sequence.deliver(item)

    def _remove(self, sequence: _Sequence, last: Exception | type[_End]) -> None:
        sequence.steps.close()
        with self._changed:
            self._sequences.remove(sequence)
        sequence.deliver(last)
