from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from cosy_engine.compat import AutoModel, CosyVoice2, CosyVoice3
from cosy_engine.config import Settings
from cosy_engine.errors import (
    BackendUnavailableError,
    EngineStoppedError,
    InvalidAudioError,
    InvalidRequestError,
    ModelDirectoryError,
    VoiceNotFoundError,
)
from tests.recordings import encoded, hum

TEXT = "Hello there."
LONGER = "Hello there, this is long enough for chunks."
LONG = "This sentence is long enough to stand on its own feet, whatever the splitter may think. " * 4
SPOKEN = "what the recording says"


def linked(directory: Path, to: Path) -> Path:
    """A model directory of its own, whose files are another's."""
    for path in directory.iterdir():
        (to / path.name).symlink_to(path)
    return to


def load(directory: Path, **options: object) -> AutoModel:
    settings = Settings(device="cpu", warm_up=False, voices_dir=directory / "voices", concurrency=1, max_queue=1)
    return AutoModel(model_dir=str(directory), settings=settings, **options)


@pytest.fixture(scope="module")
def model(standin_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AutoModel]:
    with load(linked(standin_v3, tmp_path_factory.mktemp("model"))) as model:
        yield model


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recordings") / "prompt.wav"
    path.write_bytes(encoded(hum(2.0)))
    return str(path)


def sound(results: Iterator[dict[str, Tensor]]) -> Tensor:
    """float32 [1, n] of a whole generator, after looking at each result."""
    parts = []
    for result in results:
        assert set(result) == {"tts_speech"}
        part = result["tts_speech"]
        assert part.dtype == torch.float32 and part.ndim == 2 and part.shape[0] == 1 and part.shape[1] > 0
        assert torch.isfinite(part).all()
        parts.append(part)
    return torch.cat(parts, dim=1)


def check_every_kind_of_inference(model: AutoModel, wav: str) -> None:
    assert model.sample_rate == 24000
    for stream in (False, True):
        assert sound(model.inference_zero_shot(TEXT, SPOKEN, wav, stream=stream)).shape[1] > 2400
        assert sound(model.inference_cross_lingual(TEXT, wav, stream=stream)).shape[1] > 2400
        assert sound(model.inference_instruct2(TEXT, "speak slowly", wav, stream=stream)).shape[1] > 2400
        converted = sound(model.inference_vc(wav, wav, stream=stream))
        assert converted.shape[1] / 24000 == pytest.approx(2.0, abs=0.1)


def test_every_kind_of_inference(model: AutoModel, wav: str) -> None:
    check_every_kind_of_inference(model, wav)


def test_speakers_are_added_saved_and_read_again(model: AutoModel, wav: str) -> None:
    assert "我的声音" not in model.list_available_spks()
    assert model.add_zero_shot_spk(SPOKEN, wav, "我的声音") is True
    assert "我的声音" in model.list_available_spks()
    torch.manual_seed(0)
    by_wav = sound(model.inference_zero_shot(TEXT, SPOKEN, wav))
    torch.manual_seed(0)
    by_speaker = sound(model.inference_zero_shot(TEXT, "", "", zero_shot_spk_id="我的声音"))
    assert torch.equal(by_wav, by_speaker)
    sound(model.inference_sft(TEXT, "我的声音"))
    sound(model.inference_cross_lingual(TEXT, "", zero_shot_spk_id="我的声音"))
    sound(model.inference_instruct2(TEXT, "slowly", "", zero_shot_spk_id="我的声音"))

    model.save_spkinfo()
    path = Path(model.model_dir) / "spk2info.pt"
    saved = torch.load(path, weights_only=True)["我的声音"]
    assert saved["flow_prompt_speech_token"].shape[0] == saved["llm_embedding"].shape[0] == 1
    with load(path.parent) as again:
        assert again.list_available_spks() == model.list_available_spks()
        torch.manual_seed(0)
        assert torch.equal(sound(again.inference_sft(TEXT, "我的声音")), by_wav)
    path.unlink()


