from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from cosy_engine.checkpoint.fingerprint import fingerprint_of
from cosy_engine.cli import app
from cosy_engine.config import Settings
from cosy_engine.engine import Engine
from tests.recordings import encoded, hum

TEXT = "Hello there."
SPOKEN = "what the recording says"


@pytest.fixture(scope="module")
def engine(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    voices = tmp_path_factory.mktemp("voices")
    engine = Engine.load(standin_v2, Settings(voices_dir=voices, device="cpu", warm_up=False))
    yield engine
    engine.close()


@pytest.fixture
def cli(engine: Engine, standin_v2: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, with an engine that stays loaded."""
    monkeypatch.setattr(Engine, "load", lambda *_: engine)
    monkeypatch.setattr(engine, "close", lambda: None)
    monkeypatch.setenv("COSY_MODEL_DIR", str(standin_v2))
    monkeypatch.setenv("COSY_VOICES_DIR", str(engine.settings.voices_dir))
    monkeypatch.delenv("COSY_DEBUG", raising=False)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prompt_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recordings") / "prompt.wav"
    path.write_bytes(encoded(hum(2.0)))
    return path


def refused(result: Result, code: int, *words: str) -> None:
    """The command ended with `code`, nothing on stdout and one message without a traceback on stderr."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    messages = result.stderr.strip().splitlines()
    assert len(messages) == 1 and messages[0].startswith("Error: "), result.stderr
    assert "Traceback" not in result.stderr and "defect" not in result.stderr
    for word in words:
        assert word in messages[0]


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "cosy_engine", *(str(argument) for argument in arguments)],
        capture_output=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COSY_DEVICE": "cpu"} | environment,
        timeout=240,
    )


def test_a_session_as_a_user_has_it(standin_v3: Path, prompt_wav: Path, tmp_path: Path) -> None:
    environment = {"COSY_MODEL_DIR": str(standin_v3), "COSY_VOICES_DIR": str(tmp_path / "voices")}
    enrolled = process("enroll", "小明 <b>", "--wav", prompt_wav, "--text", SPOKEN, **environment)
    assert enrolled.returncode == 0, enrolled.stderr
    voice = enrolled.stdout.decode().strip()
    listed = process("voices", "--json", **environment)
    assert json.loads(listed.stdout) == [{"id": voice, "name": "小明 <b>", "kind": "saved"}]
    out = tmp_path / "o.wav"
    text = "Hello there, this is long enough for chunks."
    said = process("say", text, "--voice", voice, "--stream", "--seed", 7, "--out", out, "--json", **environment)
    assert said.returncode == 0, said.stderr
    [line] = said.stdout.decode().splitlines()
    report = json.loads(line)
    assert set(report) == {"audio_seconds", "ttfa", "rtf", "chunks", "seed"}
    samples, rate = soundfile.read(out)
    assert rate == 24000 and report["audio_seconds"] == pytest.approx(len(samples) / rate, abs=1e-3)
    assert report["chunks"] > 1 and report["seed"] == 7 and report["ttfa"] > 0 and report["rtf"] > 0
    removed = process("rm", voice, **environment)
    assert (removed.returncode, removed.stdout) == (0, b"")
    assert [path.name for path in (tmp_path / "voices").iterdir()] == [".lock"]


