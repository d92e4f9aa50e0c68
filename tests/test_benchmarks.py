"""The streaming benchmark runs and counts right; how long anything takes is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import gpu_check, streaming
from benchmarks.full_size import random_flow, random_vocoder
from benchmarks.listeners import Heard, summary
from benchmarks.speech_lm import random_lm
from benchmarks.tables import remarks
from cosy_engine.checkpoint.build import build_modules
from cosy_engine.checkpoint.read_yaml import read_config


@pytest.mark.parametrize("version", [2, 3])
def test_full_size_is_the_published_size(version: int, published_dir: Path) -> None:
    with torch.device("meta"):
        published = build_modules(read_config(published_dir / f"cosyvoice{version}.yaml"), published_dir)
        ours = random_lm(version), random_flow(version), random_vocoder(version)
    for module, made in zip(published, ours, strict=True):
        assert _shapes(made) == _shapes(module)


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def test_a_listener_runs_dry_as_often_as_his_sound_ends_before_more_comes() -> None:
    heard = Heard(asked=0.0)
    for seconds, moment in [(0.2, 1.0), (0.2, 1.1), (0.5, 1.4), (0.1, 2.5), (0.1, 2.55)]:
        heard.arrives(seconds, moment)
    # He plays from 1.1 on; at 2.0 the 0.9 s are over, at 2.6 the tenth that came at 2.5.
    assert (heard.first, heard.underruns) == (1.0, 1)
    heard.arrives(0.1, 2.8)
    assert heard.underruns == 2


def test_requests_that_were_cut_are_told() -> None:
    whole = Heard(asked=0.0, first=0.5, rtf=0.2, chunks=[(0.5, 4.0), (2.0, 6.0)])
    begun = Heard(asked=0.0, first=1.5, chunks=[(1.5, 2.0)])
    waiting = Heard(asked=0.0)
    result = summary([whole, begun, waiting], requests=4, started=0.0, ended=6.0)
    assert result["cut"] == "1 of 4 requests heard in 6 s, 1 still waiting for sound"
    assert (result["ttfa_p50"], result["audio_per_second"], result["requests"]) == (1.0, 2.0, 1)
    assert not {"cut", "failed"} & summary([whole], requests=1, started=0.0, ended=6.0).keys()


def test_sound_that_came_after_the_first_listener_left_does_not_count() -> None:
    heard = [Heard(asked=1.0, chunks=[(2.0, 3.0), (3.0, 3.0)]), Heard(asked=1.0, chunks=[(2.0, 2.0), (5.0, 100.0)])]
    assert summary(heard, requests=2, started=1.0, ended=5.0, left=[5.0, 3.0])["audio_per_second"] == 4.0
    heard.append(Heard(asked=1.0, error="he leaves at once"))
    assert summary(heard, requests=3, started=1.0, ended=5.0, left=[1.5, 3.0])["audio_per_second"] == 27.0


def test_requests_that_failed_are_told() -> None:
    broken = Heard(asked=0.0, first=0.5, chunks=[(0.5, 1.0)], error="OutOfMemoryError: 2 GiB")
    result = summary([broken], requests=1, started=0.0, ended=2.0)
    assert result["failed"] == "1 requests, the first with OutOfMemoryError: 2 GiB"
    assert "cut" not in result
    report = {"incremental": {"listeners": [{"listeners": 64} | result]}, "recompute": {}}
    assert list(remarks(report, "failed")) == [("incremental, listeners, listeners 64", result["failed"])]


def test_streaming_measures_all_parts_of_both_paths(
    standin_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "FIRST_HOPS", (7, 22))
    app = Typer()
    app.command()(streaming.main)
    options = "--tokens 50 --seconds 5 --rounds 1 --concurrency 1,2 --recompute-concurrency 1 --rates 2 --device cpu"
    written = tmp_path / "figures.json"
    result = CliRunner().invoke(app, [*options.split(), "--model-dir", str(standin_v3), "--json", str(written)])
    assert result.exit_code == 0, result.output
    figures = json.loads(written.read_text())
    for path, levels in {"incremental": [1, 2], "recompute": [1]}.items():
        assert [crowd["listeners"] for crowd in figures[path]["listeners"]] == levels
        assert len(figures[path]["chunks"]["chunks"]) == 5
        assert figures[path]["first_audio"]["warm_voice"] > 0
        assert figures[path]["arrivals"][0]["requests"] > 0
    assert figures["incremental"]["chunks"]["state_bytes_per_second"] > 0
    assert len(figures["incremental"]["heard"]["chunks"]) == 5
    assert [hop["first_hop"] for hop in figures["incremental"]["first_hops"]] == [7, 22]
    assert set(figures["stages"][0]["milliseconds"]) > {"flow encoder", "estimator, all steps", "vocoder"}
    assert "Parts of a chunk" in result.output


def test_the_gpu_check_reports_a_part_that_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> gpu_check.Figures:
        yield "before", 1
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.PARTS, "kernels", broken)
    app = Typer()
    app.command()(gpu_check.main)
    written = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["--dry", "--only", "kernels,lm", "--json", str(written)])
    assert result.exit_code == 1, result.output
    figures = json.loads(written.read_text())
    assert figures["wrong"] == ["kernels, failed"]
    assert figures["kernels, before"] == 1
    assert figures["lm, torch.float32"]["right"]
