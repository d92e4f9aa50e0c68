from __future__ import annotations

from recipes.embedded.held_out_prompts import choose


def test_one_utterance_for_each_held_out_speaker_and_language() -> None:
    utterances = [
        ("k000", "en", 5.0),  # trained on
        ("k039", "en", 2.1),
        ("k039", "en", 9.0),
        ("k039", "en", 2.5),
        ("k345", "en", 2.1),
        ("k345", "zh", 4.0),
        ("k345", "en", 6.0),
        ("k345", "en", 7.0),
        ("so0043", "en", 3.5),
        ("so0053", "en", 1.9),
        ("so0044", "en", 3.5),  # trained on
    ]
    assert [utterances[number] for number in choose(utterances)] == [
        ("k039", "en", 2.5),
        ("k345", "zh", 4.0),
        ("k345", "en", 6.0),
        ("so0043", "en", 3.5),
    ]