def test_cosyvoice2_and_its_fine_tuned_speakers(standin_v2: Path, wav: str, tmp_path: Path) -> None:
    directory = linked(standin_v2, tmp_path)
    torch.save({"中文女": {"embedding": torch.ones(1, 192)}}, directory / "spk2info.pt")
    with load(directory) as model:
        check_every_kind_of_inference(model, wav)
        assert model.list_available_spks() == ["中文女"]
        assert sound(model.inference_sft(TEXT, "中文女")).shape[1] > 2400
        model.save_spkinfo()
    assert set(torch.load(directory / "spk2info.pt", weights_only=True)["中文女"]) == {"embedding"}


def test_torchs_seed_is_the_seed(model: AutoModel, wav: str) -> None:
    sounds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sounds.append(sound(model.inference_zero_shot(TEXT, SPOKEN, wav, stream=True)))
    assert torch.equal(sounds[0], sounds[1])
    assert not torch.equal(sounds[0], sounds[2])


def test_one_result_a_piece_of_text_or_a_chunk(model: AutoModel, wav: str) -> None:
    assert len(list(model.inference_zero_shot(TEXT, SPOKEN, wav))) == 1
    assert len(list(model.inference_zero_shot(LONGER, SPOKEN, wav, stream=True))) > 1
    pieces = len(model.engine.frontend.split(LONG))
    assert pieces > 1
    assert len(list(model.inference_zero_shot(LONG, SPOKEN, wav))) == pieces
    assert len(list(model.inference_zero_shot(LONGER, SPOKEN, wav, text_frontend=False))) == 1


def test_speed(model: AutoModel, wav: str) -> None:
    lengths = []
    for speed in (1.0, 2.0):
        torch.manual_seed(0)
        lengths.append(sound(model.inference_zero_shot(TEXT, SPOKEN, wav, speed=speed)).shape[1])
    assert lengths[1] == pytest.approx(lengths[0] / 2, rel=0.05)


def test_recordings_as_tensors(model: AutoModel, wav: str) -> None:
    samples = torch.from_numpy(soundfile.read(wav, dtype="float32")[0])
    sounds = []
    for recording in (wav, samples, samples[None]):
        torch.manual_seed(0)
        sounds.append(sound(model.inference_cross_lingual(TEXT, recording)))
    assert torch.equal(sounds[0], sounds[1]) and torch.equal(sounds[1], sounds[2])
    sound(model.inference_vc(samples, samples[None]))
    with pytest.raises(InvalidRequestError):
        list(model.inference_cross_lingual(TEXT, samples.repeat(2, 1)))


def test_text_that_arrives_bit_by_bit(model: AutoModel, wav: str) -> None:
    asked = []

    def words() -> Iterator[str]:
        for word in ("Hello ", "there, ", "this ", "comes ", "word ", "by ", "word."):
            asked.append(word)
            yield word

    assert sound(model.inference_zero_shot(words(), SPOKEN, wav, stream=True)).shape[1] > 2400
    assert len(asked) == 7


def idle(model: AutoModel) -> bool:
    """Whether the engine has let go of every request, within some seconds."""
    deadline = time.monotonic() + 20
    while model.engine.queue.active and time.monotonic() < deadline:
        time.sleep(0.01)
    return model.engine.queue.active == 0


def test_closing_a_generator_stops_the_work(model: AutoModel, wav: str) -> None:
    results = model.inference_zero_shot(LONG, SPOKEN, wav, stream=True)
    next(results)
    assert model.engine.queue.active == 1
    results.close()
    assert idle(model)
    for result in model.inference_zero_shot(LONG, SPOKEN, wav, stream=True):
        assert result["tts_speech"].shape[1] > 0
        break
    assert idle(model)
    sound(model.inference_zero_shot(TEXT, SPOKEN, wav))


