from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosy_engine.audio.features import MelSettings, mel_spectrogram
from tests.golden.registry import CHECKS
from tests.golden_replay import find_cases, load_checks, replay
from tests.references import golden_folder

load_checks()
SETTINGS = MelSettings(n_fft=1920, num_mels=80, sampling_rate=24000, hop_size=480, win_size=1920, fmin=0, fmax=8000)


def write_case(folder: Path, name: str, mel: torch.Tensor, wav: torch.Tensor, **changes: object) -> Path:
    """A case of kind `mel` as the reference values have it."""
    save_file({"in.wav": wav.contiguous(), "out.mel": mel.contiguous()}, folder / f"{name}.safetensors")
    meta = {
        "case": name,
        "kind": "mel",
        "constructor": {
            "n_fft": 1920,
            "num_mels": 80,
            "sampling_rate": 24000,
            "hop_size": 480,
            "win_size": 1920,
            "fmin": 0,
            "fmax": 8000,
            "center": False,
        },
        "weights": {},
        "call": {"method": "mel_spectrogram"},
        "tolerance": {"atol": 1e-3, "rtol": 1e-4},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(meta | changes))
    return path


@pytest.mark.parametrize("path", find_cases(golden_folder()), ids=lambda path: path.stem)
def test_recorded_case(path: Path) -> None:
    result = replay(path)
    assert result.ok, result.problems


def test_every_kind_has_a_check(golden_dir: Path) -> None:
    kinds = {json.loads(path.read_text(encoding="utf-8"))["kind"] for path in find_cases(golden_dir)}
    assert kinds and kinds <= set(CHECKS)


def test_the_command_reports_each_case_and_fails_on_a_wrong_number(tmp_path: Path) -> None:
    wav = torch.randn(1, 12000, generator=torch.Generator().manual_seed(0)) * 0.1
    mel = mel_spectrogram(wav, SETTINGS)
    write_case(tmp_path, "right", mel, wav)
    command = [sys.executable, "-m", "tests.golden_replay", str(tmp_path), "--json"]
    passed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [json.loads(line) for line in passed.stdout.splitlines()]
    assert passed.returncode == 0
    assert [line["case"] for line in lines[:-1]] == ["right"] and lines[0]["ok"]
    assert lines[-1] == {"cases": 1, "passed": 1, "failed": 0}

    write_case(tmp_path, "wrong_value", mel + torch.eye(80, mel.shape[2]) * 0.1, wav)
    write_case(tmp_path, "wrong_shape", mel[:, :, :-1], wav)
    write_case(tmp_path, "unknown_kind", mel, wav, kind="never heard of")
    write_case(tmp_path, "not_a_number", mel * float("nan"), wav)
    shutil.copy(tmp_path / "right.safetensors", tmp_path / "weights.safetensors")
    write_case(tmp_path, "weights", mel, wav, kind="weights")
    failed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [json.loads(line) for line in failed.stdout.splitlines()]
    assert failed.returncode == 1
    assert {line["case"]: line["ok"] for line in lines[:-1]} == {
        "right": True,
        "wrong_value": False,
        "wrong_shape": False,
        "unknown_kind": False,
        "not_a_number": False,
    }
    assert lines[-1] == {"cases": 5, "passed": 1, "failed": 4}
