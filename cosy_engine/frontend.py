"""Text and recordings to what the speech LM and the flow take."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cosy_engine.audio.decode import Recording, check_prompt, load_audio
from cosy_engine.audio.features import WHISPER_RATE, mel_spectrogram
from cosy_engine.audio.resample import resample
from cosy_engine.audio.speaker_encoder import SpeakerEncoder
from cosy_engine.audio.speech_tokenizer import SpeechTokenizer
from cosy_engine.errors import InvalidAudioError, InvalidRequestError
from cosy_engine.notices import Notice
from cosy_engine.text.instructions import read_instructions
from cosy_engine.text.normalize import clean, is_speakable, language_of, normalize
from cosy_engine.text.special_tokens import END_OF_PROMPT
from cosy_engine.text.split import split_text
from cosy_engine.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from cosy_engine.checkpoint.load import CosyVoiceModel
    from cosy_engine.voices.voice import Voice

Mode = Literal["zero_shot", "cross_lingual", "instruct", "vc"]

MAX_TEXT = 10_000  # characters
MAX_PROMPT_TEXT = 1_000
WIDE_FROM = "\u2e80"  # Chinese, Japanese and Korean characters follow
WIDE_PER_SECOND, OTHER_PER_SECOND = 4.5, 15  # characters
FRAMES_PER_TOKEN = 2

_SYSTEM = "You are a helpful assistant."
_SHORTEST_SOURCE = 0.1  # seconds
_LONGEST_TOLD = 80  # characters of an instruction


@dataclass(frozen=True)
class Prompt:
    """All that a voice is; tensors on the CPU. A voice without a recording has an embedding and no tokens or frames.

    Attributes:
        text: what is said in the recording, normalised; "" if unknown.
        text_token: its ids, int32 [n].
        speech_token: codes of the recording, int32 [m].
        speech_feat: its log-mel, float32 [2m, 80].
        embedding: float32 [192].
    """

    text: str
    text_token: Tensor
    speech_token: Tensor
    speech_feat: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """One piece of text, ready for the speech LM; `prompt` is the flow's."""

    text_token: list[int]
    lm_prompt_text: list[int]
    lm_prompt_speech: list[int]
    prompt: Prompt


