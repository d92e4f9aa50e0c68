"""How text is divided into the pieces that are spoken one after the other."""

from __future__ import annotations

import pytest

from cosy_engine.text.split import LONGEST_PIECE, split_paragraph, split_text

SENTENCE = "收到好友从远方寄来的生日礼物，那份意外的惊喜与深深的祝福让我心中充满了甜蜜的快乐，笑容如花儿般绽放。"


def words(text: str) -> int:
    return len(text.split())


def test_sentences_are_collected_up_to_the_limit() -> None:
    assert split_paragraph(SENTENCE * 3, len, "zh") == [SENTENCE * 2, SENTENCE]


def test_a_short_rest_joins_the_piece_before() -> None:
    assert split_paragraph(SENTENCE * 2 + "好的。", len, "zh") == [SENTENCE * 2 + "好的。"]


def test_a_stop_is_added_and_a_quotation_mark_stays_with_its_sentence() -> None:
    assert split_paragraph('He said "Stop." Then left', len, "en", token_max_n=5, token_min_n=3, merge_len=1) == [
        'He said "Stop."',
        " Then left.",
    ]


def test_english_is_counted_in_tokens() -> None:
    text = "One two three four five. Six seven eight nine ten. "
    pieces = split_paragraph(text.strip(), words, "en", token_max_n=8, token_min_n=4, merge_len=2)
    assert pieces == ["One two three four five.", " Six seven eight nine ten."]


def test_commas_end_a_sentence_when_asked_to() -> None:
    assert len(split_paragraph(SENTENCE * 2, len, "zh", comma_split=True)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "没有标点" * 500,
        "中文，" * 700,
        "a" * 3000,
        "no stops at all " * 300,
        "one, two, three, " * 200,
        "<|endofprompt|>" + "很长的一段话" * 100,
        "[laughter]" * 200,
        "你好 world，" * 300 + "。",
    ],
)
def test_no_piece_is_too_long_and_nothing_is_lost(text: str) -> None:
    pieces = split_text(text, len)
    assert all(0 < len(piece) <= LONGEST_PIECE for piece in pieces)
    assert "".join(pieces).rstrip("。. ") == text.rstrip("。. ")
    assert min(map(len, pieces[:-1])) >= LONGEST_PIECE / 3  # no crumbs


def test_markers_are_never_cut() -> None:
    pieces = split_text("好" * 115 + "[laughter]" * 100, len)
    assert "".join(pieces).count("[laughter]") == sum(piece.count("[laughter]") for piece in pieces) == 100


def test_long_sentences_are_cut_at_commas_before_blanks_before_letters() -> None:
    with_commas = "word " * 15 + "end, "
    assert all(piece.rstrip(" .").endswith("end,") for piece in split_text(with_commas * 6, len))
    assert all(piece.rstrip(".").endswith("word") for piece in split_text(" word" * 100, len))


def test_pieces_without_a_word_are_left_out() -> None:
    assert split_text("", len) == []
    assert split_text("!!!???", len) == []
    assert split_text("。”“好的", len) == ["”“好的。"]
    assert split_text("?! Yes", len) == ["Yes."]
