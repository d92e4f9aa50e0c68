"""The ZeroGPU engine with a `spaces` package that does what the real one does to a function: another process's view
of the arguments and results, a generator that stops when it is closed, and gr.Error for what goes wrong."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gradio as gr
import numpy as np
import pytest

from cosy_engine.audio.decode import load_audio
from cosy_engine.config import Settings
from cosy_engine.engine import Engine, Synthesis, SynthesisRequest
from cosy_engine.errors import CosyError, InvalidRequestError
from cosy_engine.ui import zerogpu
from cosy_engine.ui.zerogpu import ZeroGpuEngine, gpu_seconds, load_engine, on_zerogpu
from tests.recordings import encoded, hum

LONG_TEXT = "This sentence goes on and on, and never seems to end. " * 60


class FakeSpaces(ModuleType):
    """`spaces.GPU(duration=...)`; attributes tell what happened."""

    def __init__(self) -> None:
        super().__init__("spaces")
        self.claimed: list[float] = []
        self.running = 0
        self.refusal: str | None = None

    def GPU(self, *, duration: Callable[..., float]) -> Callable[[Callable], Callable]:
        def decorate(function: Callable) -> Callable:
            def borrowed(*arguments: object) -> Iterator[object]:
                if self.refusal:
                    raise gr.Error(self.refusal)
                self.claimed.append(duration(*arguments))
                there = function(*pickle.loads(pickle.dumps(arguments)))
                self.running += 1
                try:
                    while True:
                        try:
                            made = next(there)
                        except StopIteration:
                            return
                        except Exception as error:
                            raise gr.Error(type(error).__name__) from None
                        yield pickle.loads(pickle.dumps(made))
                finally:
                    there.close()
                    self.running -= 1

            return borrowed

        return decorate


@pytest.fixture(scope="module")
def spaces() -> Iterator[FakeSpaces]:
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeSpaces()
        patch.setitem(sys.modules, "spaces", fake)
        yield fake


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(voices_dir=tmp_path_factory.mktemp("voices"), warm_up=False)


@pytest.fixture(scope="module")
def engine(standin_v2: Path, settings: Settings, spaces: FakeSpaces) -> Iterator[ZeroGpuEngine]:
    engine = ZeroGpuEngine.load(standin_v2, settings)
    yield engine
    engine.close()


async def whole(synthesis: Synthesis) -> np.ndarray:
    return np.concatenate([chunk.samples async for chunk in synthesis])


async def test_speech_is_the_same_as_elsewhere(
    engine: ZeroGpuEngine, spaces: FakeSpaces, standin_v2: Path, settings: Settings
) -> None:
    ordinary = Engine.load(standin_v2, settings)
    request = SynthesisRequest("Good morning.", prompt=await ordinary.make_prompt(encoded(hum(2)), "A buzz."), seed=7)
    wanted = await whole(ordinary.synthesize(request))
    ordinary.close()

    synthesis = engine.synthesize(request)
    assert np.array_equal(await whole(synthesis), wanted)
    assert synthesis.seed == 7
    assert synthesis.timings.tokens > 0 and synthesis.timings.first_token is not None
    assert spaces.claimed[-1] == gpu_seconds(request, {})
    assert spaces.running == 0


async def test_a_saved_voice_and_voice_conversion(engine: ZeroGpuEngine) -> None:
    voice = await engine.enroll("Ann", encoded(hum(2)), "A buzz.")
    assert len(await whole(engine.synthesize(SynthesisRequest("Good morning.", voice=voice.id))))
    source = load_audio(encoded(hum(1)))
    assert len(await whole(engine.synthesize(SynthesisRequest(mode="vc", voice=voice.id, source=source))))


async def test_leaving_stops_the_work(engine: ZeroGpuEngine, spaces: FakeSpaces) -> None:
    prompt = await engine.make_prompt(encoded(hum(2)))
    synthesis = engine.synthesize(SynthesisRequest(LONG_TEXT, mode="cross_lingual", prompt=prompt))
    async for _ in synthesis:
        break
    assert spaces.running == 1
    await synthesis.cancel()
    assert spaces.running == 0
    assert engine.queue.active == 0


async def test_errors_arrive_as_sentences(engine: ZeroGpuEngine, spaces: FakeSpaces) -> None:
    prompt = await engine.make_prompt(encoded(hum(2)))
    with pytest.raises(InvalidRequestError, match="text"):
        await whole(engine.synthesize(SynthesisRequest("?!", prompt=prompt)))

    async def words() -> object:
        yield "Good"

    with pytest.raises(InvalidRequestError, match="whole text"):
        await whole(engine.synthesize(SynthesisRequest(words(), prompt=prompt)))

    spaces.refusal = "Your quota is <a href='x'>used&nbsp;up</a>."
    try:
        with pytest.raises(CosyError, match="^Your quota is used\xa0up.$"):
            await whole(engine.synthesize(SynthesisRequest("Good morning.", prompt=prompt)))
    finally:
        spaces.refusal = None


def test_claims_grow_with_the_text_and_have_an_end() -> None:
    short, long = (gpu_seconds(SynthesisRequest("word " * count), {}) for count in (1, 100))
    assert short < long < gpu_seconds(SynthesisRequest("word " * 2000), {}) == 120


def test_elsewhere_the_ordinary_engine_is_loaded(
    monkeypatch: pytest.MonkeyPatch, standin_v2: Path, settings: Settings
) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert not on_zerogpu()
    engine = load_engine(standin_v2, settings)
    engine.close()
    assert type(engine) is Engine


def test_on_zerogpu_the_model_goes_to_cuda_at_once_and_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, spaces: FakeSpaces, settings: Settings
) -> None:
    loaded = {}
    monkeypatch.setattr(zerogpu.ZeroGpuEngine, "load", lambda model_dir, settings: loaded.update(settings=settings))
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    load_engine("model", settings.model_copy(update={"compile": True, "warm_up": True}))
    used = loaded["settings"]
    assert (used.device, used.compile, used.warm_up) == ("cuda", False, False)
