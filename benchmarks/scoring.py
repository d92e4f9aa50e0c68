"""What a listener would notice first, judged by models that share nothing with the synthesiser: are the words right
(Whisper small, 8 bits), is it the prompt's voice (Resemblyzer), does it sound natural (DNSMOS P.808).

All of them are deterministic: the same sound gets the same scores. Needs the packages of requirements-quality.txt.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cosy_engine.audio.resample import resample
from cosy_engine.text.normalize import Language

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

RATE = 16000  # of everything here
WINDOW = 30  # seconds that Whisper hears; what comes later counts as not said
FAINT = 1e-3  # of full scale; below is no voice
WHISPER = "whisper-small"
PACKAGES = ("cn2an", "librosa", "opencc", "pypinyin", "rapidfuzz", "resemblyzer", "speechmos", "webrtcvad")
FILES = tuple(
    f"{WHISPER}/{name}"
    for name in (
        "onnx/encoder_model_quantized.onnx",
        "onnx/decoder_model_merged_quantized.onnx",
        "tokenizer.json",
        "normalizer.json",
    )
)


@dataclass(frozen=True)
class Errors:
    """Insertions, deletions and substitutions, and how many words, characters or syllables there should be."""

    edits: int
    length: int


@dataclass(frozen=True)
class Heard:
    """What was understood.

    Attributes:
        errors: words of English, characters of Mandarin.
        syllables, tones: of Mandarin, pinyin without and with tones; None for English.
    """

    transcript: str
    errors: Errors
    syllables: Errors | None = None
    tones: Errors | None = None


def check_models(folder: Path | None) -> Path:
    """The folder with the evaluation models.

    Raises:
        SystemExit: it is not given or incomplete, or packages are missing; says what belongs there and how to get it.
    """
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise SystemExit(
            f"The scores need packages that are not installed: {', '.join(absent)}.\n"
            "`make quality` installs them; by hand: pip install --no-deps -r requirements-quality.txt"
        )
    missing = [name for name in FILES if folder is None or not (folder / name).is_file()]
    if not missing:
        return folder
    where = folder or Path("DIR")
    fetched = " ".join(name.removeprefix(f"{WHISPER}/") for name in FILES)
    raise SystemExit(
        f"The scores need Whisper small, which is not {'in ' + str(folder) if folder else 'here'}. "
        f"Missing: {', '.join(missing)}.\n"
        "Fetch it once, 250 MB, and name its folder with --models or in COSY_QUALITY_MODELS:\n"
        f"  hf download Xenova/whisper-small {fetched} --local-dir {where / WHISPER}"
    )


def rate_of(errors: list[Errors]) -> float:
    """Edits a word of all sentences together."""
    return sum(each.edits for each in errors) / max(1, sum(each.length for each in errors))


class Listener:
    """Whisper's transcripts compared with what should have been said.

    Args:
        folder: with the files of `FILES`.
        threads: for Whisper.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        from opencc import OpenCC
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        self._whisper = _Whisper(folder / WHISPER, threads)
        spellings = json.loads((folder / WHISPER / "normalizer.json").read_text(encoding="utf-8"))
        self._english = EnglishTextNormalizer(spellings)
        self._simplified = OpenCC("t2s").convert

    def __call__(self, samples: np.ndarray, rate: int, text: str, language: Language) -> Heard:
        transcript = self._whisper(resample(samples, rate, RATE), language) if len(samples) else ""
        said, heard = self.units(text, language), self.units(transcript, language)
        if language == "en":
            return Heard(transcript, compare(said, heard))
        pinyin = [compare(_pinyin(said, tones), _pinyin(heard, tones)) for tones in (False, True)]
        return Heard(transcript, compare(said, heard), *pinyin)

    def units(self, text: str, language: Language) -> list[str]:
        """English words or Mandarin characters, spelt one way: no case, no punctuation, numbers alike."""
        if language == "en":
            return self._english(text).split()
        import cn2an

        text = self._simplified(text).lower()
        try:
            text = cn2an.transform(text, "an2cn")  # 3 becomes 三
        except ValueError:  # digits that are no number
            pass
        return re.findall(r"[\u4e00-\u9fff0-9a-z]", text)


def compare(said: list[str], heard: list[str]) -> Errors:
    from rapidfuzz.distance import Levenshtein

    return Errors(Levenshtein.distance(said, heard), len(said))


