"""Stage e: the speech LM, text -> codes.

    python -m recipes.embedded.speech_lm --corpus plain slow ... --kit KIT --vocabulary CosyVoice-BlankEN \
        --speech-tokenizer speech_tokenizer.pt --checkpoint speech_lm.pt

A training document is a sentence, or two to four sentences of one speaker (texts, then codes: what a zero-shot prompt
makes), or a sentence after an instruction; in a fifth of them text and codes are interleaved 5 : 15 as in text
streaming. Documents are packed into rows of LENGTH positions; they do not see each other. Beside the codes the last
layer predicts the phoneme that each code belongs to, which teaches reading much faster than codes alone. And on text
alone, of all sentences that the kit has, its states at the text have to spell the phonemes (CTC), so that words which
no utterance holds are read, too.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cosy_engine.modules.qwen2_lm import Qwen2Encoder, Qwen2LM
from recipes.embedded.data import CLASSES, IGNORE, STYLES, Speech, spoken_classes
from recipes.embedded.features import CODE_HOP
from recipes.embedded.instructions import INSTRUCTIONS, LOUDNESS
from recipes.embedded.library import Library, code_features, load_tokenizer, structured_embedding
from recipes.embedded.networks import CODES
from recipes.embedded.text_vocabulary import ROOM_FOR_MARKERS, byte_characters, read_sentences, read_tokenizer
from recipes.embedded.training import Average, Differentiated, Run, adamw, add_arguments, is_main, setup, world_size

LENGTH = 768  # positions of a packed row
WIDTH = 384
EOS, FILL = CODES, CODES + 2
END_OF_PROMPT = 3  # position among the markers
SLOTS = 8  # phonemes that a text token can be read as
READ = 128  # sentences that are read in a step
TEXT_VARIANTS = 4  # ways in which an English sentence is cut into pieces
# Renderings of the corpus: they give other codes for the same sentence. The third is what the engine makes of a voice's
# recording, which it trims and ends with silence, and serves as prompt only; the last two are for instructions.
VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"shift": 1080},
    {"shift": 2160, "distorted": 0.3, "tail": 4800},
    {"shift": 720, "ratio": 0.96},
    {"shift": 1680, "ratio": 1.04},
    {"gain": (LOUDNESS["loud"],) * 2},
    {"gain": (LOUDNESS["quiet"],) * 2},
)
SPOKEN_VARIANTS = (0, 1, 3, 4)
COMMON = len(VARIANTS) - 2


def qwen2_config(text_size: int) -> dict[str, object]:
    """The backbone at the embedded model's size, as config.json has it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": WIDTH,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 832,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": text_size,
        "bos_token_id": text_size - ROOM_FOR_MARKERS,
        "eos_token_id": text_size - ROOM_FOR_MARKERS,
    }


def build_lm(vocabulary: Path) -> Qwen2LM:
    """The speech LM at the embedded model's size. Codes in and codes out share one table."""
    tokens = json.loads((vocabulary / "vocab.json").read_text(encoding="utf-8"))
    lm = Qwen2LM(WIDTH, WIDTH, CODES, Qwen2Encoder(qwen2_config(len(tokens) + ROOM_FOR_MARKERS)))
    lm.llm_decoder.weight = lm.speech_embedding.weight
    with torch.no_grad():
        nn.init.normal_(lm.speech_embedding.weight, std=0.05)
        nn.init.normal_(lm.llm_embedding.weight, std=0.05)
        nn.init.zeros_(lm.llm_decoder.bias)
        lm.speech_embedding.weight[:CODES] = structured_embedding(code_features(CODES), WIDTH, 0.05)
        table = lm.llm.model.model.embed_tokens.weight
        nn.init.normal_(table, std=0.05)
        table[: len(tokens)] = structured_embedding(text_features(tokens, vocabulary / "readings.tsv"), WIDTH, 0.05)
    return lm


