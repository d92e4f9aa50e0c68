"""The embedded model's recipe: what its stages train on is what the engine does."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosy_engine.modules.qwen2_lm import KVCache
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import TextInbox, bistream
from cosy_engine.text.tokenizer import TextTokenizer
from recipes.embedded import data, flow, make_corpus, speech_lm, text_vocabulary, training
from recipes.embedded.features import HOP, SAMPLE_RATE, pitch

TEXT = "The speech model reads this text aloud."


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    byte = text_vocabulary.byte_characters()
    merges = [*text_vocabulary.english_merges([TEXT]), *text_vocabulary.hanzi_merges(["你", "好"], byte)]
    text_vocabulary.write_tokenizer(folder, merges, byte)
    (folder / "readings.tsv").write_text("你\tn\ti\t↓\n好\tx\tau\t↓\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stage(vocabulary: Path) -> speech_lm.Stage:
    torch.manual_seed(0)
    return speech_lm.Stage(vocabulary).eval()


@pytest.fixture(scope="module")
def text(vocabulary: Path) -> list[int]:
    return speech_lm.read_tokenizer(vocabulary).encode("Model reads 你好 this text aloud.").ids


@pytest.fixture(scope="module")
def codes(text: list[int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, speech_lm.CODES, 3 * len(text) + 17)


def documents(stage: speech_lm.Stage) -> speech_lm.Documents:
    made = speech_lm.Documents.__new__(speech_lm.Documents)
    made.sentences = SimpleNamespace(text_size=len(stage.lm.llm.model.model.embed_tokens.weight))
    return made


def scores_of(stage: speech_lm.Stage, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities of a document in training; another document stands before it in the row."""
    row = torch.from_numpy(np.concatenate([ids[:9], ids]))[None]
    document = torch.tensor([[0] * 9 + [1] * len(ids)])
    with torch.no_grad():
        return stage.lm.llm_decoder(stage.hidden(row, document)).log_softmax(-1)[0, 9:]


def test_vocabulary_is_read_alike_in_training_and_in_the_engine(vocabulary: Path) -> None:
    plain, engine = speech_lm.read_tokenizer(vocabulary), TextTokenizer(vocabulary, "cosyvoice2")
    for line in (TEXT, "你好，“你好”！", "Don't — café 12"):
        assert plain.encode(line).ids == engine.encode(line)
    assert engine.end_of_prompt == plain.get_vocab_size() + speech_lm.END_OF_PROMPT


def test_whole_documents_are_what_the_engine_decodes(
    stage: speech_lm.Stage, text: list[int], codes: np.ndarray
) -> None:
    ids, targets, _ = documents(stage)._whole(np.array(text), codes, np.zeros_like(codes))
    given = 20
    lm, cache = stage.lm, KVCache()
    with torch.no_grad():
        decoded = [lm.next_scores(lm.prompt(text, codes[:given].tolist()), cache)[0]]
        decoded += [lm.next_scores(lm.embed_speech([int(code)]), cache)[0] for code in codes[given:]]
    torch.testing.assert_close(scores_of(stage, ids)[len(text) + 1 + given :], torch.stack(decoded), atol=1e-4, rtol=0)
    assert targets[len(text) + 1 :].tolist() == [*codes, lm.eos_token]


def test_interleaved_documents_are_what_text_streaming_decodes(
    stage: speech_lm.Stage, text: list[int], codes: np.ndarray
) -> None:
    ids, targets, _ = documents(stage)._interleaved(np.array(text), codes, np.zeros_like(codes))
    lm = stage.lm
    script, seen = [*codes.tolist(), lm.eos_token], []

    def choose(scores: torch.Tensor, decoded: list[int]) -> int:
        seen.append(scores.clone())
        return script[len(decoded)]

    with torch.no_grad():
        spoken = list(bistream(lm, SpeechLMRequest(text=[]), TextInbox(deque(text), True), choose))
    assert spoken == codes.tolist()
    trained = scores_of(stage, ids)[(targets >= 0) & (targets <= lm.eos_token)]
    for got, wanted in zip(seen, trained, strict=True):
        allowed = got.isfinite()  # stop ids are masked within a block
        torch.testing.assert_close(got[allowed], wanted[allowed], atol=1e-4, rtol=0)
    assert (targets == lm.fill_token).sum() == len(text) // 5


def test_reading_loss_falls_when_the_text_spells_the_phonemes(stage: speech_lm.Stage) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    spoken, lengths = torch.tensor([[1, 2, 3, 3], [4, 5, 0, 0]]), torch.tensor([4, 2])
    head = torch.nn.Linear(speech_lm.WIDTH, speech_lm.SLOTS * data.CLASSES)
    stage.reading, before = head, stage.reading
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = stage.read(ids, spoken, lengths)
        optimizer.zero_grad()
        loss.backward(inputs=list(head.parameters()))
        optimizer.step()
        losses.append(loss.item())
    stage.reading = before
    assert losses[-1] < 0.2 < losses[0]