def test_wrong_input_raises_and_harms_nothing(model: AutoModel, wav: str, tmp_path: Path) -> None:
    speakers = model.list_available_spks()
    (tmp_path / "short.wav").write_bytes(encoded(hum(0.3)))
    for error, attempt in [
        (InvalidAudioError, lambda: model.inference_zero_shot(TEXT, SPOKEN, str(tmp_path / "short.wav"))),
        (InvalidAudioError, lambda: model.inference_zero_shot(TEXT, SPOKEN, str(tmp_path / "none.wav"))),
        (InvalidAudioError, lambda: model.inference_vc(str(tmp_path / "none.wav"), wav)),
        (InvalidRequestError, lambda: model.inference_zero_shot("", SPOKEN, wav)),
        (InvalidRequestError, lambda: model.inference_zero_shot(TEXT, SPOKEN, wav, speed=7)),
        (InvalidRequestError, lambda: model.inference_instruct2(TEXT, "", wav)),
        (VoiceNotFoundError, lambda: model.inference_sft(TEXT, "nobody")),
        (VoiceNotFoundError, lambda: model.inference_zero_shot(TEXT, "", "", zero_shot_spk_id="nobody")),
        (InvalidRequestError, lambda: [model.add_zero_shot_spk(SPOKEN, wav, "")]),
    ]:
        with pytest.raises(error):
            list(attempt())
    assert model.list_available_spks() == speakers and idle(model)
    sound(model.inference_zero_shot(TEXT, SPOKEN, wav))


def test_a_closed_model_says_so(standin_v2: Path, wav: str, tmp_path: Path) -> None:
    model = CosyVoice2(standin_v2, settings=Settings(device="cpu", warm_up=False, voices_dir=tmp_path))
    results = model.inference_cross_lingual(LONG, wav, stream=True)
    next(results)
    closing = threading.Thread(target=model.close)
    closing.start()
    with pytest.raises(EngineStoppedError):
        list(results)
    closing.join(20)
    assert not closing.is_alive()
    model.close()
    with pytest.raises(EngineStoppedError):
        list(model.inference_cross_lingual(TEXT, wav))


STALLED = """
import sys, time
from cosy_engine.compat import AutoModel
from cosy_engine.config import Settings

def words():
    yield "Hello there, this is long enough for chunks. " * 3
    time.sleep(1000)

model = AutoModel(sys.argv[1], settings=Settings(device="cpu", warm_up=False, voices_dir=sys.argv[2]))
results = model.inference_cross_lingual(words(), sys.argv[3], stream=True)
print(next(results)["tts_speech"].shape[0])
"""

ABANDONED = """
import sys
from cosy_engine.compat import AutoModel
from cosy_engine.config import Settings

model = AutoModel(sys.argv[1], settings=Settings(device="cpu", warm_up=False, voices_dir=sys.argv[2]))
results = model.inference_cross_lingual("Hello there, this is long enough for chunks. " * 5, sys.argv[3], stream=True)
print(next(results)["tts_speech"].shape[0])
"""


@pytest.mark.parametrize("program", [ABANDONED, STALLED], ids=["abandoned", "stalled"])
def test_a_program_that_ends_in_the_middle_ends(standin_v2: Path, wav: str, tmp_path: Path, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(standin_v2), str(tmp_path), wav],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_backend_that_is_not_there(standin_v2: Path) -> None:
    with pytest.raises(BackendUnavailableError) as refusal:
        AutoModel(standin_v2, load_trt=True)
    assert refusal.value.param == "load_trt"


def test_load_jit_compiles_the_flow(standin_v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    settings = Settings(device="cpu", warm_up=False, voices_dir=tmp_path)
    with AutoModel(standin_v2, load_jit=True, settings=settings) as model:
        assert compiled == [model.engine.model.flow.decoder.estimator]


def test_what_the_arguments_leave_off_comes_from_the_settings(standin_v2: Path, tmp_path: Path) -> None:
    settings = Settings(device="cpu", warm_up=False, voices_dir=tmp_path, lm_backend="torch", fp16=True)
    with AutoModel(standin_v2, settings=settings) as model:
        assert model.engine.settings == settings


def test_load_jit_without_a_compiler_says_so(standin_v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TorchDynamoException("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr("cosy_engine.engine.Engine._warm_up", broken)
    threads = set(threading.enumerate())
    with pytest.raises(BackendUnavailableError, match="C\\+\\+ compiler found\\)") as refusal:
        AutoModel(standin_v2, load_jit=True, settings=Settings(device="cpu", voices_dir=tmp_path))
    assert refusal.value.param == "load_jit"
    assert {thread.name for thread in set(threading.enumerate()) - threads} <= {"tqdm_monitor"}


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    for model_class in (AutoModel, CosyVoice2, CosyVoice3):
        with pytest.raises(ModelDirectoryError):
            model_class(tmp_path)