@pytest.mark.parametrize("mode", ["zero_shot", "cross_lingual", "instruct", "vc"])
def test_every_mode(cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "o.wav"
    extra = {
        "zero_shot": [TEXT, "--prompt-text", SPOKEN],
        "cross_lingual": [TEXT],
        "instruct": [TEXT, "--instruct", "speak slowly"],
        "vc": ["--source-wav", prompt_wav],
    }[mode]
    result = cli("say", "--mode", mode, "--prompt-wav", prompt_wav, "--out", out, "--json", *extra)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["audio_seconds"] == pytest.approx(soundfile.info(out).duration, abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["o.wav"]
    if mode == "vc":
        assert report["audio_seconds"] == pytest.approx(2.0, abs=0.1)


def say(cli: Callable[..., Result], out: Path, prompt: Path, text: str = TEXT, *more: object) -> Result:
    return cli("say", text, "--prompt-wav", prompt, "--prompt-text", SPOKEN, "--out", out, "--seed", 3, *more)


def test_the_same_seed_gives_the_same_file(cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{number}.wav" for number in range(3)]
    for out, seed in zip(outs, (5, 5, 6), strict=True):
        assert say(cli, out, prompt_wav, TEXT, "--seed", seed).exit_code == 0
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()


def test_speed(cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path) -> None:
    lengths = []
    for speed in (1.0, 2.0):
        assert say(cli, tmp_path / "o.wav", prompt_wav, TEXT, "--speed", speed).exit_code == 0
        lengths.append(soundfile.info(tmp_path / "o.wav").duration)
    assert lengths[1] == pytest.approx(lengths[0] / 2, rel=0.05)


def test_stdout_as_the_file(prompt_wav: Path, standin_v2: Path, cli: Callable[..., Result]) -> None:
    result = cli("say", TEXT, "--mode", "cross_lingual", "--prompt-wav", prompt_wav, "--out", "-")
    assert result.exit_code == 0
    assert soundfile.info(io.BytesIO(result.stdout_bytes)).samplerate == 24000
    refused(cli("say", TEXT, "--prompt-wav", prompt_wav, "--out", "-", "--json"), 2, "--json")


GOOD_RECORDINGS = {
    "8 kHz": ("a.wav", lambda: encoded(hum(2.0, 8000), 8000)),
    "5 channels": ("a.wav", lambda: encoded(hum(2.0, 24000, channels=5), 24000)),
    "misnamed flac": ("a.mp3", lambda: encoded(hum(2.0), kind="FLAC")),
    "mp3": ("a.mp3", lambda: encoded(hum(2.0, 44100), 44100, "MP3")),
    "a name that looks like nothing": ("--help <b> 录音", lambda: encoded(hum(2.0))),
}


@pytest.mark.parametrize("case", GOOD_RECORDINGS)
def test_recordings_of_all_kinds(cli: Callable[..., Result], tmp_path: Path, case: str) -> None:
    name, make = GOOD_RECORDINGS[case]
    (tmp_path / name).write_bytes(make())
    result = say(cli, tmp_path / "o.wav", tmp_path / name)
    assert result.exit_code == 0, result.output
    assert soundfile.info(tmp_path / "o.wav").duration > 0.1


BAD_RECORDINGS = {
    "corrupt": (lambda: encoded(hum(2.0), kind="FLAC")[:40] + os.urandom(20_000), ""),
    "empty": (lambda: b"", "empty"),
    "no recording": (lambda: b"this is a text file\n" * 100, "not a recording"),
    "0.3 s": (lambda: encoded(hum(0.3)), "0.3"),
    "45 s": (lambda: encoded(hum(45.0)), "45"),
    "silent": (lambda: encoded(np.zeros(32000, np.float32)), "silent"),
}


@pytest.mark.parametrize("case", BAD_RECORDINGS)
def test_recordings_that_cannot_be_used(cli: Callable[..., Result], tmp_path: Path, case: str) -> None:
    make, word = BAD_RECORDINGS[case]
    (tmp_path / "a.wav").write_bytes(make())
    refused(say(cli, tmp_path / "o.wav", tmp_path / "a.wav"), 2, word)
    refused(cli("enroll", "Anna", "--wav", tmp_path / "a.wav", "--text", SPOKEN), 2, word)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert json.loads(cli("voices", "--json").stdout) == []


GOOD_TEXTS = [
    "你好 world，这是 mixed 文本 123。",
    "Hello 😀 there",
    "Con\x00trol \x1b[31mcharacters\x07\u202e",
    "<b>&amp;</b> x",
]


@pytest.mark.parametrize("text", GOOD_TEXTS, ids=ascii)
def test_texts_of_all_kinds(cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path, text: str) -> None:
    result = say(cli, tmp_path / "o.wav", prompt_wav, text)
    assert result.exit_code == 0, result.output
    assert soundfile.info(tmp_path / "o.wav").duration > 0.1


BAD_TEXTS = {"empty": "", "blank": " \n\t", "punctuation": "。，!?...", "emoji": "😀😀", "20,000": "好" * 20_000}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_texts_that_cannot_be_spoken(cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path, case: str) -> None:
    refused(say(cli, tmp_path / "o.wav", prompt_wav, BAD_TEXTS[case]), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--voice", "nobody"], "nobody"),
        (["--voice", "../../etc/passwd"], "passwd"),
        (["--voice", "x" * 10_000], "xxx"),
        ([], "--voice"),
        (["--voice", "a", "--prompt-wav", "b.wav"], "not both"),
        (["--prompt-wav", "/no/such/file.wav"], "No such file"),
        (["--prompt-wav", "/"], "directory"),
        (["--prompt-wav", "a\0b"], "null"),
        (["--prompt-wav", "PROMPT"], "prompt text"),
        (["--prompt-wav", "PROMPT", "--prompt-text", "x" * 20_000], "20,000"),
        (["--prompt-wav", "PROMPT", "--prompt-text", "x", "--speed", "9"], "speed"),
        (["--prompt-wav", "PROMPT", "--prompt-text", "x", "--speed", "nan"], "speed"),
        (["--prompt-wav", "PROMPT", "--prompt-text", "x", "--seed", "-1"], "seed"),
        (["--prompt-wav", "PROMPT", "--mode", "instruct"], "spoken"),
        (["--prompt-wav", "PROMPT", "--mode", "vc"], "recording"),
        (["--prompt-wav", "PROMPT", "--mode", "vc", "--source-wav", "/no/such.wav"], "--source-wav"),
        (["--voice", "nobody", "--out", "/no/such/folder/o.wav"], "folder"),
        (["--voice", "nobody", "--out", "/tmp"], "folder"),
        (["--voice", "nobody", "--out", ""], "folder"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_other_wrong_input(
    cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    arguments = [str(prompt_wav) if argument == "PROMPT" else argument for argument in arguments]
    refused(cli("say", TEXT, "--out", tmp_path / "o.wav", *arguments), 2, word)


def test_after_wrong_input_the_engine_serves_on(cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path) -> None:
    before, after, silent = tmp_path / "before.wav", tmp_path / "after.wav", tmp_path / "silent.wav"
    silent.write_bytes(encoded(np.zeros(32000, np.float32)))
    assert say(cli, before, prompt_wav).exit_code == 0
    for _ in range(10):  # more than may wait or work at a time
        assert say(cli, after, silent).exit_code == 2
        assert say(cli, after, prompt_wav, "").exit_code == 2
        assert cli("say", TEXT, "--voice", "nobody", "--out", after).exit_code == 2
    assert say(cli, after, prompt_wav).exit_code == 0
    assert before.read_bytes() == after.read_bytes()


def test_an_old_file_stays_until_the_new_one_is_complete(
    cli: Callable[..., Result], prompt_wav: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.wav"
    out.write_bytes(b"old")
    assert say(cli, out, prompt_wav, "").exit_code == 2
    assert out.read_bytes() == b"old"


def test_voices(cli: Callable[..., Result], engine: Engine, prompt_wav: Path) -> None:
    assert "No voices" in cli("voices").stderr
    enrolled = cli("enroll", "[red]Anna", "--wav", prompt_wav, "--text", SPOKEN, "--json")
    assert json.loads(enrolled.stdout) == {"id": "red-anna", "name": "[red]Anna", "kind": "saved"}
    refused(cli("enroll", "[red]Anna", "--wav", prompt_wav), 2, "[red]Anna")
    assert cli("enroll", "[red]Anna", "--wav", prompt_wav, "--text", "else", "--replace").exit_code == 0
    table = cli("voices").stdout
    assert "[red]Anna" in table and "red-anna" in table
    refused(cli("enroll", "\0", "--wav", prompt_wav), 2, "name")
    refused(cli("rm", "nobody"), 2, "nobody")
    refused(cli("rm", ".."), 2)
    assert cli("rm", "red-anna").exit_code == 0
    assert json.loads(cli("voices", "--json").stdout) == []


def test_voices_tell_what_cannot_be_used(
    cli: Callable[..., Result], prompt_wav: Path, standin_v3: Path, tmp_path: Path
) -> None:
    cli("enroll", "Anna", "--wav", prompt_wav, "--text", SPOKEN)
    [listed] = json.loads(cli("voices", "--json", "--model-dir", standin_v3).stdout)
    assert (listed["id"], listed["kind"]) == ("anna", "saved") and "another model" in listed["problem"]
    assert json.loads(cli("voices", "--json").stdout) == [{"id": "anna", "name": "Anna", "kind": "saved"}]
    elsewhere = cli("voices", "--json", "--model-dir", "some/id-not-downloaded")
    assert json.loads(elsewhere.stdout)[0]["id"] == "anna"
    refused(cli("voices", "--model-dir", tmp_path), 1, "cosyvoice2.yaml")
    assert cli("rm", "anna").exit_code == 0


def test_the_models_own_voices_are_listed(cli: Callable[..., Result], standin_v2: Path, tmp_path: Path) -> None:
    for path in standin_v2.iterdir():
        (tmp_path / path.name).symlink_to(path)
    torch.save({"中文女": {"embedding": torch.ones(1, 192)}}, tmp_path / "spk2info.pt")
    [own] = json.loads(cli("voices", "--json", "--model-dir", tmp_path).stdout)
    assert (own["name"], own["kind"]) == ("中文女", "builtin")
    refused(cli("rm", own["id"], "--model-dir", tmp_path), 2, "model")


def test_the_fingerprint_is_known_without_loading_the_model(engine: Engine, standin_v2: Path, standin_v3: Path) -> None:
    assert fingerprint_of(standin_v2) == engine.model.fingerprint != fingerprint_of(standin_v3)


def test_bench(cli: Callable[..., Result], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Hi.\n\n你好。\n", encoding="utf-8")
    result = cli("bench", "--concurrency", "1,2", "--text-file", texts, "--json")
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    report = json.loads(line)
    assert [row["concurrency"] for row in report["results"]] == [1, 2]
    for row, requests in zip(report["results"], (2, 4), strict=True):
        assert (row["requests"], row["errors"]) == (requests, 0)
        assert 0 < row["ttfa_p50"] <= row["ttfa_p95"] <= row["wall_seconds"]
        assert row["audio_per_second"] == pytest.approx(row["audio_seconds"] / row["wall_seconds"], rel=0.01)


def test_bench_of_a_model_that_makes_no_sound(
    cli: Callable[..., Result], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> AsyncIterator[int]:
        return
        yield

    monkeypatch.setattr(engine._speech_lm, "generate", nothing)
    (tmp_path / "texts.txt").write_text("Hi.")
    result = cli("bench", "--text-file", tmp_path / "texts.txt", "--json")
    assert result.exit_code == 1 and not result.stdout
    assert "no sound" in result.stderr


@pytest.mark.parametrize(
    ("content", "concurrency", "word"),
    [
        ("Hi.", "0", "concurrency"),
        ("Hi.", "1,x", "concurrency"),
        ("\n \n", "1", "no text"),
        (None, "1", "No such file"),
    ],
)
def test_bench_refuses(
    cli: Callable[..., Result], tmp_path: Path, content: str | None, concurrency: str, word: str
) -> None:
    texts = tmp_path / "texts.txt"
    if content is not None:
        texts.write_text(content)
    refused(cli("bench", "--concurrency", concurrency, "--text-file", texts), 2, word)


def test_doctor(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {finding["name"]: finding for finding in json.loads(cli("doctor", "--json").stdout)}
    assert findings["python"]["ok"] and findings["torch"]["ok"] and findings["model"]["ok"]
    assert findings["cuda"]["ok"] == torch.cuda.is_available()
    assert all(finding["detail"] for finding in findings.values())
    told = cli("doctor", "--model-dir", tmp_path)
    assert told.exit_code == 0 and "lacks llm, flow, hift" in told.stdout
    monkeypatch.setattr("cosy_engine.doctor.NEEDED_PACKAGES", ("no-such-package",))
    told = cli("doctor")
    assert told.exit_code == 1 and "MISSING  no-such-package" in told.stdout


def test_a_defect_is_told_without_a_traceback(
    cli: Callable[..., Result], engine: Engine, prompt_wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(engine, "synthesize", broken)
    result = say(cli, tmp_path / "o.wav", prompt_wav)
    assert result.exit_code == 1 and "oh" in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setenv("COSY_DEBUG", "1")
    result = say(cli, tmp_path / "o.wav", prompt_wav)
    assert result.exit_code == 1 and "Traceback" in result.stderr


def test_wrong_options(cli: Callable[..., Result]) -> None:
    for arguments in (
        ["say", TEXT],
        ["say", TEXT, "--out", "o.wav", "--mode", "song"],
        ["sing"],
        ["say", "--nonsense"],
    ):
        result = cli(*arguments)
        assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert cli("say", "--help").exit_code == 0