def test_pitch_belongs_to_the_middle_of_its_frame() -> None:
    moment = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    for start, slope in ((150, 150), (300, -80)):
        phase = 2 * math.pi * (start * moment + slope * moment**2 / 2)
        wave = sum(torch.sin(order * phase) / order for order in range(1, 10))[None] * 0.1
        found = pitch(wave)[0]
        middle = (torch.arange(len(found)) + 0.5) * HOP / SAMPLE_RATE
        late = ((found - start - slope * middle) / slope)[10:-10].median()
        assert abs(late) < 0.004


def test_silence_at_the_ends_is_trimmed() -> None:
    speech = data.Speech.__new__(data.Speech)
    speech.device = torch.device("cpu")
    quiet = torch.ones(240, dtype=torch.bool)
    quiet[20:70] = quiet[130:225] = False  # two utterances of 120 frames each
    speech.quiet = quiet
    speech.start = torch.tensor([0, 120]) * data.LABEL_SAMPLES
    speech.length = torch.tensor([120, 120]) * data.LABEL_SAMPLES
    speech._trim()
    ends = torch.stack([speech.start, speech.start + speech.length]) // data.LABEL_SAMPLES
    assert ends.T.tolist() == [[20 - data.LEAD, 70 + data.TAIL], [130 - data.LEAD, 225 + data.TAIL]]


class TwoSpeakers:
    device = torch.device("cpu")
    speakers = ("a", "b")
    speaker = torch.arange(12) % 2
    style = torch.zeros(12, dtype=torch.long)

    def __len__(self) -> int:
        return 12


def test_flow_sequences_join_utterances_of_one_voice() -> None:
    torch.manual_seed(0)
    count = torch.randint(40, 90, (12,))
    start = count.cumsum(0) - count
    total = int(count.sum())
    mel = torch.arange(2 * total)[:, None].expand(-1, 80).half()
    library = SimpleNamespace(
        codes=torch.arange(total), mel=mel, embedding=torch.randn(12, 192), count=count, start=start
    )
    speech = TwoSpeakers()
    pairs = flow.Pairs(speech, [library])
    utterance = torch.repeat_interleave(torch.arange(12), count)
    for long in (False, True):
        batch = pairs.draw(28, long=long)
        for row in range(len(batch["codes"])):
            length, prompt = int(batch["count"][row]), int(batch["prompt"][row])
            codes = batch["codes"][row, :length]
            assert len((utterance[codes] % 2).unique()) == 1
            assert (codes.diff() != 1).sum() <= (3 if long else 1)
            assert 0 <= prompt < length <= (flow.LONG if long else flow.LONGEST)
            assert torch.equal(batch["mel"][row, 0, : 2 * length : 2], mel[2 * codes, 0].float())
            assert not batch["mel"][row, :, 2 * length :].any()


def test_batches_hold_utterances_of_similar_length() -> None:
    generator = torch.Generator().manual_seed(0)
    prepared = [
        SimpleNamespace(frames=torch.tensor([int(n)])) for n in torch.randint(40, 400, (500,), generator=generator)
    ]
    batches = make_corpus.batches_of(prepared)
    lengths = [[int(one.frames.sum()) for one in batch] for batch in batches]
    assert sum(map(len, lengths)) == 500
    assert all(max(batch) * len(batch) <= make_corpus.BATCH_FRAMES for batch in lengths)
    assert sum(max(batch) * len(batch) for batch in lengths) < 1.1 * sum(map(sum, lengths))


def test_a_step_without_finite_gradients_changes_nothing(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 1)
    optimizer = training.adamw(layer.parameters(), 0.1)
    arguments = SimpleNamespace(checkpoint=tmp_path / "x.pt", device=torch.device("cpu"), time_limit=100, steps=3)
    run = training.Run(arguments, {"model": layer}, [optimizer])
    before = layer.weight.detach().clone()
    differentiated = training.Differentiated(lambda x: {"loss": layer(x).sum()}, layer)
    differentiated(x=torch.full((1, 3), float("nan")))
    run.step(optimizer)
    assert torch.equal(layer.weight, before)
    differentiated(x=torch.ones(1, 3))
    run.step(optimizer)
    assert not torch.equal(layer.weight, before)


def test_gradients_are_those_of_the_last_call() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    differentiated = training.Differentiated(lambda x: {"loss": layer(x).sum()}, layer)
    differentiated(x=torch.tensor([[1.0, 2.0]]))
    values = differentiated(x=torch.tensor([[3.0, 4.0]]))
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]
    assert not values["loss"].requires_grad
