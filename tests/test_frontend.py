"""From text and recordings to the inputs of the models, on the stand-in checkpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cosy_engine.audio.decode import Recording
from cosy_engine.checkpoint.load import load_model
from cosy_engine.errors import InvalidAudioError, InvalidRequestError
from cosy_engine.frontend import MAX_TEXT, Frontend, ModelInputs, Prompt, estimate_seconds
from cosy_engine.text.special_tokens import END_OF_PROMPT
from cosy_engine.text.tokenizer import TextTokenizer
from cosy_engine.voices.voice import Voice
from tests.recordings import encoded, hum

Encode = Callable[[str], list[int]]

PREFIX = "You are a helpful assistant.<|endofprompt|>"


@pytest.fixture(scope="module")
def version2(standin_v2: Path) -> Frontend:
    return Frontend(load_model(standin_v2))


@pytest.fixture(scope="module")
def version3(standin_v3: Path) -> Frontend:
    return Frontend(load_model(standin_v3))


@pytest.fixture(scope="module")
def prompt(version2: Frontend) -> Prompt:
    return version2.make_prompt(encoded(hum(3)), "希望你以后能够做的比我还好呦。")


@pytest.fixture(scope="module")
def encode2(standin_v2: Path) -> Encode:
    return TextTokenizer(standin_v2 / "CosyVoice-BlankEN", "cosyvoice2").encode


@pytest.fixture(scope="module")
def encode3(standin_v3: Path) -> Encode:
    return TextTokenizer(standin_v3 / "CosyVoice-BlankEN", "cosyvoice3").encode


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [1.0, 2.345])
def test_tokens_and_frames_of_a_prompt_agree(version2: Frontend, rate: int, seconds: float) -> None:
    prompt = version2.make_prompt(Recording(hum(seconds, rate), rate), "Hello.")
    assert prompt.speech_token.dtype == prompt.text_token.dtype == torch.int32
    assert prompt.speech_feat.shape == (2 * len(prompt.speech_token), 80)
    assert len(prompt.speech_token) == pytest.approx(25 * (seconds + 0.2), abs=1)
    assert prompt.embedding.shape == (192,)
    for tensor in (prompt.text_token, prompt.speech_token, prompt.speech_feat, prompt.embedding):
        assert tensor.device.type == "cpu" and torch.isfinite(tensor.float()).all()


def test_path_bytes_and_recording_make_the_same_prompt(version2: Frontend, tmp_path: Path) -> None:
    data = encoded(hum(2), kind="FLAC")
    (tmp_path / "a.flac").write_bytes(data)
    for source in (tmp_path / "a.flac", str(tmp_path / "a.flac")):
        assert torch.equal(version2.make_prompt(source).speech_feat, version2.make_prompt(data).speech_feat)


def test_the_prompt_text_is_normalised_and_not_split(version2: Frontend, encode2: Encode) -> None:
    prompt = version2.make_prompt(encoded(hum(2)), " It costs $5. " * 20)
    assert prompt.text.count("five dollars") == 20
    assert prompt.text_token.tolist() == encode2(prompt.text)
    assert version2.make_prompt(encoded(hum(2)), " ... ").text == ""


def test_bad_prompts_are_refused(version2: Frontend) -> None:
    with pytest.raises(InvalidAudioError, match=r"0\.30 s"):
        version2.make_prompt(encoded(hum(0.3)))
    with pytest.raises(InvalidAudioError, match=r"45\.00 s"):
        version2.make_prompt(encoded(hum(45)))
    with pytest.raises(InvalidRequestError) as caught:
        version2.make_prompt(encoded(hum(2)), "word " * 1000)
    assert caught.value.param == "prompt_text"


def test_speech_tokens_of_any_length(version2: Frontend) -> None:
    assert len(version2.speech_tokens(encoded(hum(0.5)))) == pytest.approx(12, abs=1)
    assert len(version2.speech_tokens(Recording(hum(70, 8_000), 8_000))) == pytest.approx(1750, abs=3)
    with pytest.raises(InvalidAudioError, match="0.05 s") as caught:
        version2.speech_tokens(Recording(hum(0.05), 16_000))
    assert caught.value.param == "source"


@pytest.mark.parametrize("text", ["", "  \n", "，。！？", "...", "😀🎉", "\x00\u200b", "<|endofprompt|>"])
def test_text_without_words_is_refused(version2: Frontend, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="give some words") as caught:
        version2.split(text)
    assert caught.value.param == "text"


def test_too_much_text_is_refused_with_its_length(version2: Frontend) -> None:
    assert version2.split("好" * 10_000)
    with pytest.raises(InvalidRequestError, match="20,000 characters") as caught:
        version2.split("好" * 20_000)
    assert caught.value.param == "text"


def test_split_gives_speakable_pieces_in_order(version2: Frontend) -> None:
    pieces = version2.split("我用 Python 写了3个程序😀。" * 20)
    assert "".join(pieces) == "我用Python写了三个程序。" * 20
    assert len(pieces) > 1


def test_without_the_text_front_end_the_text_is_spoken_as_it_is(version2: Frontend) -> None:
    text = "It costs $5. " * 10
    assert version2.split(text + "😀", text_frontend=False) == [text.strip()]
    assert len(version2.split("好" * 1000, text_frontend=False)) > 1
    with pytest.raises(InvalidRequestError):
        version2.split("...", text_frontend=False)


def test_zero_shot_continues_the_prompt(version2: Frontend, prompt: Prompt, encode2: Encode) -> None:
    assert version2.inputs("zero_shot", "你好。", prompt) == ModelInputs(
        encode2("你好。"), prompt.text_token.tolist(), prompt.speech_token.tolist(), prompt
    )


def test_cross_lingual_and_vc_give_the_speech_lm_no_prompt(version2: Frontend, prompt: Prompt, encode2: Encode) -> None:
    assert version2.inputs("cross_lingual", "Hello.", prompt) == ModelInputs(encode2("Hello."), [], [], prompt)
    assert version2.inputs("vc", "", prompt) == ModelInputs([], [], [], prompt)


def test_an_instruction_takes_the_place_of_the_prompt_text(version2: Frontend, prompt: Prompt, encode2: Encode) -> None:
    inputs = version2.inputs("instruct", "你好。", prompt, " 用四川话说这句话 ")
    assert inputs == ModelInputs(encode2("你好。"), encode2("用四川话说这句话" + END_OF_PROMPT), [], prompt)
    assert version2.inputs("instruct", "你好。", prompt, "用四川话说这句话<|endofprompt|>") == inputs


@pytest.mark.parametrize("instruct", ["", " ", "!!", "x" * 1001])
def test_an_instruction_needs_words(version2: Frontend, prompt: Prompt, instruct: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        version2.inputs("instruct", "你好。", prompt, instruct)
    assert caught.value.param == "instruct"


def test_zero_shot_needs_the_words_of_the_recording(version2: Frontend, prompt: Prompt) -> None:
    unknown = replace(prompt, text="", text_token=prompt.text_token[:0])
    with pytest.raises(InvalidRequestError, match="cross_lingual") as caught:
        version2.inputs("zero_shot", "你好。", unknown)
    assert caught.value.param == "prompt_text"


def test_a_model_may_continue_its_own_voices_and_no_recordings(
    standin_v2: Path, prompt: Prompt, encode2: Encode
) -> None:
    frontend = Frontend(replace(load_model(standin_v2), continues_recordings=False))
    recorded = frontend.make_prompt(encoded(hum(3)), prompt.text)
    assert recorded.text == "" and torch.equal(recorded.speech_token, prompt.speech_token)
    assert frontend.inputs("zero_shot", "你好。", recorded) == ModelInputs(encode2("你好。"), [], [], recorded)
    assert frontend.inputs("zero_shot", "你好。", prompt).lm_prompt_speech == prompt.speech_token.tolist()

    builtin = Voice("one", "One", "builtin", prompt, "fingerprint", "")
    assert frontend.prompt_of(builtin) == prompt
    assert frontend.prompt_of(replace(builtin, kind="saved")).text == ""


def test_a_voice_without_a_recording_speaks_unprompted(version2: Frontend, prompt: Prompt, encode2: Encode) -> None:
    bare = Prompt("", prompt.text_token[:0], prompt.speech_token[:0], prompt.speech_feat[:0], prompt.embedding)
    assert version2.inputs("zero_shot", "你好。", bare) == ModelInputs(encode2("你好。"), [], [], bare)


def test_cosyvoice3_has_an_end_of_prompt_in_every_mode(version3: Frontend, prompt: Prompt, encode3: Encode) -> None:
    said = prompt.text_token.tolist()
    assert version3.inputs("zero_shot", "你好。", prompt).lm_prompt_text == encode3(PREFIX) + said
    assert version3.inputs("cross_lingual", "你好。", prompt).text_token == encode3(PREFIX + "你好。")
    instructed = version3.inputs("instruct", "你好。", prompt, "用广东话表达。")
    assert instructed.lm_prompt_text == encode3("You are a helpful assistant. 用广东话表达。<|endofprompt|>")
    assert instructed.text_token == encode3("你好。")


def test_cosyvoice3_adds_no_second_end_of_prompt(version3: Frontend, encode3: Encode) -> None:
    prompt = version3.make_prompt(encoded(hum(2)), PREFIX + "你好。")
    assert version3.inputs("zero_shot", "世界。", prompt).lm_prompt_text == encode3(PREFIX + "你好。")
    marked = "Speak slowly.<|endofprompt|>世界。"
    assert version3.inputs("cross_lingual", marked, prompt).text_token == encode3(marked)
    assert version3.inputs("instruct", "世界。", prompt, "慢<|endofprompt|>").lm_prompt_text == encode3(
        "慢<|endofprompt|>"
    )


async def arriving(frontend: Frontend, *parts: str) -> list[int]:
    async def source() -> AsyncIterator[str]:
        for part in parts:
            yield part

    return [token async for token in frontend.encode_arriving(source())]


async def test_text_in_parts_keeps_the_blanks_between_them(version2: Frontend, encode2: Encode) -> None:
    assert await arriving(version2, "Hello", "", " wor😀\x00ld ") == encode2("Hello") + encode2(" wor ld ")


@pytest.mark.parametrize("parts", [(), ("", ""), ("...", " !"), ("a" * MAX_TEXT, "b")], ids=len)
async def test_text_in_parts_that_cannot_be_spoken(version2: Frontend, parts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await arriving(version2, *parts)
    assert refused.value.param == "text"


def test_estimate_is_about_right() -> None:
    assert estimate_seconds("今天天气真好我们去公园吧") == pytest.approx(2.7, abs=0.5)
    assert estimate_seconds("The quick brown fox jumps over the lazy dog.") == pytest.approx(3, abs=0.5)


def test_the_public_recordings(version2: Frontend, golden_dir: Path) -> None:
    folder = golden_dir.parent / "audio"
    if not (folder / "zero_shot_prompt.wav").is_file():
        pytest.skip(f"no recordings in {folder}")
    short = version2.make_prompt(folder / "zero_shot_prompt.wav", "希望你以后能够做的比我还好呦。")
    long = version2.make_prompt(folder / "cross_lingual_prompt.wav")
    assert len(short.speech_token) / 25 == pytest.approx(3.1, abs=0.1)
    assert len(long.speech_token) / 25 == pytest.approx(13.7, abs=0.1)
    assert np.isfinite(long.speech_feat.numpy()).all()
