"""The API that CosyVoice users know: `AutoModel(...)` and its `inference_*` generators.

    model = AutoModel(model_dir="iic/CosyVoice2-0.5B")
    for result in model.inference_zero_shot("Hello.", "What the recording says.", "recording.wav", stream=True):
        result["tts_speech"]  # float32 [1, n] at model.sample_rate

The engine is asynchronous; it runs on an event loop of its own thread, and the generators hand its chunks over. Closing
a generator, or letting go of it, stops the work behind it. The seeds of requests are drawn from torch's generator, so
`torch.manual_seed` makes the sound reproducible, as CosyVoice users expect.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from cosy_engine.audio.decode import Recording, load_audio
from cosy_engine.config import Settings
from cosy_engine.engine import AudioChunk, Engine, SynthesisRequest
from cosy_engine.errors import EngineStoppedError, InvalidRequestError, VoiceNotFoundError
from cosy_engine.frontend import Prompt
from cosy_engine.voices import Voice
from cosy_engine.voices.spk2info import read_spk2info, write_spk2info

TENSOR_RATE = 16000  # of recordings that are given as tensors

Result = dict[str, Tensor]
Audio = str | Path | Tensor
Text = str | Iterable[str]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class CosyVoice:
    """A loaded model. `close()`, or leaving a `with` block, stops it; so does the end of the program.

    Args:
        model_dir: a directory, or a ModelScope or Hugging Face id.
        load_jit: compile the flow's network (`torch.compile`): slower to start, faster after. In streaming the shapes
            change with every chunk, so the first streams wait for the compiler too.
        load_trt: the flow on TensorRT, built at the first start; see docs/performance.md.
        load_vllm: the speech LM on vLLM, whose processes import the program again: it needs `if __name__ ==
            "__main__":`. `settings.vllm` says how it runs.
        fp16: half precision, on a GPU.
        settings: everything else, and what the arguments above leave off.

    Raises:
        ModelDirectoryError: the directory is missing or incomplete.
        BackendUnavailableError: `load_trt` or `load_vllm` cannot be had here.
    """

    def __init__(
        self,
        model_dir: str | Path,
        load_jit: bool = False,
        load_trt: bool = False,
        load_vllm: bool = False,
        fp16: bool = False,
        trt_concurrent: int = 1,
        settings: Settings | None = None,
    ) -> None:
        chosen = {
            "compile": load_jit,
            "flow_backend": "tensorrt" if load_trt else None,
            "trt_concurrent": trt_concurrent if load_trt else None,
            "lm_backend": "vllm" if load_vllm else None,
            "fp16": fp16,
        }
        chosen = {name: value for name, value in chosen.items() if value}
        self.engine = Engine.load(model_dir, (settings or Settings()).model_copy(update=chosen))
        self.model_dir = str(self.engine.model.directory)
        self.sample_rate = self.engine.model.sample_rate
        self._speakers = _read_speakers(self._spk2info, self.engine.model.fingerprint)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="cosy-engine", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _shut_down, self.engine, self._loop, thread)

    def list_available_spks(self) -> list[str]:
        """Ids of the speakers in spk2info.pt and of those added since."""
        return list(self._speakers)

    def add_zero_shot_spk(self, prompt_text: str, prompt_wav: Audio, zero_shot_spk_id: str) -> bool:
        """Keep the voice of a recording under an id, until `save_spkinfo` for this process only.

        Raises:
            InvalidAudioError, InvalidRequestError
        """
        if not zero_shot_spk_id:
            raise InvalidRequestError("Give the speaker an id that is not empty.", param="zero_shot_spk_id")
        prompt = self._make_prompt(prompt_wav, prompt_text)
        self._speakers[zero_shot_spk_id] = Voice(
            zero_shot_spk_id, zero_shot_spk_id, "builtin", prompt, self.engine.model.fingerprint, ""
        )
        return True

    def save_spkinfo(self) -> None:
        """Write all speakers to the model directory's spk2info.pt, in the form that CosyVoice reads."""
        write_spk2info(self._spk2info, self._speakers)

    def inference_sft(
        self, tts_text: Text, spk_id: str, stream: bool = False, speed: float = 1.0, text_frontend: bool = True
    ) -> Iterator[Result]:
        """Speak with a speaker of `list_available_spks`."""
        yield from self._speak(tts_text, stream, speed, text_frontend, prompt=self._speaker(spk_id))

    def inference_zero_shot(
        self,
        tts_text: Text,
        prompt_text: str,
        prompt_wav: Audio,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Iterator[Result]:
        """Speak like a recording in which `prompt_text` is said, or like a speaker that was added."""
        prompt = self._prompt(prompt_wav, prompt_text, zero_shot_spk_id)
        yield from self._speak(tts_text, stream, speed, text_frontend, prompt=prompt)

    def inference_cross_lingual(
        self,
        tts_text: Text,
        prompt_wav: Audio,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Iterator[Result]:
        """Speak another language than the recording's, or without knowing what is said in it."""
        prompt = self._prompt(prompt_wav, "", zero_shot_spk_id)
        yield from self._speak(tts_text, stream, speed, text_frontend, mode="cross_lingual", prompt=prompt)

    def inference_instruct2(
        self,
        tts_text: Text,
        instruct_text: str,
        prompt_wav: Audio,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Iterator[Result]:
        """Speak in the way that `instruct_text` asks for."""
        prompt = self._prompt(prompt_wav, "", zero_shot_spk_id)
        yield from self._speak(
            tts_text, stream, speed, text_frontend, mode="instruct", prompt=prompt, instruct=instruct_text
        )

    def inference_vc(
        self, source_wav: Audio, prompt_wav: Audio, stream: bool = False, speed: float = 1.0
    ) -> Iterator[Result]:
        """Say what is said in `source_wav` with the voice of `prompt_wav`."""
        source = _recording(source_wav) if isinstance(source_wav, Tensor) else load_audio(source_wav)
        prompt = self._prompt(prompt_wav, "", "")
        yield from self._speak("", stream, speed, True, mode="vc", prompt=prompt, source=source)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _spk2info(self) -> Path:
        return Path(self.model_dir) / "spk2info.pt"

    def _prompt(self, prompt_wav: Audio, prompt_text: str, speaker: str) -> Prompt:
        return self._speaker(speaker) if speaker else self._make_prompt(prompt_wav, prompt_text)

    def _speaker(self, speaker: str) -> Prompt:
        if speaker not in self._speakers:
            known = ", ".join(list(self._speakers)[:10]) or "none yet, see add_zero_shot_spk"
            raise VoiceNotFoundError(f"There is no speaker {speaker[:40]!r}; known: {known}.", param="zero_shot_spk_id")
        return self._speakers[speaker].prompt

    def _make_prompt(self, prompt_wav: Audio, prompt_text: str) -> Prompt:
        if isinstance(prompt_wav, Tensor):
            return self.engine.frontend.make_prompt(_recording(prompt_wav), prompt_text)
        return self._start(self.engine.make_prompt(prompt_wav, prompt_text)).result()

    def _speak(
        self, tts_text: Text, stream: bool, speed: float, text_frontend: bool, **fields: Any
    ) -> Iterator[Result]:
        text = tts_text if isinstance(tts_text, str) else _arriving(iter(tts_text))
        seed = int(torch.randint(2**31, ()))
        request = SynthesisRequest(
            text=text, stream=stream, speed=speed, seed=seed, text_frontend=text_frontend, **fields
        )
        steps: queue.SimpleQueue[AudioChunk | Exception | None] = queue.SimpleQueue()
        work = self._start(_hand_over(self.engine, request, steps))
        try:
            while (step := steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                yield {"tts_speech": torch.from_numpy(step.samples)[None]}
        finally:
            work.cancel()

    def _start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        if not self.close.alive:
            work.close()
            raise EngineStoppedError("This model has been closed.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


AutoModel = CosyVoice2 = CosyVoice3 = CosyVoice


async def _hand_over(
    engine: Engine, request: SynthesisRequest, steps: queue.SimpleQueue[AudioChunk | Exception | None]
) -> None:
    """Put a request's chunks into `steps`; an exception or None ends them."""
    end: Exception | None = EngineStoppedError("The model has been closed.")
    try:
        synthesis = engine.synthesize(request)
        for notice in synthesis.notices:
            logger.warning(notice.message)
        async for chunk in synthesis:
            steps.put(chunk)
        end = None
    except Exception as error:
        end = error
    finally:
        steps.put(end)


def _shut_down(engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Stop the engine, end its requests, and then its thread."""

    async def cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    engine.close()
    asyncio.run_coroutine_threadsafe(cancel_all(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _arriving(parts: Iterator[str]) -> AsyncIterator[str]:
    """Text that a generator gives part by part, without holding up the event loop meanwhile."""
    while (part := await asyncio.wrap_future(_in_daemon_thread(next, parts, None))) is not None:
        yield part


def _in_daemon_thread(function: Callable[..., _T], *arguments: object) -> Future[_T]:
    """Call it in a thread that does not keep the program from ending when it hangs, as a pool's threads would."""
    result: Future[_T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="arriving-text", daemon=True).start()
    return result


def _recording(audio: Tensor) -> Recording:
    """16 kHz samples, `[n]` or `[1, n]`."""
    samples = audio.detach().to("cpu", torch.float32).squeeze()
    if samples.ndim != 1:
        raise InvalidRequestError(
            f"A recording given as a tensor is one channel at {TENSOR_RATE} Hz, not of shape {tuple(audio.shape)}.",
            param="prompt_wav",
        )
    return Recording(samples.numpy(), TENSOR_RATE)


def _read_speakers(path: Path, fingerprint: str) -> dict[str, Voice]:
    return read_spk2info(path, fingerprint) if path.is_file() else {}
