"""Replay of the front end's cases: features, text helpers, tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosy_engine.audio.features import MelSettings, kaldi_fbank, mel_spectrogram, whisper_log_mel
from cosy_engine.text import normalize as text_steps
from cosy_engine.text.split import split_paragraph
from cosy_engine.text.tokenizer import TextTokenizer
from tests.golden.registry import Case, CheckResult, check
from tests.references import published_folder


@check("mel")
def check_mel(case: Case, result: CheckResult) -> None:
    result.close("mel", mel_spectrogram(case.ins["wav"], MelSettings(**case.meta["constructor"])), case.outs["mel"])


@check("whisper")
def check_whisper(case: Case, result: CheckResult) -> None:
    num_mels = case.meta["constructor"]["n_mels"]
    result.close("log_mel", whisper_log_mel(case.ins["wav"], num_mels), case.outs["log_mel"])


@check("fbank")
def check_fbank(case: Case, result: CheckResult) -> None:
    fbank = kaldi_fbank(case.ins["wav"], case.meta["constructor"]["num_mel_bins"])
    result.close("fbank", fbank, case.outs["fbank"])
    result.close("fbank_minus_mean", fbank - fbank.mean(dim=0, keepdim=True), case.outs["fbank_minus_mean"])


@check("text")
def check_text(case: Case, result: CheckResult) -> None:
    """Every recorded step of every text; a recorded error is expected by the name of its class."""
    settings = {**case.meta["call"]["split_paragraph"]}
    settings.pop("lang")
    with_commas = {**settings, **case.meta["call"]["split_paragraph_comma"]}

    def pieces(text: str, options: dict[str, Any]) -> list[str]:
        return split_paragraph(text.strip(), len, text_steps.language_of(text), **options)

    def prepared(text: str) -> str:
        """The public procedure without a normalisation back end."""
        if not text or ("<|" in text and "|>" in text):
            return text
        if text_steps.contains_chinese(text):
            return text_steps.tidy_chinese(text.strip())
        return text_steps.spell_out_number(text.strip())

    def prepared_pieces(text: str) -> list[str]:
        if not text or ("<|" in text and "|>" in text):
            return [text]
        language = text_steps.language_of(text.strip())
        split = split_paragraph(prepared(text), len, language, **settings)
        return [piece for piece in split if not text_steps.is_only_punctuation(piece)]

    steps: dict[str, Callable[[str], Any]] = {
        "contains_chinese": text_steps.contains_chinese,
        "replace_blank": text_steps.replace_blank,
        "replace_blank_of_stripped": lambda text: text_steps.replace_blank(text.strip()),
        "replace_corner_mark": text_steps.replace_corner_mark,
        "remove_bracket": text_steps.remove_bracket,
        "is_only_punctuation": text_steps.is_only_punctuation,
        "spell_out_number": text_steps.spell_out_number,
        "lang": text_steps.language_of,
        "split_paragraph": lambda text: pieces(text, settings),
        "split_paragraph_comma": lambda text: pieces(text, with_commas),
        "text_normalize_split": prepared_pieces,
        "text_normalize_nosplit": prepared,
    }
    for item in case.meta["items"]:
        for name, want in item.items():
            if name != "text":
                result.equal(f"{name}({item['text'][:20]!r})", _outcome(steps[name], item["text"]), want)


@check("tokenizer")
def check_tokenizer(case: Case, result: CheckResult) -> None:
    directory = published_folder(case.folder) / Path(case.meta["call"]["tokenizer_files"]).name
    for version, recorded in case.meta["items"].items():
        tokenizer = TextTokenizer(directory, version)
        result.equal(f"{version} size", len(tokenizer), recorded["size"])
        for token, number in recorded["special_ids"].items():
            result.equal(f"{version} {token}", tokenizer.encode(token), [number])
        for item in recorded["items"]:
            result.equal(f"{version} {item['text'][:20]!r}", tokenizer.encode(item["text"]), item["ids"])


def _outcome(step: Callable[[str], Any], text: str) -> Any:
    try:
        return step(text)
    except Exception as error:
        return {"error": type(error).__name__}