def text_features(tokens: dict[str, int], readings: Path) -> Tensor:
    """[tokens, features]: initial, final and tone of a hanzi; letters at their places of a Latin token."""
    byte = {character: value for value, character in byte_characters().items()}
    spoken = dict(line.split("\t", 1) for line in readings.read_text(encoding="utf-8").splitlines())
    names: dict[str, int] = {}
    found = []
    for token, number in tokens.items():
        text = bytes(byte[character] for character in token).decode("utf-8", errors="replace")
        if text in spoken:
            parts = [
                f"{kind}={part}"
                for kind, part in zip(("initial", "final", "tone"), spoken[text].split("\t"), strict=True)
            ]
        else:
            parts = [f"{place}={letter}" for place, letter in enumerate(text.strip().lower()[:6])]
            parts += ["blank"] * text.startswith(" ") + [f"token={token}"] * (len(parts) < 1)
        found += [(number, names.setdefault(part, len(names))) for part in parts]
    features = torch.zeros(len(tokens), len(names))
    features[tuple(torch.tensor(found).T)] = 1
    return features


class Stage(nn.Module):
    """The speech LM with its phoneme heads, and a forward pass over packed rows."""

    def __init__(self, vocabulary: Path, dropout: float = 0.1) -> None:
        super().__init__()
        self.lm = build_lm(vocabulary)
        self.phonemes = nn.Linear(WIDTH, CLASSES)
        self.reading = nn.Linear(WIDTH, SLOTS * CLASSES)
        self.dropout = dropout

    def hidden(self, ids: Tensor, document: Tensor) -> Tensor:
        """ids (see `Documents`) and the number of the document of each position, [batch, n] -> [batch, n, width]."""
        backbone = self.lm.llm.model.model
        parts = (backbone.embed_tokens.weight, self.lm.llm_embedding.weight, self.lm.speech_embedding.weight)
        x = F.embedding(ids, torch.cat(parts))
        head_size, theta = self.lm.llm.head_size, self.lm.llm.rope_theta
        exponents = torch.arange(0, head_size, 2, device=ids.device) / head_size
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), theta**-exponents)
        cosine, sine = torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        mask = (causal & (document[:, :, None] == document[:, None]))[:, None]
        for layer in backbone.layers:
            attention = layer.self_attn
            h = layer.input_layernorm(x)
            q, k, v = (p(h).unflatten(2, (-1, head_size)).transpose(1, 2) for p in _projections(attention))
            q, k = (_rotate(side, cosine, sine).to(v.dtype) for side in (q, k))
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            x = x + F.dropout(attention.o_proj(mixed), self.dropout, self.training)
            x = x + F.dropout(layer.mlp(layer.post_attention_layernorm(x)), self.dropout, self.training)
        return backbone.norm(x)

    def forward(self, ids: Tensor, targets: Tensor, labels: Tensor, document: Tensor) -> dict[str, Tensor]:
        """The losses of `Documents`."""
        hidden = self.hidden(ids, document)
        scores = self.lm.llm_decoder(hidden).float()
        codes = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-1)
        said = self.phonemes(hidden).float()
        known = (labels != IGNORE).sum().clamp(min=1)
        phonemes = F.cross_entropy(said.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / known
        right = ((said.argmax(2) == labels) & (labels != IGNORE)).sum() / known
        return {"loss": codes + 0.5 * phonemes, "codes": codes, "phonemes": phonemes, "accuracy": right}

    def read(self, ids: Tensor, spoken: Tensor, spoken_length: Tensor) -> Tensor:
        """CTC loss a phoneme of what `Readings.draw` gives."""
        hidden = self.hidden(ids, torch.zeros_like(ids))[:, 1:]
        scores = self.reading(hidden).unflatten(2, (SLOTS, -1)).flatten(1, 2).float().log_softmax(2).transpose(0, 1)
        frames = torch.full_like(spoken_length, len(scores))
        return F.ctc_loss(scores, spoken, frames, spoken_length, zero_infinity=True)


def _projections(attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return x * cosine + x.roll(x.shape[-1] // 2, dims=-1) * sine


@dataclass
class Sentences:
    """Everything documents are made of, as numpy arrays that worker processes share.

    Attributes:
        text: for each sentence its token ids, TEXT_VARIANTS times.
        codes, labels: for each of VARIANTS all codes, and the phoneme class of each.
        start, count: for each of VARIANTS where a sentence's codes are.
        speaker, style: of each sentence.
        instructions: style -> token ids of its wordings, with the marker at the end.
        text_size: rows of the text embedding.
    """

    text: list[list[np.ndarray]]
    codes: list[np.ndarray]
    labels: list[np.ndarray]
    start: list[np.ndarray]
    count: list[np.ndarray]
    speaker: np.ndarray
    style: np.ndarray
    instructions: dict[str, list[np.ndarray]]
    text_size: int


def load_sentences(speech: Speech, tokenizer_path: Path, vocabulary: Path) -> Sentences:
    """Encode all text and all speech."""
    plain, loose = read_tokenizer(vocabulary), read_tokenizer(vocabulary, dropout=0.1)
    text_size = plain.get_vocab_size() + ROOM_FOR_MARKERS
    end_of_prompt = plain.get_vocab_size() + END_OF_PROMPT
    exact = plain.encode_batch(speech.text)
    english = (speech.language == 0).tolist()
    variants = [exact, *([exact] * (TEXT_VARIANTS // 2 - 1))]
    variants += [loose.encode_batch(speech.text) for _ in range(TEXT_VARIANTS - len(variants))]
    text = [
        [np.array((ways[row] if english[row] else exact[row]).ids, np.int32) for ways in variants]
        for row in range(len(speech))
    ]
    instructions = {
        style: [np.array([*plain.encode(wording).ids, end_of_prompt], np.int32) for wording in wordings]
        for style, wordings in INSTRUCTIONS.items()
    }
    network = load_tokenizer(tokenizer_path, speech.device)
    codes, labels, starts, counts = [], [], [], []
    for settings in VARIANTS:
        library = Library(speech, network, **settings)
        row = torch.repeat_interleave(torch.arange(len(speech), device=speech.device), library.count)
        place = torch.arange(len(row), device=speech.device) - library.start[row]
        ratio, shift = settings.get("ratio", 1.0), settings.get("shift", 0)
        moment = ((place + 0.5) * CODE_HOP * ratio).long() + shift
        codes.append(library.codes.cpu().numpy())
        labels.append(speech.frame_labels(row, moment[:, None])[:, 0].to(torch.uint8).cpu().numpy())
        starts.append(library.start.cpu().numpy())
        counts.append(library.count.cpu().numpy())
    return Sentences(
        text,
        codes,
        labels,
        starts,
        counts,
        speech.speaker.cpu().numpy(),
        speech.style.cpu().numpy(),
        instructions,
        text_size,
    )


class Readings:
    """The kit's sentences with their phonemes, drawn in batches of equally long texts."""

    def __init__(self, kit: Path, vocabulary: Path, device: torch.device) -> None:
        rows = read_sentences(kit)
        text = [row["text"] for row in rows]
        plain, loose = read_tokenizer(vocabulary), read_tokenizer(vocabulary, dropout=0.1)
        encodings = [*plain.encode_batch(text), *loose.encode_batch(text)]
        sos = plain.get_vocab_size() + ROOM_FOR_MARKERS
        self.ids = [np.array([sos, *encoding.ids], np.int64) for encoding in encodings]
        self.spoken = [np.array(spoken_classes(row["phonemes"]), np.int64) for row in rows] * 2
        self.lengths = np.array([len(ids) for ids in self.ids])
        order = self.lengths.argsort(kind="stable")
        self.by_length = dict(zip(*_groups(self.lengths[order], order), strict=True))
        self.generator = np.random.default_rng(0)
        self.device = device

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids [count, 1 + n], phoneme classes [count, m], and how many of them there are [count], on the CPU."""
        some = self.by_length[self.lengths[self.generator.integers(len(self.ids))]]
        rows = self.generator.choice(some, count)
        ids = torch.from_numpy(np.stack([self.ids[row] for row in rows]))
        spoken = [torch.from_numpy(self.spoken[row]) for row in rows]
        lengths = torch.tensor([len(classes) for classes in spoken])
        spoken = nn.utils.rnn.pad_sequence(spoken, batch_first=True)
        return ids.to(self.device), spoken.to(self.device), lengths


def _groups(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The different `keys`, which are sorted, and the values of each."""
    names, first = np.unique(keys, return_index=True)
    return names, np.split(values, first[1:])


class Documents(IterableDataset):
    """Endless packed rows of ids, targets, phoneme labels and document numbers, each [LENGTH].

    Ids: text tokens first, then sos and task id, then the speech embedding's rows.
    """

    def __init__(self, sentences: Sentences, seed: int) -> None:
        self.sentences = sentences
        self.seed = seed
        self.groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(sentences.speaker.tolist(), sentences.style.tolist(), strict=True)):
            self.groups.setdefault(key, []).append(row)
        style = sentences.style
        self.plain = np.flatnonzero(np.isin(style, [STYLES.index("plain"), STYLES.index("real")]))
        self.styled = np.flatnonzero(~np.isin(style, [STYLES.index("plain"), STYLES.index("real")]))

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        worker = torch.utils.data.get_worker_info()
        generator = random.Random(self.seed * 1009 + (worker.id if worker else 0))
        waiting: tuple[np.ndarray, ...] | None = None
        while True:
            row = np.zeros((4, LENGTH), np.int64)
            row[1], row[2], row[3] = -1, IGNORE, -1
            filled = number = 0
            while True:
                document = waiting or self._document(generator)
                size = len(document[0])
                if filled + size > LENGTH:
                    waiting = document if size <= LENGTH else None
                    break
                row[:3, filled : filled + size] = document
                row[3, filled : filled + size] = number
                filled, number, waiting = filled + size, number + 1, None
            yield tuple(row)

    def _document(self, generator: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kind = generator.random()
        if kind < 0.12 and len(self.styled):
            return self._instructed(generator)
        rows = [int(self.plain[generator.randrange(len(self.plain))])]
        if kind < 0.6:
            key = (int(self.sentences.speaker[rows[0]]), int(self.sentences.style[rows[0]]))
            if generator.random() < 0.1 and len(self.styled):
                rows = [int(self.styled[generator.randrange(len(self.styled))])]
                key = (int(self.sentences.speaker[rows[0]]), int(self.sentences.style[rows[0]]))
            rows += generator.choices(self.groups[key], k=generator.choice((1, 1, 1, 2, 3)))
        variants = [generator.randrange(COMMON) for _ in rows[1:]] + [generator.choice(SPOKEN_VARIANTS)]
        text = np.concatenate([generator.choice(self.sentences.text[row]) for row in rows])
        speech = [self._speech(row, variant) for row, variant in zip(rows, variants, strict=True)]
        codes, labels = (np.concatenate(parts) for parts in zip(*speech, strict=True))
        if generator.random() < 0.2 and len(codes) > 3 * len(text) + 15:
            return self._interleaved(text, codes, labels)
        return self._whole(text, codes, labels)

    def _instructed(self, generator: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if generator.random() < 0.25:
            style = generator.choice(tuple(LOUDNESS))
            row, variant = int(self.plain[generator.randrange(len(self.plain))]), COMMON + (style == "quiet")
        else:
            row = int(self.styled[generator.randrange(len(self.styled))])
            style, variant = STYLES[self.sentences.style[row]], generator.choice(SPOKEN_VARIANTS)
        instruction = generator.choice(self.sentences.instructions[style])
        text = np.concatenate([instruction, generator.choice(self.sentences.text[row])])
        return self._whole(text, *self._speech(row, variant))

    def _speech(self, row: int, variant: int) -> tuple[np.ndarray, np.ndarray]:
        start = self.sentences.start[variant][row]
        end = start + self.sentences.count[variant][row]
        codes = self.sentences.codes[variant][start:end].astype(np.int64)
        return codes, self.sentences.labels[variant][start:end].astype(np.int64)

    def _whole(self, text: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """[sos, text, task id, codes] -> [..., codes, end]."""
        sos, task, speech = self.sentences.text_size, self.sentences.text_size + 1, self.sentences.text_size + 2
        ids = np.concatenate([[sos], text, [task], codes + speech])
        targets, classes = np.full(len(ids), -1), np.full(len(ids), IGNORE)
        targets[len(text) + 1 :] = np.append(codes, EOS)
        classes[len(text) + 1 : -1] = labels
        return ids, targets, classes

    def _interleaved(self, text: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """[sos, 5 text, 15 codes, 5 text, ..., rest of the text, task id, rest of the codes]. After the codes of a
        block the fill id is the target, but never an input, as in the public training."""
        sos, task, speech = self.sentences.text_size, self.sentences.text_size + 1, self.sentences.text_size + 2
        ids, targets, classes = [np.array([sos])], [np.array([-1])], [np.array([IGNORE])]
        blocks = len(text) // 5
        for block in range(blocks):
            said = codes[15 * block : 15 * block + 15]
            ids += [text[5 * block : 5 * block + 5], said + speech]
            targets += [np.full(4, -1), said, np.array([FILL])]
            classes += [np.full(4, IGNORE), labels[15 * block : 15 * block + 15], np.array([IGNORE])]
        rest = codes[15 * blocks :]
        remaining = text[5 * blocks :]
        ids += [remaining, np.array([task]), rest + speech]
        targets += [np.full(len(remaining), -1), rest, np.array([EOS])]
        classes += [np.full(len(remaining), IGNORE), labels[15 * blocks :], np.array([IGNORE])]
        return np.concatenate(ids), np.concatenate(targets), np.concatenate(classes)


def perturb(ids: Tensor, first_speech: int, share: float) -> Tensor:
    """Change one digit of a share of the codes that are fed in, so that the model forgives its own mistakes."""
    code = ids - first_speech
    chosen = (code >= 0) & (code < CODES) & (torch.rand(ids.shape, device=ids.device) < share)
    power = 3 ** torch.randint(0, 8, ids.shape, device=ids.device)
    digit = code // power % 3
    other = (digit + torch.randint(1, 3, ids.shape, device=ids.device)) % 3
    return torch.where(chosen, ids + (other - digit) * power, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, time_limit=420, learning_rate=1.5e-3, batch=64)
    parser.add_argument("--speech-tokenizer", type=Path, required=True, help="checkpoint of stage a")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder that text_vocabulary.py wrote")
    parser.add_argument("--workers", type=int, default=8, help="processes that make documents")
    arguments = parser.parse_args()
    device = setup(arguments)
    speech = Speech(arguments.corpus, arguments.kit, device)
    sentences = load_sentences(speech, arguments.speech_tokenizer, arguments.vocabulary)
    unseen = Speech(arguments.corpus[:1], arguments.kit, device, held_out=True, limit=600)
    checks = load_sentences(unseen, arguments.speech_tokenizer, arguments.vocabulary) if len(unseen) else None
    hours = speech.hours
    del speech, unseen
    stage = Stage(arguments.vocabulary).to(device)
    average = Average(stage)
    matrices = [p for p in stage.parameters() if p.ndim > 1]
    vectors = [p for p in stage.parameters() if p.ndim <= 1]
    optimizer = adamw(matrices, arguments.learning_rate, weight_decay=0.05)
    optimizer.add_param_group({"params": vectors, "weight_decay": 0.0, "lr": arguments.learning_rate})
    run = Run(arguments, {"model": stage, "average": average, "optimizer": optimizer}, [optimizer])

    def losses(**batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return stage(**batch)

    differentiated = Differentiated(losses, stage, eager=arguments.eager)
    seed = (run.first_step + arguments.seed) * world_size() + (device.index or 0)
    loader = DataLoader(
        Documents(sentences, seed), arguments.batch, num_workers=arguments.workers, pin_memory=device.type == "cuda"
    )
    readings = Readings(arguments.kit, arguments.vocabulary, device)
    check_batch = next(iter(DataLoader(Documents(checks, 0), arguments.batch))) if checks else None
    if is_main():
        size = sum(parameter.numel() for parameter in stage.lm.parameters())
        print(f"{hours:.1f} h, speech LM of {size / 1e6:.2f} M", flush=True)
    batches = iter(loader)
    first_speech = sentences.text_size + 2
    for step in run:
        ids, targets, labels, document = (part.to(device, non_blocking=True) for part in next(batches))
        ids = perturb(ids, first_speech, 0.08)
        values = differentiated(ids=ids, targets=targets, labels=labels, document=document)
        if step % 2 == 0:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                reading = stage.read(*readings.draw(READ))
            (0.5 * reading).backward()
            run.log(reading=reading)
        run.step(optimizer)
        average.update(step)
        run.log(**values)
        if check_batch and step % 500 == 499 and is_main():
            report_check(stage.eval(), check_batch, device)
            stage.train()


@torch.no_grad()
def report_check(stage: Stage, batch: list[Tensor], device: torch.device) -> None:
    """Print the losses on speakers and sentences that are not trained on."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        values = stage(*(part.to(device) for part in batch))
    print(json.dumps({"held_out": {name: round(float(value), 4) for name, value in values.items()}}), flush=True)


if __name__ == "__main__":
    main()
