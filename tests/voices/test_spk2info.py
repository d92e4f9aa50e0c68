from __future__ import annotations

import io
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch

from cosy_engine.errors import ModelDirectoryError, UnsafeModelError
from cosy_engine.voices import Voice
from cosy_engine.voices.spk2info import builtin_voices, read_spk2info, write_spk2info
from tests.voices.helpers import make_prompt, same_prompt

MODEL = "fingerprint-of-a-model"

PUBLIC_KEYS = {
    "prompt_text",
    "prompt_text_len",
    "llm_prompt_speech_token",
    "llm_prompt_speech_token_len",
    "flow_prompt_speech_token",
    "flow_prompt_speech_token_len",
    "prompt_speech_feat",
    "prompt_speech_feat_len",
    "llm_embedding",
    "flow_embedding",
}


def public_entry(prompt) -> dict:
    def length(tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor([tensor.shape[1]], dtype=torch.int32)

    text, codes, mel = prompt.text_token[None], prompt.speech_token[None], prompt.speech_feat[None]
    return {
        "prompt_text": text,
        "prompt_text_len": length(text),
        "llm_prompt_speech_token": codes,
        "llm_prompt_speech_token_len": length(codes),
        "flow_prompt_speech_token": codes,
        "flow_prompt_speech_token_len": length(codes),
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": length(mel),
        "llm_embedding": prompt.embedding[None],
        "flow_embedding": prompt.embedding[None],
    }


def async_entry(prompt, name: str, speaker: str) -> dict:
    return {
        "name": name,
        "spk_id": speaker,
        "prompt_text": prompt.text,
        "prompt_text_token": prompt.text_token[None],
        "speech_feat": prompt.speech_feat[None],
        "speech_token": prompt.speech_token[None],
        "embedding": prompt.embedding[None],
    }


def as_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_the_public_form() -> None:
    prompt = make_prompt(text="")
    voices = read_spk2info(as_bytes({"中文女": public_entry(prompt), "my_spk": public_entry(make_prompt(4))}), MODEL)
    assert list(voices) == ["中文女", "my_spk"]
    voice = voices["中文女"]
    assert (voice.name, voice.kind, voice.fingerprint) == ("中文女", "builtin", MODEL)
    assert same_prompt(voice.prompt, prompt), "the token ids are kept although the text is not recorded"
    assert voices["my_spk"].id == "my_spk"


def test_async_cosyvoices_form() -> None:
    prompt = make_prompt()
    [(speaker, voice)] = read_spk2info(as_bytes({"001": async_entry(prompt, "系统默认", "001")}), MODEL).items()
    assert (speaker, voice.id, voice.name) == ("001", "001", "系统默认")
    assert same_prompt(voice.prompt, prompt)


def test_a_speaker_that_is_an_embedding_alone() -> None:
    embedding = torch.randn(1, 192)
    [voice] = read_spk2info(as_bytes({"中文男": {"embedding": embedding}}), MODEL).values()
    assert torch.equal(voice.prompt.embedding, embedding[0])
    assert len(voice.prompt.text_token) == len(voice.prompt.speech_token) == len(voice.prompt.speech_feat) == 0


def test_mel_and_tokens_that_disagree_are_cut_to_agree() -> None:
    entry = public_entry(make_prompt(12))
    entry["prompt_speech_feat"] = torch.zeros(1, 21, 80)
    [voice] = read_spk2info(as_bytes({"a": entry}), MODEL).values()
    assert (len(voice.prompt.speech_token), len(voice.prompt.speech_feat)) == (10, 20)


def test_one_bad_speaker_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    good = public_entry(make_prompt())
    content = {
        "good": good,
        "no dict": 7,
        "no tensor": good | {"flow_prompt_speech_token": "x"},
        "other size": good | {"flow_embedding": torch.ones(1, 512)},
        "not finite": good | {"flow_embedding": torch.full((1, 192), float("nan"))},
        "a few bytes that expand": good
        | {
            "flow_prompt_speech_token": torch.zeros(1, 1, dtype=torch.int32).expand(1, 10**9),
            "prompt_speech_feat": torch.zeros(1, 1, 1).expand(1, 2 * 10**9, 80),
        },
        "no code": good | {"flow_prompt_speech_token": torch.full((1, 12), 9999)},
    }
    with caplog.at_level(logging.WARNING):
        assert list(read_spk2info(as_bytes(content), MODEL)) == ["good"]
    assert all(f"'{name}'" in caplog.text for name in set(content) - {"good"})


def test_speakers_whose_names_give_the_same_id() -> None:
    content = {name: {"embedding": torch.ones(1, 192)} for name in ("Anna", "anna!", "../anna")}
    voices = read_spk2info(as_bytes(content), MODEL)
    assert len({voice.id for voice in voices.values()}) == 3


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_the_file_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    for data in (as_bytes({"a": Intruder(trace)}), pickle.dumps({"a": Intruder(trace)})):
        with pytest.raises(UnsafeModelError):
            read_spk2info(data, MODEL)
    assert not trace.exists()


@pytest.mark.parametrize("data", [b"", b"junk" * 100, as_bytes([1, 2]), as_bytes({"a": 1})[:200]])
def test_files_that_are_something_else(data: bytes) -> None:
    with pytest.raises(ModelDirectoryError):
        read_spk2info(data, MODEL)


def test_what_is_written_is_the_public_form(tmp_path: Path) -> None:
    prompt = make_prompt()
    embedding_alone = read_spk2info(as_bytes({"sft": {"embedding": torch.ones(1, 192)}}), MODEL)["sft"]
    voices = {"我的声音": Voice("x", "我的声音", "saved", prompt, MODEL, ""), "sft": embedding_alone}
    path = tmp_path / "spk2info.pt"
    write_spk2info(path, voices)
    written = torch.load(path, weights_only=True)
    assert written["我的声音"].pop("transcript") == prompt.text
    assert set(written["我的声音"]) == PUBLIC_KEYS
    expected = public_entry(prompt)
    for key, value in written["我的声音"].items():
        assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype, key
    assert set(written["sft"]) == {"embedding"} and written["sft"]["embedding"].shape == (1, 192)
    assert [entry.name for entry in tmp_path.iterdir()] == ["spk2info.pt"]
    again = read_spk2info(path, MODEL)
    assert torch.equal(again["我的声音"].prompt.speech_token, prompt.speech_token)
    assert again["我的声音"].prompt.text == prompt.text


def test_display_names_survive_a_rewrite(tmp_path: Path) -> None:
    path = tmp_path / "spk2info.pt"
    write_spk2info(path, read_spk2info(as_bytes({"001": async_entry(make_prompt(), "系统默认", "001")}), MODEL))
    assert [voice.name for voice in read_spk2info(path, MODEL).values()] == ["系统默认"]


def test_a_directory_without_saved_voices(tmp_path: Path) -> None:
    assert builtin_voices(tmp_path, MODEL) == {}


def test_a_real_file(published_dir: Path) -> None:
    path = published_dir / "spk2info.async_cosyvoice.pt"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {published_dir}")
    voices = read_spk2info(path, MODEL)
    assert list(voices) == ["001", "longxiaoxia", "xiaohe"]
    assert [voice.name for voice in voices.values()] == ["系统默认", "龙小夏", "湾湾小何"]
    assert voices["xiaohe"].prompt.text == "今天天气真是太好了，阳光灿烂心情超级棒"
    assert [len(voice.prompt.speech_token) for voice in voices.values()] == [87, 89, 94]
    assert all(torch.isfinite(voice.prompt.speech_feat).all() for voice in voices.values())
