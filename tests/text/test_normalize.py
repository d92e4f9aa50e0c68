"""What is left of typed text when it is to be spoken."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from cosy_engine.text.normalize import is_only_punctuation, is_speakable, normalize, replace_blank, spell_out_number


@pytest.mark.parametrize(
    ("typed", "spoken"),
    [
        ("Mr. Smith paid $5.75 at 10:30.", "Mister Smith paid five point seven five dollars at ten thirty."),
        ("价格是3.5元，面积120 m²。", "价格是三点五元，面积一百二十平方米。"),
        ("今天用 GPT-4 写代码，气温-5度", "今天用GPT四写代码，气温负五度"),
        ("x² and 5³", "x squared and five cubed"),
        ("ＡＢＣ costs １２ pounds", "ABC costs twelve pounds"),
    ],
)
def test_numbers_and_units_become_words(typed: str, spoken: str) -> None:
    assert normalize(typed) == spoken


@pytest.mark.parametrize("text", ["I watch TV and buy CDs.", "Was it so? No.", 'She said "Stop." and left.'])
def test_plain_english_stays_as_it_is(text: str) -> None:
    assert normalize(text) == text


def test_quotation_marks_survive_beside_numbers() -> None:
    assert normalize('He said "call 5 men".') == 'He said "call five men".'


def test_words_the_grammar_cannot_read_do_not_keep_the_others_from_being_read() -> None:
    assert normalize("We are #1 of 3") == "We are #one of three"


def test_more_digits_than_a_number_can_have_are_read_one_by_one() -> None:
    assert normalize("9" * 5000) == " ".join(["nine"] * 5000)


@pytest.mark.parametrize(
    ("typed", "spoken"),
    [
        ("你好😀👍🏽世界🇨🇳。", "你好世界。"),
        ("Great 😀, thanks 😀.", "Great, thanks."),
        ("good😀morning", "good morning"),
        ("zero\u200bwidth\ufeff and\x00 con\x07trol\ud800", "zerowidth and control"),
        ("a\u00a0b\u3000c\td", "a b c d"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_what_cannot_be_spoken_is_dropped(typed: str, spoken: str) -> None:
    assert normalize(typed) == spoken


def test_line_breaks() -> None:
    assert normalize("A title\n\nFirst line\r\nsecond line") == "A title. First line second line"
    assert normalize("标题\n\n第一行\n第二行") == "标题。第一行第二行"
    assert normalize("用 Python\nJava 写") == "用Python Java写"


def test_markers_stay_whole() -> None:
    assert normalize("[h][ǎo]的，[M][AY1] name[breath]<strong>好</strong>") == (
        "[h][ǎo]的，[M][AY1] name[breath]<strong>好</strong>"
    )
    assert normalize("I [laughter] ate 2 [AY1] pies") == "I [laughter] ate two [AY1] pies"


def test_text_with_an_end_of_prompt_is_not_normalised() -> None:
    assert normalize(" 用四川话说<|endofprompt|>我有 5 个. ") == "用四川话说<|endofprompt|>我有 5 个."


@pytest.mark.parametrize(
    "text", ["", "   ", "\n\t", "，。！", "? ! ...", "😀", "\x00\u200b", "<|endofprompt|>", "——（）"]
)
def test_nothing_to_speak(text: str) -> None:
    assert normalize(text) == ""


def test_speakable() -> None:
    assert is_speakable("5") and is_speakable("[laughter]") and is_speakable("안녕")
    assert not is_speakable("<|im_start|> !")


def test_public_helpers_keep_their_edges() -> None:
    assert is_only_punctuation("") and is_only_punctuation("!?+") and not is_only_punctuation("! ?")
    assert replace_blank("a b 中 文") == "a b中文"
    with pytest.raises(IndexError):
        replace_blank("中文 ")
    assert spell_out_number("v2.05") == "vtwo.five"


def test_no_network_and_the_same_result_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    texts = [f"第{n}章，{n}.5元。" for n in range(20)] + [f"I paid ${n}.75 at {n % 12 + 1}:30." for n in range(20)]
    one_by_one = [normalize(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(normalize, texts)) == one_by_one
