from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cosy_engine.errors import (
    CosyError,
    InvalidRequestError,
    VoiceExistsError,
    VoiceMismatchError,
    VoiceNotFoundError,
)
from cosy_engine.frontend import Prompt
from cosy_engine.voices import Voice, VoiceStore
from cosy_engine.voices.voice import MAX_FILE_BYTES, TENSORS, metadata
from tests.voices.helpers import make_prompt, same_prompt
from tests.voices.test_names import HOSTILE

MODEL = "fingerprint-of-a-model"


@pytest.fixture
def store(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "voices", MODEL)


def reopened(store: VoiceStore, fingerprint: str | None = MODEL) -> VoiceStore:
    return VoiceStore(store.folder, fingerprint)


def ids(store: VoiceStore) -> list[str]:
    return [info.id for info in store.list()]


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_a_saved_voice_comes_back_as_it_was(store: VoiceStore) -> None:
    prompt = make_prompt(text="<b>你好</b> & 'hello' 😀")
    saved = store.enroll("小明 <i>", prompt)
    loaded = reopened(store).get(saved.id)
    assert same_prompt(loaded.prompt, prompt)
    assert (loaded.name, loaded.kind, loaded.fingerprint, loaded.created) == ("小明 <i>", "saved", MODEL, saved.created)
    [info] = reopened(store).list()
    assert (info.id, info.name, info.kind, info.text, info.problem) == (
        saved.id,
        "小明 <i>",
        "saved",
        prompt.text,
        None,
    )


def test_an_empty_prompt_is_a_voice_too(store: VoiceStore) -> None:
    nothing = torch.zeros(0, dtype=torch.int32)
    prompt = Prompt("", nothing, nothing, torch.zeros(0, 80), torch.ones(192))
    assert same_prompt(store.get(store.enroll("sft", prompt).id).prompt, prompt)


def test_the_folder_holds_two_files_a_voice(store: VoiceStore) -> None:
    store.enroll("Anna", make_prompt())
    assert visible(store.folder) == {"anna.json", "anna.safetensors"}
    entry = json.loads((store.folder / "anna.json").read_text(encoding="utf-8"))
    assert {"id", "name", "kind", "text", "created", "fingerprint", "format"} <= set(entry)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_stay_inside_the_folder(store: VoiceStore, name: str) -> None:
    before = set(store.folder.parent.iterdir())
    voice = store.enroll(name, make_prompt(tokens=2))
    assert set(store.folder.parent.iterdir()) - before == {store.folder}
    assert visible(store.folder) == {f"{voice.id}.json", f"{voice.id}.safetensors"}
    assert store.get(voice.id).name == voice.name


@pytest.mark.parametrize("voice_id", [*HOSTILE, "", "x" * 10_000, "nobody", None], ids=lambda i: ascii(i)[:12])
def test_unknown_ids_are_not_found(store: VoiceStore, voice_id: str) -> None:
    (store.folder.parent / "absolute.json").write_text("{}")
    store.enroll("Anna", make_prompt(tokens=2))
    for action in (store.get, store.delete, lambda i: store.rename(i, "Bob"), store.export_voice):
        with pytest.raises(VoiceNotFoundError) as refusal:
            action(voice_id)
        assert len(refusal.value.message) < 200
    assert ids(store) == ["anna"]


def test_the_same_name_again(store: VoiceStore) -> None:
    first, second = make_prompt(seed=1), make_prompt(seed=2, text="另一句")
    store.enroll("Anna", first)
    with pytest.raises(VoiceExistsError):
        store.enroll("  Anna ", second)
    assert same_prompt(store.get("anna").prompt, first)
    assert store.enroll("Anna", second, replace=True).id == "anna"
    assert same_prompt(store.get("anna").prompt, second)
    assert [info.text for info in store.list()] == ["另一句"]


def test_distinct_names_get_distinct_ids(store: VoiceStore) -> None:
    names = ["Anna B", "anna-b", "ANNA.B", "Änna b"]
    voices = [store.enroll(name, make_prompt(tokens=2, seed=seed)) for seed, name in enumerate(names)]
    assert len({voice.id for voice in voices}) == len(names)
    assert {info.name for info in store.list()} == set(names)