class Frontend:
    """The front end of one model. Its methods can be called from several threads.

    Attributes:
        end_of_prompt: id of the marker that CosyVoice3 wants before what is spoken; None for CosyVoice2.
        instructions: those that the model has learned; None if it takes any.
    """

    def __init__(self, model: CosyVoiceModel) -> None:
        self._version = model.name
        self._continues_recordings = model.continues_recordings
        self.instructions = read_instructions(model.directory)
        self._mel = model.mel
        self._tokenizer = TextTokenizer(model.tokenizer_dir, model.name)
        self.end_of_prompt = self._tokenizer.end_of_prompt if model.name == "cosyvoice3" else None
        self._speech_tokenizer = SpeechTokenizer(model.speech_tokenizer_path, model.device)
        self._speaker_encoder = SpeakerEncoder(model.speaker_encoder_path, model.device)

    def make_prompt(self, recording: Recording | str | Path | bytes, text: str = "") -> Prompt:
        """A voice from a recording and what is said in it.

        Raises:
            InvalidAudioError: the recording cannot be decoded, is silent, shorter than 1 s or longer than 30 s.
            InvalidRequestError: the text is too long for any such recording.
        """
        sound = check_prompt(recording if isinstance(recording, Recording) else load_audio(recording))
        samples_16k = resample(sound.samples, sound.sample_rate, WHISPER_RATE)
        samples = torch.from_numpy(resample(sound.samples, sound.sample_rate, self._mel.sampling_rate))
        feat = mel_spectrogram(samples[None], self._mel)[0].T
        token = self._speech_tokenizer(samples_16k)
        count = min(len(feat) // FRAMES_PER_TOKEN, len(token))
        wordless = Prompt(
            text="",
            text_token=torch.zeros(0, dtype=torch.int32),
            speech_token=token[:count].contiguous(),
            speech_feat=feat[: count * FRAMES_PER_TOKEN].contiguous(),
            embedding=self._speaker_encoder(samples_16k),
        )
        return self.with_text(wordless, text)

    def with_text(self, prompt: Prompt, text: str) -> Prompt:
        """The same voice, with what is said in its recording, if the model uses that; quick, unlike `make_prompt`.

        Raises:
            InvalidRequestError: the text is too long for any such recording.
        """
        if len(text) > MAX_PROMPT_TEXT:
            raise InvalidRequestError(
                f"The prompt text has {len(text):,} characters, at most {MAX_PROMPT_TEXT:,} are allowed: "
                "give only what is said in the recording.",
                param="prompt_text",
                code="prompt_text_too_long",
                count=len(text),
                most=MAX_PROMPT_TEXT,
            )
        spoken = normalize(text) if self._continues_recordings else ""
        return replace(prompt, text=spoken, text_token=torch.tensor(self._tokenizer.encode(spoken), dtype=torch.int32))

    def prompt_of(self, voice: Voice) -> Prompt:
        """What a saved or built-in voice speaks like."""
        return (
            voice.prompt if voice.kind == "builtin" or self._continues_recordings else self.with_text(voice.prompt, "")
        )

    def speech_tokens(self, recording: Recording | str | Path | bytes) -> Tensor:
        """Codes int32 [m] of a recording whose voice is to be converted; 25 a second.

        Raises:
            InvalidAudioError: the recording cannot be decoded or is empty.
        """
        sound = recording if isinstance(recording, Recording) else load_audio(recording)
        if sound.seconds < _SHORTEST_SOURCE:
            raise InvalidAudioError(
                f"The recording to convert is {sound.seconds:.2f} s long; it needs at least {_SHORTEST_SOURCE} s.",
                param="source",
            )
        return self._speech_tokenizer(resample(sound.samples, sound.sample_rate, WHISPER_RATE))

    def split(self, text: str, *, text_frontend: bool = True) -> list[str]:
        """Pieces to speak one after the other; there is at least one.

        Args:
            text_frontend: normalise the text and collect its sentences into pieces; otherwise it is only cleaned, and
                cut where it is too long for one piece.

        Raises:
            InvalidRequestError: the text is too long, or there is nothing in it that can be spoken.
        """
        _check_length(len(text))
        spoken = normalize(text) if text_frontend else clean(text).strip()
        pieces = split_text(spoken, lambda piece: len(self._tokenizer.encode(piece)), whole=not text_frontend)
        if not pieces:
            raise _nothing_to_speak()
        return pieces

    async def encode_arriving(self, parts: AsyncIterable[str]) -> AsyncGenerator[int, None]:
        """Ids of a text that arrives part by part: cleaned, but neither normalised nor split.

        Raises:
            InvalidRequestError: it is too long, or there was nothing in it that can be spoken.
        """
        length, speakable = 0, False
        async for part in parts:
            length += len(part)
            _check_length(length)
            part = clean(part)
            speakable = speakable or is_speakable(part)
            for token in self._tokenizer.encode(part):
                yield token
        if not speakable:
            raise _nothing_to_speak()

    def inputs(self, mode: Mode, piece: str, prompt: Prompt, instruct: str = "") -> ModelInputs:
        """What the speech LM gets for one piece of text.

        zero_shot continues the prompt's text and speech, cross_lingual knows nothing of it, instruct has the
        instruction in place of the prompt's text and no speech; vc needs no speech LM. CosyVoice3 wants an
        `<|endofprompt|>` before what is spoken, in every mode. An instruction that the model has not learned is left
        out, see `notices`.

        Raises:
            InvalidRequestError: zero_shot without the text that the model needs, or instruct without an instruction.
        """
        if mode == "vc":
            return ModelInputs([], [], [], prompt)
        prompt_text: list[int] = []
        prompt_speech: list[int] = []
        instruction = self._instruction(instruct) if mode == "instruct" else None
        if mode == "instruct" and instruction is None:
            mode = "zero_shot" if len(prompt.text_token) else "cross_lingual"
        if not (self._continues_recordings or len(prompt.text_token)) and mode == "zero_shot":
            mode = "cross_lingual"
        if mode == "zero_shot":
            prompt_text, prompt_speech = prompt.text_token.tolist(), prompt.speech_token.tolist()
            if prompt_speech and not prompt_text:
                raise InvalidRequestError(
                    "zero_shot needs what is said in the recording: give the prompt text, or use cross_lingual.",
                    param="prompt_text",
                    code="prompt_text_missing",
                )
        elif mode == "instruct":
            prompt_text = self._tokenizer.encode(instruction)
        text = self._tokenizer.encode(piece)
        if self._version == "cosyvoice3" and self._tokenizer.end_of_prompt not in prompt_text + text:
            prefix = self._tokenizer.encode(_SYSTEM + END_OF_PROMPT)
            if mode == "zero_shot":
                prompt_text = prefix + prompt_text
            else:
                text = prefix + text
        return ModelInputs(text, prompt_text, prompt_speech, prompt)

    def notices(self, mode: Mode, instruct: str) -> list[Notice]:
        """What to tell about a request of this mode: that its instruction is not one that the model has learned."""
        if mode != "instruct" or self.instructions is None or self.instructions.find(instruct) is not None:
            return []
        said = clean(instruct).strip()
        said = said if len(said) <= _LONGEST_TOLD else said[:_LONGEST_TOLD] + "…"
        examples = " ".join(self.instructions.examples(language_of(said)).values())
        return [
            Notice(
                f"This model has not learned the instruction “{said}” and speaks without it. It knows: {examples}",
                param="instruct",
                code="instruction_unknown",
                values={"instruct": said, "examples": examples},
            )
        ]

    def _instruction(self, instruct: str) -> str | None:
        """The instruction as the speech LM takes it; None if the model has not learned it."""
        instruct = clean(instruct).strip()
        if not is_speakable(instruct) or len(instruct) > MAX_PROMPT_TEXT:
            raise InvalidRequestError(
                f"Say in 1 to {MAX_PROMPT_TEXT:,} characters how it shall be spoken, for example: speak slowly.",
                param="instruct",
                code="bad_instruction",
                most=MAX_PROMPT_TEXT,
            )
        if self.instructions is not None:
            instruct = self.instructions.find(instruct)
            if instruct is None:
                return None
        if END_OF_PROMPT in instruct:
            return instruct
        return f"{_SYSTEM} {instruct}{END_OF_PROMPT}" if self._version == "cosyvoice3" else instruct + END_OF_PROMPT


def _check_length(characters: int) -> None:
    if characters > MAX_TEXT:
        raise InvalidRequestError(
            f"The text has {characters:,} characters, at most {MAX_TEXT:,} are allowed: send it in parts.",
            param="text",
            code="text_too_long",
            count=characters,
            most=MAX_TEXT,
        )


def _nothing_to_speak() -> InvalidRequestError:
    return InvalidRequestError(
        "The text is empty or has only punctuation: give some words to speak.", param="text", code="text_empty"
    )


def estimate_seconds(text: str) -> float:
    """About how long it takes to say `text`: 4.5 Chinese characters or 15 other letters a second."""
    wide = sum(character >= WIDE_FROM for character in text)
    return wide / WIDE_PER_SECOND + (len(text) - wide) / OTHER_PER_SECOND
