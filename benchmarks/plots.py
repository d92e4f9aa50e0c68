"""Draw the figures of `benchmarks.streaming`: `python -m benchmarks.plots FIGURES.json PLOT.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> None:
    """Four panels: chunks of a long stream, listeners at once twice, where a chunk's time goes. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((chunks, wait), (amount, stages)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{report['model']} on {report['device']}")
    for name in ("recompute", "incremental"):
        part = report.get(name, {})
        if "chunks" in part:
            chunks.plot(part["chunks"]["chunks"][:-1], label=name)
        if "heard" in part:
            heard = part["heard"]["chunks"][:-1]  # before the first one the listener waits for codes, too
            chunks.plot(range(1, len(heard)), heard[1:], label=f"{name}, in the engine")
        crowds = [crowd for crowd in part.get("listeners", []) if crowd["ttfa_p50"] is not None]
        counts = [crowd["listeners"] for crowd in crowds]
        (line,) = wait.plot(counts, [crowd["ttfa_p50"] for crowd in crowds], marker="o", label=f"{name}, median")
        wait.plot(counts, [crowd["ttfa_p95"] for crowd in crowds], "--", color=line.get_color(), label="95 %")
        amount.plot(counts, [crowd["audio_per_second"] for crowd in crowds], marker="o", label=name)
    chunks.set(xlabel="second of speech", ylabel="s", title="Time of a one-second chunk")
    wait.set(xlabel="listeners", ylabel="s", title="First audio")
    amount.set(xlabel="listeners", ylabel="s", title="Seconds of audio a second")
    for axes in (wait, amount):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    bottom = [0.0] * len(report.get("stages", []))
    columns = [column["what"].replace(", ", ",\n") for column in report.get("stages", [])]
    for part in dict.fromkeys(part for column in report.get("stages", []) for part in column["milliseconds"]):
        heights = [column["milliseconds"].get(part, 0.0) for column in report["stages"]]
        stages.bar(columns, heights, bottom=bottom, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    stages.set(ylabel="ms", title="Parts of a chunk")
    for axes in (chunks, wait, amount, stages):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