def _pinyin(characters: list[str], tones: bool) -> list[str]:
    from pypinyin import Style, lazy_pinyin

    return lazy_pinyin("".join(characters), style=Style.TONE3 if tones else Style.NORMAL)


class Likeness:
    """Cosine similarity of voices by Resemblyzer."""

    def __init__(self) -> None:
        from resemblyzer import VoiceEncoder

        self._encoder = VoiceEncoder("cpu", verbose=False)

    def embed(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """Float32 [256] of length 1; zeros, which are like nobody, if nothing is loud enough to be a voice."""
        from resemblyzer import preprocess_wav

        if not np.any(np.abs(samples) > FAINT):
            return np.zeros(256, np.float32)
        vector = self._encoder.embed_utterance(preprocess_wav(resample(samples, rate, RATE), RATE))
        return vector / np.linalg.norm(vector)


def naturalness(samples: np.ndarray, rate: int) -> float:
    """DNSMOS P.808, 1 to 5, at a fixed peak level.

    Equal to the p808_mos of `speechmos.dnsmos.run`, which takes twenty times as long as it runs another model too: the
    mean over windows a second apart, short sounds repeated until they fill one.
    """
    from speechmos import dnsmos

    samples = resample(samples, rate, RATE)
    samples = samples * (0.9 / max(1e-6, float(np.abs(samples).max())))
    window = int(dnsmos.INPUT_LENGTH * RATE)
    while len(samples) < window:
        samples = np.append(samples, samples)
    scores = []
    for second in range(int(len(samples) // RATE - dnsmos.INPUT_LENGTH) + 1):
        heard = samples[second * RATE : int((second + dnsmos.INPUT_LENGTH) * RATE)]
        if len(heard) == window:  # rounding makes some a sample shorter; those are left out there
            features = dnsmos.DNSMOS.audio_melspec(None, audio=heard[:-160])
            scores.append(_p808().run(None, {"input_1": features[None].astype(np.float32)})[0])
    return float(np.mean(scores))


@cache
def _p808() -> InferenceSession:
    import onnxruntime
    from speechmos import dnsmos

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = Path(dnsmos.__file__).parent / "dnsmos_models" / "model_v8.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Whisper:
    """Greedy transcripts from the ONNX files of a Whisper model, whose decoder takes and gives keys and values."""

    LONGEST = 200  # tokens
    STUCK = 16  # tokens of only one or two kinds

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from tokenizers import Tokenizer
        from transformers import WhisperFeatureExtractor

        def session(name: str) -> onnxruntime.InferenceSession:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            path = str(folder / "onnx" / name)
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        self._encoder = session("encoder_model_quantized.onnx")
        self._decoder = session("decoder_model_merged_quantized.onnx")
        self._features = WhisperFeatureExtractor()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._end = self._tokenizer.token_to_id("<|endoftext|>")
        self._outputs = [output.name for output in self._decoder.get_outputs()]
        self._nothing = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            for entry in self._decoder.get_inputs()
            if entry.name.startswith("past_key_values")
        }

    def __call__(self, samples: np.ndarray, language: Language) -> str:
        """Samples at 16 kHz to text."""
        mel = self._features(samples[: WINDOW * RATE], sampling_rate=RATE, return_tensors="np").input_features
        states = self._encoder.run(["last_hidden_state"], {"input_features": mel})[0]
        markers = ("<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>")
        ids = [self._tokenizer.token_to_id(marker) for marker in markers]
        past, tokens = self._nothing, []
        while len(tokens) < self.LONGEST:
            inputs = {"input_ids": np.array([ids]), "encoder_hidden_states": states, **past}
            inputs["use_cache_branch"] = np.array([bool(tokens)])
            made = dict(zip(self._outputs, self._decoder.run(None, inputs), strict=True))
            past = {
                name: value if tokens and ".encoder." in name else made[name.replace("past_key_values", "present")]
                for name, value in past.items()  # the encoder's keys and values come only with the first step
            }
            token = int(made["logits"][0, -1].argmax())
            if token == self._end:
                break
            tokens.append(token)
            ids = [token]
            if len(tokens) > self.STUCK and len(set(tokens[-self.STUCK :])) <= 2:
                break
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
