"""Text to ids."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.text.special_tokens import special_tokens
from cosy_engine.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def small(standin_v3: Path) -> TextTokenizer:
    return TextTokenizer(standin_v3 / "CosyVoice-BlankEN", "cosyvoice3")


def test_markers_follow_the_vocabulary_in_their_order(small: TextTokenizer) -> None:
    ids = [small.encode(marker) for marker in special_tokens("cosyvoice3")]
    assert all(len(one) == 1 for one in ids)
    assert [one[0] for one in ids[2:]] == list(range(small.end_of_prompt, small.end_of_prompt + len(ids) - 2))
    assert len(small) == ids[-1][0] + 1


def test_any_text_encodes_within_the_vocabulary(small: TextTokenizer) -> None:
    ids = small.encode("naïve 你好 안녕 😀 \x00 [h][ǎo]<|endofprompt|>done")
    assert ids and max(ids) < len(small)
    assert small.end_of_prompt in ids


def test_the_same_ids_from_many_threads(small: TextTokenizer) -> None:
    texts = [f"第{n}句 sentence {n}[breath]" * (n + 1) for n in range(50)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(small.encode, texts)) == [small.encode(text) for text in texts]


def test_phonemes_belong_to_cosyvoice3_only(standin_v2: Path, small: TextTokenizer) -> None:
    version2 = TextTokenizer(standin_v2 / "CosyVoice-BlankEN", "cosyvoice2")
    assert len(version2.encode("[ǎo]")) > 1 == len(small.encode("[ǎo]"))
    assert len(version2.encode("[laughter]")) == 1


def test_published_sizes(published_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(TextTokenizer(published_dir / "CosyVoice-BlankEN", "cosyvoice2")) == 151_663
        assert len(TextTokenizer(published_dir / "CosyVoice-BlankEN", "cosyvoice3")) == 151_924
    assert not caplog.records


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match=r"vocab\.json"):
        TextTokenizer(tmp_path, "cosyvoice2")
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelDirectoryError, match="cannot be read"):
        TextTokenizer(tmp_path, "cosyvoice2")
