"""The figures of `benchmarks.streaming` as short tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

_PATHS = ("incremental", "recompute")
_CROWD = ("p50, ms", "p95, ms", "RTF p50", "audio s/s", "underruns", "heard")


def show(report: dict[str, Any], console: Console) -> None:
    """Print all tables, and what was cut or failed."""
    facts = {key: value for key, value in report.items() if not isinstance(value, dict | list)}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for table in (_stream(report), _crowds(report), _first_hops(report), _stages(report)):
        console.print(table)
    for kind in ("cut", "failed"):
        for what, told in remarks(report, kind):
            console.print(f"{kind}: {what}: {told}")


def _stream(report: dict[str, Any]) -> Table:
    table = _table("One stream", "", *_PATHS)
    rows = {
        "third chunk, ms": ("chunks", lambda part: part["chunks"][2], 1000),
        "last whole chunk, ms": ("chunks", lambda part: part["chunks"][-2], 1000),
        "last whole over third": ("chunks", lambda part: part["last_over_third"], 1),
        "in the engine, from chunk to chunk: last over third": ("heard", lambda part: part["last_over_third"], 1),
        "all chunks measured, s": ("chunks", lambda part: part["total"], 1),
        "kept a second of audio, MB": ("chunks", lambda part: part["state_bytes_per_second"], 1e-6),
        "first audio, new recording, ms": ("first_audio", lambda part: part["cold_prompt"], 1000),
        "first audio, saved voice, ms": ("first_audio", lambda part: part["warm_voice"], 1000),
        "saved over new": ("first_audio", lambda part: part["warm_over_cold"], 1),
    }
    for name, (part, figure, factor) in rows.items():
        table.add_row(name, *(_of(figure, report[path].get(part, {}), factor) for path in _PATHS))
    return table


def _crowds(report: dict[str, Any]) -> Table:
    table = _table("Many listeners; first audio and RTF", "", "at once", *_CROWD, "GPU, GB")
    for path in _PATHS:
        for crowd in report[path]["listeners"] + report[path]["arrivals"]:
            who = str(crowd["listeners"]) if "listeners" in crowd else f"{crowd['rate']:g}/s"
            table.add_row(path, who, *_crowd(crowd), _number(crowd.get("peak_memory"), 1e-9))
    return table


def _first_hops(report: dict[str, Any]) -> Table:
    table = _table("Tokens in the first chunk, one listener", "", *_CROWD)
    for crowd in report["incremental"]["first_hops"]:
        table.add_row(str(crowd["first_hop"]), *_crowd(crowd))
    return table


def _stages(report: dict[str, Any]) -> Table:
    columns = report["stages"]
    table = _table(
        "Parts of a chunk, ms for each stream (share); the speech LM works at the same time",
        "",
        *(column["what"] for column in columns),
    )
    for part in dict.fromkeys(part for column in columns for part in column["milliseconds"]):
        cells = []
        for column in columns:
            parts = column["milliseconds"]
            share = f"{parts[part]:.1f} ({parts[part] / sum(parts.values()):.0%})" if part in parts else ""
            cells.append(share)
        table.add_row(part, *cells)
    table.add_row("together", *(f"{sum(column['milliseconds'].values()):.1f}" for column in columns))
    return table


def _crowd(crowd: dict[str, Any]) -> list[str]:
    return [
        _number(crowd["ttfa_p50"], 1000),
        _number(crowd["ttfa_p95"], 1000),
        _number(crowd["rtf_p50"]),
        _number(crowd["audio_per_second"]),
        str(crowd["underruns"]),
        str(crowd["requests"]),
    ]


def remarks(report: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    """Measurements that were cut, or in which requests failed, and what is to be said of it."""
    for path in _PATHS:
        for part, figures in report[path].items():
            for entry in figures if isinstance(figures, list) else [figures]:
                if kind in entry:
                    which = [f"{key} {entry[key]:g}" for key in ("listeners", "rate", "first_hop") if key in entry]
                    yield ", ".join([path, part, *which]), entry[kind]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _of(figure: Any, part: dict[str, Any], factor: float) -> str:
    try:
        return _number(figure(part), factor)
    except (KeyError, IndexError):  # cut too early, or only the other path has it
        return ""


def _number(value: float | None, factor: float = 1) -> str:
    if value is None:
        return ""
    value *= factor
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
