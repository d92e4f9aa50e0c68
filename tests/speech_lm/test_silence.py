from __future__ import annotations

from cosy_engine.speech_lm.silence import SILENT_CODES, SilenceFilter


def kept(model: str, codes: list[int]) -> list[int]:
    silence = SilenceFilter(SILENT_CODES[model])
    return [code for code in codes if silence.keeps(code)]


def test_cosyvoice3_keeps_five_silent_codes_in_a_row() -> None:
    long = [1, 2, 28, 29, 55, 248, 494]
    assert kept("cosyvoice3", [700, *long, 701, *long[:5], 702]) == [700, *long[:5], 701, *long[:5], 702]


def test_cosyvoice2_keeps_all() -> None:
    assert kept("cosyvoice2", [1] * 50) == [1] * 50
