"""The embedded model's text vocabulary, in the file format of Qwen2's tokenizer.

    python -m recipes.embedded.text_vocabulary --kit KIT --output CosyVoice-BlankEN

Every hanzi of the training sentences is one token, joined from its three bytes; English gets the commonest pieces of
words. Any other text still encodes, byte by byte. `readings.tsv` beside the files says how most sentences read each
hanzi; the speech LM starts from it.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import re
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ENGLISH_MERGES = 1400
ROOM_FOR_MARKERS = 24  # rows after the vocabulary for <|endoftext|>, <|endofprompt|> and the rest
# Qwen2's split into words, single digits, punctuation and blanks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYLLABLE = re.compile("([pmftnlkxʨɕꭧʂɻʦs]?ʰ?)([jwɥ]?[aoeiuyəɤɛɨʊɚɔ]+)([→↗↓↘]?)((?:[nŋ](?![jwɥaoeiuyəɤɛɨʊɚɔ]))?ɚ?)")


def read_sentences(kit: Path) -> list[dict[str, str]]:
    """The kit's training sentences: lang, text, phonemes."""
    with lzma.open(kit / "sentences.tsv.xz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def is_hanzi(character: str) -> bool:
    return "\u3400" <= character <= "\u9fff"


def english_merges(texts: list[str]) -> list[tuple[str, str]]:
    """The first ENGLISH_MERGES merges of byte-pair encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + ENGLISH_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def hanzi_merges(hanzi: list[str], byte: dict[int, str]) -> list[tuple[str, str]]:
    """For each hanzi: its first two bytes, then the third."""
    pairs: dict[tuple[str, str], None] = {}
    whole = []
    for character in hanzi:
        first, second, third = (byte[value] for value in character.encode())
        pairs[first, second] = None
        whole.append((first + second, third))
    return [*pairs, *whole]


def read_hanzi(sentences: list[dict[str, str]]) -> dict[str, tuple[str, str, str]]:
    """Hanzi -> initial, final, tone as most sentences have them, of sentences with one syllable for each hanzi."""
    counts: dict[str, Counter[tuple[str, str, str]]] = {}
    for row in sentences:
        hanzi = [character for character in row["text"] if is_hanzi(character)]
        syllables = [(start, middle + end, tone) for start, middle, tone, end in SYLLABLE.findall(row["phonemes"])]
        if len(hanzi) == len(syllables):
            for character, syllable in zip(hanzi, syllables, strict=True):
                counts.setdefault(character, Counter())[syllable] += 1
    return {character: readings.most_common(1)[0][0] for character, readings in counts.items()}


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return {value: chr(value if value in visible else next(hidden)) for value in range(256)}


def write_tokenizer(output: Path, merges: list[tuple[str, str]], byte: dict[int, str]) -> int:
    """vocab.json, merges.txt and tokenizer_config.json; returns the number of tokens before the markers."""
    vocabulary = {token: number for number, token in enumerate([*byte.values(), *(a + b for a, b in merges)])}
    markers = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "added_tokens_decoder": {
            str(len(vocabulary) + number): {"content": marker, **flags} for number, marker in enumerate(markers)
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (output / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return len(vocabulary)


def read_tokenizer(folder: Path, dropout: float | None = None) -> Tokenizer:
    """The written vocabulary, splitting text as Qwen2's tokenizer does; `dropout` skips merges at random."""
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, dropout=dropout))
    tokenizer.pre_tokenizer = _split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    sentences = read_sentences(arguments.kit)
    byte = byte_characters()
    chinese = [row for row in sentences if row["lang"] == "zh"]
    hanzi = Counter(character for row in chinese for character in row["text"] if is_hanzi(character))
    common = [character for character, _ in hanzi.most_common()]
    merges = english_merges([row["text"] for row in sentences if row["lang"] == "en"])
    merges += hanzi_merges([*common, *"。，？！、；：“”"], byte)
    size = write_tokenizer(arguments.output, merges, byte)
    readings = read_hanzi(chinese)
    lines = ["\t".join([character, *readings[character]]) for character in common if character in readings]
    (arguments.output / "readings.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{size} tokens, {len(common)} hanzi, {len(lines)} with a reading")


if __name__ == "__main__":
    main()