def test_rename_keeps_the_id_and_the_prompt(store: VoiceStore) -> None:
    prompt = make_prompt()
    store.enroll("Anna", prompt)
    store.enroll("Bob", make_prompt(tokens=2))
    store.rename("anna", "安娜")
    assert (store.get("anna").name, same_prompt(store.get("anna").prompt, prompt)) == ("安娜", True)
    store.rename("anna", "安娜")
    with pytest.raises(VoiceExistsError):
        store.rename("anna", "Bob")
    with pytest.raises(InvalidRequestError):
        store.rename("anna", "\0")
    assert store.enroll("Anna", make_prompt(tokens=2)).id == "anna-2"


def test_delete_leaves_nothing(store: VoiceStore) -> None:
    store.enroll("Anna", make_prompt())
    store.delete("anna")
    assert visible(store.folder) == set()
    with pytest.raises(VoiceNotFoundError):
        store.get("anna")


def test_listing_a_folder_that_is_not_there(tmp_path: Path) -> None:
    store = VoiceStore(tmp_path / "none" / "yet", MODEL)
    assert store.list() == []
    with pytest.raises(VoiceNotFoundError):
        store.delete("anna")
    assert list(tmp_path.iterdir()) == []


def test_another_models_voice_is_listed_and_refused(store: VoiceStore) -> None:
    store.enroll("Anna", make_prompt())
    other = reopened(store, "another model")
    [info] = other.list()
    assert info.id == "anna" and "another model" in info.problem
    with pytest.raises(VoiceMismatchError, match="another model"):
        other.get("anna")
    other.rename("anna", "Still there")
    assert store.get("anna").name == "Still there"
    other.delete("anna")
    assert store.list() == []


def test_without_a_model_voices_can_be_listed_but_not_saved(store: VoiceStore) -> None:
    store.enroll("Anna", make_prompt())
    blind = reopened(store, None)
    assert [info.problem for info in blind.list()] == [None]
    with pytest.raises(InvalidRequestError):
        blind.enroll("Bob", make_prompt())


def test_the_models_own_voices(store: VoiceStore) -> None:
    own = Voice("anna", "安娜", "builtin", make_prompt(seed=5), MODEL, "")
    store = VoiceStore(store.folder, MODEL, {"anna": own})
    assert store.get("anna") is own
    assert [(info.id, info.name, info.kind) for info in store.list()] == [("anna", "安娜", "builtin")]
    assert store.enroll("Anna", make_prompt()).id == "anna-2"
    with pytest.raises(VoiceExistsError):
        store.enroll("安娜", make_prompt())
    for action in (store.delete, lambda i: store.rename(i, "Bob")):
        with pytest.raises(InvalidRequestError, match="with the model"):
            action("anna")


def corrupted(store: VoiceStore, how: str) -> None:
    tensors, entry = store.folder / "anna.safetensors", store.folder / "anna.json"
    data = tensors.read_bytes()
    match how:
        case "cut off":
            tensors.write_bytes(data[:-100])
        case "empty":
            tensors.write_bytes(b"")
        case "junk":
            tensors.write_bytes(random.Random(0).randbytes(5000))
        case "huge header length":
            tensors.write_bytes((2**62).to_bytes(8, "little") + data[8:])
        case "nan":
            tensors.write_bytes(data[:-4] + b"\xff\xff\xff\xff")
        case "entry junk":
            entry.write_bytes(b"\xff\xfe{")
        case "entry is a list":
            entry.write_text("[]")
        case "entry without name":
            entry.write_text("{}")
        case "entry's name is a number":
            entry.write_text('{"name": 7}')
        case "deeply nested entry":
            entry.write_text("[" * 100_000)


