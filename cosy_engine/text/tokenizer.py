"""Text to the ids of the speech LM's text vocabulary: Qwen2's byte-level BPE with CosyVoice's markers added."""

from __future__ import annotations

from pathlib import Path

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.text.special_tokens import END_OF_PROMPT, END_OF_TEXT, Version, special_tokens


class TextTokenizer:
    """The tokenizer of a model directory.

    Args:
        directory: holds `vocab.json` and `merges.txt` (or `tokenizer.json`); nothing is fetched and no code of it runs.
        version: which markers to add; they get the ids after the vocabulary.

    Raises:
        ModelDirectoryError: the files are missing or cannot be read.
    """

    def __init__(self, directory: Path, version: Version) -> None:
        from transformers import Qwen2TokenizerFast

        if not ((directory / "vocab.json").is_file() or (directory / "tokenizer.json").is_file()):
            raise ModelDirectoryError(
                f"The tokenizer is missing: {directory} holds neither vocab.json nor tokenizer.json."
            )
        try:
            tokenizer = Qwen2TokenizerFast.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the reader of tokenizer files raises plain Exceptions among others
            raise ModelDirectoryError(f"The tokenizer files in {directory} cannot be read: {error}.") from error
        tokenizer.add_special_tokens(
            {
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
                "additional_special_tokens": list(special_tokens(version)),
            }
        )
        self.end_of_prompt: int = tokenizer.convert_tokens_to_ids(END_OF_PROMPT)
        self._size = len(tokenizer)
        self._encode = tokenizer.backend_tokenizer.encode  # without the wrapper's settings: safe in several threads

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; markers in it become their own ids."""
        return self._encode(text, add_special_tokens=False).ids
