"""The flow with an estimator outside PyTorch. onnxruntime stands where TensorRT's engines stand on a GPU."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY

from cosy_engine.checkpoint.load import CosyVoiceModel, load_model
from cosy_engine.config import HopSettings, Settings
from cosy_engine.engine import Engine
from cosy_engine.errors import BackendUnavailableError
from cosy_engine.modules.streaming import init_state
from cosy_engine.token2wav.tensorrt_estimator import Pool, TensorRTEstimator, gpu_of, use_tensorrt, within
from cosy_engine.token2wav.tensorrt_plan import find_library
from cosy_engine.token2wav.token2wav import Token2Wav
from tests.token2wav.onnx_estimator import OnnxEstimator
from tests.token2wav.test_session import TOLERANCE, random_prompt, random_tokens, run

STEPS = 10
Engines = dict[str, OnnxEstimator]


@pytest.fixture
def engines(model: CosyVoiceModel, exported: Callable[..., Path]) -> Iterator[Engines]:
    """The engines in the place of the model's estimator."""
    engines = {variant: OnnxEstimator(exported(variant), most_frames=150) for variant in ("whole", "cached")}
    decoder = model.flow.decoder
    original, decoder.estimator = decoder.estimator, TensorRTEstimator(decoder.estimator, engines)
    yield engines
    decoder.estimator = original


def speak(model: CosyVoiceModel, *, stream: bool, tokens: int, hops: HopSettings | None = None) -> torch.Tensor:
    """The sound of `tokens` tokens after a prompt of 30."""
    hops = hops or HopSettings()
    session = Token2Wav(model.flow, model.hift).session(random_prompt(30), hops, stream=stream, seed=2)
    return torch.cat(run(session, random_tokens(tokens)))


def on_pytorch(model: CosyVoiceModel, **arguments: object) -> torch.Tensor:
    replaced = model.flow.decoder.estimator
    model.flow.decoder.estimator = replaced.estimator
    try:
        return speak(model, **arguments)
    finally:
        model.flow.decoder.estimator = replaced


def out_of_profile() -> float:
    return REGISTRY.get_sample_value("cosy_flow_out_of_profile_total")


def test_a_stream_runs_on_the_cached_step(model: CosyVoiceModel, engines: Engines) -> None:
    before = out_of_profile()
    sound = speak(model, stream=True, tokens=100)
    torch.testing.assert_close(sound, on_pytorch(model, stream=True, tokens=100), atol=TOLERANCE, rtol=0)
    assert engines["cached"].calls > 0 and engines["whole"].calls == 0
    assert out_of_profile() == before


def test_a_whole_utterance_runs_on_the_published_interface(model: CosyVoiceModel, engines: Engines) -> None:
    sound = speak(model, stream=False, tokens=40)
    torch.testing.assert_close(sound, on_pytorch(model, stream=False, tokens=40), atol=TOLERANCE, rtol=0)
    assert (engines["cached"].calls, engines["whole"].calls) == (0, STEPS)


def test_what_the_profile_has_no_room_for_runs_on_pytorch_and_is_counted(
    model: CosyVoiceModel, engines: Engines
) -> None:
    before = out_of_profile()
    sound = speak(model, stream=False, tokens=60)
    torch.testing.assert_close(sound, on_pytorch(model, stream=False, tokens=60), atol=TOLERANCE, rtol=0)
    assert engines["whole"].calls == 0
    assert out_of_profile() == before + STEPS


def test_a_stream_goes_on_after_a_chunk_on_pytorch(model: CosyVoiceModel, engines: Engines) -> None:
    before = out_of_profile()
    hops = HopSettings(token_hop_len_first=100, token_max_hop_len=25)  # the first chunk is too long, the next are not
    sound = speak(model, stream=True, tokens=170, hops=hops)
    torch.testing.assert_close(sound, on_pytorch(model, stream=True, tokens=170, hops=hops), atol=TOLERANCE, rtol=0)
    assert out_of_profile() == before + STEPS
    assert engines["cached"].calls >= 2 * STEPS


def test_a_profile_has_a_lower_and_an_upper_end() -> None:
    low, usual, high = (2, 80, 2), (2, 80, 200), (64, 80, 3000)
    for shape, fits in [((2, 80, 2), True), ((64, 80, 3000), True), ((1, 80, 50), False), ((2, 80, 3001), False)]:
        assert within(shape, low, usual, high) == fits


def test_a_pool_lends_to_one_thread_at_a_time_and_takes_back_after_errors() -> None:
    pool, lent, most = Pool(["a", "b"]), [], []

    def use(number: int) -> None:
        try:
            with pool.borrow() as thing:
                assert thing not in lent
                lent.append(thing)
                most.append(len(lent))
                time.sleep(0.002)
                lent.remove(thing)
                raise RuntimeError
        except RuntimeError:
            done.append(number)

    done: list[int] = []
    threads = [threading.Thread(target=use, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(done) == list(range(20)) and max(most) == 2


def test_without_a_gpu_tensorrt_is_an_error_by_name_and_a_warning_otherwise(
    standin_v2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(device="cpu", voices_dir=tmp_path, warm_up=False, flow_backend="tensorrt")
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPU") as raised:
        Engine.load(standin_v2, settings)
    assert raised.value.param == "load_trt"
    with caplog.at_level(logging.WARNING):
        Engine.load(standin_v2, settings.model_copy(update={"flow_backend": "auto"})).close()
    assert "The flow runs on PyTorch" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["cosyvoice2", "cosyvoice3"])
def test_runs_on_a_gpu(
    layout: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first machine that can: plans are built, loaded, and give PyTorch's mel, streamed and whole."""
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here to run a TensorRT engine on")
    try:
        find_library(gpu_of(torch.device("cuda")))
    except BackendUnavailableError as error:
        pytest.skip(error.message)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    standin = request.getfixturevalue("standin_v2" if layout == "cosyvoice2" else "standin_v3")
    model = load_model(standin, "cuda", dtype)
    expected = [mel_of(model, stream=stream) for stream in (True, False)]
    use_tensorrt(model, Settings(flow_backend="tensorrt", trt_concurrent=2))
    assert len(list(tmp_path.rglob("*.plan"))) == 2
    before = out_of_profile()
    for stream, want in zip((True, False), expected, strict=True):
        got = mel_of(model, stream=stream)
        assert float((got - want).norm() / want.norm()) < 0.02
    assert out_of_profile() == before


@torch.inference_mode()
def mel_of(model: CosyVoiceModel, *, stream: bool) -> torch.Tensor:
    """The mel of 200 tokens, in chunks of 50 or at once, float32 on the CPU."""
    flow, like = model.flow, model.flow.spk_embed_affine_layer.weight
    spks = flow.project_speaker(random_prompt(1).embedding[None].to(like))
    tokens = torch.tensor([random_tokens(200)], device=like.device)
    state = init_state(flow, 1, like.device, like.dtype) if stream else None
    chunk, mels = 50 if stream else 200, []
    for start in range(0, 200, chunk):
        last = start + chunk == 200
        fed = tokens[:, start : start + chunk + (0 if last else flow.pre_lookahead_len)]
        cond = like.new_zeros(1, 80, 2 * chunk)
        mels.append(flow.forward_chunk(fed, cond, spks, state, streaming=stream, finalize=last))
    return torch.cat(mels, dim=2).float().cpu()