DAMAGES = [
    "cut off",
    "empty",
    "junk",
    "huge header length",
    "nan",
    "entry junk",
    "entry is a list",
    "entry without name",
    "entry's name is a number",
    "deeply nested entry",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_voice_harms_nobody_else(store: VoiceStore, how: str) -> None:
    store.enroll("Anna", make_prompt())
    store.enroll("Bob", make_prompt(seed=1))
    corrupted(store, how)
    listed = {info.id: info.problem for info in store.list()}
    assert set(listed) == {"anna", "bob"} and listed["bob"] is None
    assert how == "nan" or "damaged" in listed["anna"]
    with pytest.raises(VoiceNotFoundError, match="damaged"):
        store.get("anna")
    assert same_prompt(store.get("bob").prompt, make_prompt(seed=1))
    store.delete("anna")
    assert ids(store) == ["bob"]
    assert store.enroll("Anna", make_prompt()).id == "anna"


def test_half_a_pair_is_no_voice(store: VoiceStore) -> None:
    store.enroll("Anna", make_prompt())
    store.enroll("Bob", make_prompt())
    (store.folder / "anna.safetensors").unlink()
    (store.folder / "bob.json").unlink()
    (store.folder / "notes.txt").write_text("mine")
    assert store.list() == []
    for voice_id in ("anna", "bob"):
        with pytest.raises(VoiceNotFoundError):
            store.get(voice_id)
    assert store.enroll("Bob", make_prompt()).id == "bob-2", "a file that somebody put there is not overwritten"
    assert {"notes.txt", "bob.safetensors"} <= visible(store.folder)


def test_export_and_import(store: VoiceStore, tmp_path: Path) -> None:
    prompt = make_prompt()
    store.enroll("小明", prompt)
    store.rename(ids(store)[0], "大明")
    data = store.export_voice(ids(store)[0])
    elsewhere = VoiceStore(tmp_path / "elsewhere", MODEL)
    voice = elsewhere.import_voice(data)
    assert voice.name == "大明" and same_prompt(elsewhere.get(voice.id).prompt, prompt)
    assert elsewhere.import_voice(data, name="Copy").name == "Copy"
    with pytest.raises(VoiceExistsError):
        elsewhere.import_voice(data)
    with pytest.raises(VoiceMismatchError):
        VoiceStore(tmp_path / "elsewhere", "another").import_voice(data, name="Third")


def voice_bytes(tensors: dict[str, torch.Tensor | None] | None = None, about: dict[str, str] | None = None) -> bytes:
    """A voice file with some tensors replaced (None: left out) and some metadata replaced."""
    voice = Voice("x", "X", "saved", make_prompt(), MODEL, "now")
    content = {name: getattr(voice.prompt, name) for name in TENSORS} | (tensors or {})
    return save({name: value for name, value in content.items() if value is not None}, metadata(voice) | (about or {}))


REFUSED = {
    "empty": b"",
    "junk": b"\x08" * 5000,
    "a pickle": b"\x80\x04cos\nsystem\n.",
    "too large": bytes(MAX_FILE_BYTES + 1),
    "no metadata": save({"embedding": torch.ones(192)}),
    "trailing bytes": voice_bytes() + b"more",
    "other format": voice_bytes(about={"format": "cosy-voice-99"}),
    "no name": voice_bytes(about={"name": " "}),
    "long name": voice_bytes(about={"name": "x" * 1000}),
    "long text": voice_bytes(about={"text": "x" * 20_001}),
    "no embedding": voice_bytes({"embedding": None}),
    "embedding of another size": voice_bytes({"embedding": torch.ones(256)}),
    "embedding of integers": voice_bytes({"embedding": torch.ones(192, dtype=torch.int64)}),
    "infinite": voice_bytes({"embedding": torch.full((192,), float("inf"))}),
    "mel of another length": voice_bytes({"speech_feat": torch.zeros(23, 80)}),
    "mel of other bins": voice_bytes({"speech_feat": torch.zeros(24, 100)}),
    "float tokens": voice_bytes({"speech_token": torch.zeros(12)}),
    "token too large": voice_bytes({"speech_token": torch.full((12,), 6561, dtype=torch.int32)}),
    "token negative": voice_bytes({"text_token": torch.tensor([-1])}),
    "tokens of two dimensions": voice_bytes({"text_token": torch.ones(3, 3, dtype=torch.int32)}),
    "very long": voice_bytes(
        {"speech_token": torch.zeros(1500, dtype=torch.int32), "speech_feat": torch.zeros(3000, 80)}
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_imported_bytes_are_not_trusted(store: VoiceStore, case: str) -> None:
    with pytest.raises(InvalidRequestError):
        store.import_voice(REFUSED[case])
    assert store.list() == []


def test_imported_bytes_at_random(store: VoiceStore) -> None:
    data, chance = bytearray(voice_bytes()), random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[chance.randrange(800)] = chance.randrange(256)
        try:
            store.delete(store.import_voice(bytes(damaged)).id)
        except CosyError:
            pass


def test_the_prompt_is_checked_before_it_is_saved(store: VoiceStore) -> None:
    with pytest.raises(InvalidRequestError):
        store.enroll("Anna", replace(make_prompt(), embedding=torch.ones(100)))
    assert store.list() == []


def test_one_of_many_at_once_wins(store: VoiceStore) -> None:
    def enroll(seed: int) -> bool:
        try:
            reopened(store).enroll("Anna", make_prompt(seed=seed))
        except VoiceExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(enroll, range(16))) == 1
    assert ids(store) == ["anna"]


def test_readers_see_whole_voices_while_others_write(store: VoiceStore) -> None:
    prompts = [make_prompt(seed=seed, text=f"text {seed}") for seed in range(2)]
    store.enroll("Anna", prompts[0])
    stop = time.monotonic() + 2

    def write() -> None:
        writer = reopened(store)
        for number in range(10_000):
            if time.monotonic() > stop:
                return
            writer.enroll("Anna", prompts[number % 2], replace=True)
            if number % 3 == 0:
                writer.rename("anna", f"Anna {number}")
                writer.delete("anna")

    def read() -> int:
        reader, seen = reopened(store), 0
        while time.monotonic() < stop:
            assert all(info.problem is None for info in reader.list())
            try:
                voice = reader.get("anna")
            except VoiceNotFoundError as error:
                assert "damaged" not in error.message
                continue
            assert any(same_prompt(voice.prompt, prompt) for prompt in prompts)
            seen += 1
        return seen

    with ThreadPoolExecutor(3) as pool:
        writing, reading = pool.submit(write), [pool.submit(read) for _ in range(2)]
        writing.result()
        assert sum(reader.result() for reader in reading) > 0


KILL_AT_EVERY_STEP = """
import os, shutil, signal, sys, time
from pathlib import Path
from cosy_engine.voices import VoiceStore
from tests.voices.helpers import make_prompt

root, action, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
prompt = make_prompt(seed=9, text="new")

def work(folder, step, told):
    left = step

    def stopping(call):
        def stop_before(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.write(told, b"k")
                time.sleep(60)
            return call(*arguments, **options)
        return stop_before

    store = VoiceStore(folder, model)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, stopping(getattr(os, name)))
    if action == "delete":
        store.delete("anna")
    else:
        store.enroll("Anna", prompt, replace=action == "replace")

step, reached = 0, b"k"
while reached:
    step += 1
    folder = root / str(step)
    shutil.copytree(root / "0", folder)
    hear, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hear)
        work(folder, step, told)
        os._exit(0)
    os.close(told)
    reached = os.read(hear, 1)
    os.close(hear)
    if reached:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert reached or status == 0, status
"""


@pytest.mark.parametrize("action", ["enroll", "replace", "delete"])
def test_killed_at_every_step(tmp_path: Path, action: str) -> None:
    """A process is killed before each of its calls that sync, rename or remove a file, one folder a call."""
    old, new = make_prompt(seed=1, text="old"), make_prompt(seed=9, text="new")
    before, done = {"enroll": (None, new), "replace": (old, new), "delete": (old, None)}[action]
    (tmp_path / "0").mkdir()
    if before is not None:
        VoiceStore(tmp_path / "0", MODEL).enroll("Anna", before)
    subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path), action, MODEL],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    steps = sorted(int(path.name) for path in tmp_path.iterdir())
    assert len(steps) > 4
    for step in steps[1:]:
        store = VoiceStore(tmp_path / str(step), MODEL)
        listed = store.list()
        assert visible(store.folder) == ({"anna.json", "anna.safetensors"} if listed else set()), f"step {step}"
        assert all(info.problem is None for info in listed)
        found = store.get("anna").prompt if listed else None
        assert any(same(found, prompt) for prompt in (before, done)), f"step {step}"
        assert step != steps[-1] or same(found, done), "the last step was not killed"
        if found is None:
            assert store.enroll("Anna", new).id == "anna"


def same(one: Prompt | None, other: Prompt | None) -> bool:
    return one is other if one is None or other is None else same_prompt(one, other)
