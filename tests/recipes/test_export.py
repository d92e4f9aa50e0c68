"""The model directory that the recipe writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from cosy_engine.voices.spk2info import read_spk2info
from recipes.embedded.export import write_voices
from tests.recordings import encoded, hum


def test_the_models_own_voices_keep_their_words(standin_v2: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(standin_v2, tmp_path / "model")
    with (directory / "cosyvoice2.yaml").open("a") as file:
        file.write("\ncontinues_recordings: false\n")
    (tmp_path / "ann.wav").write_bytes(encoded(hum(2)))
    (tmp_path / "prompts.tsv").write_text("file\tname\ttext\nann.wav\tAnn\tGood morning.\n")
    write_voices(directory, tmp_path)
    voice = read_spk2info(directory / "spk2info.pt", "")["ann"]
    assert voice.prompt.text == "Good morning." and len(voice.prompt.text_token)
