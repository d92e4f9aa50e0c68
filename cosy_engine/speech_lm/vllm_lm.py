"""The speech LM on vLLM: continuous batching, many requests at once."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

from cosy_engine.config import VllmSettings
from cosy_engine.errors import InvalidRequestError
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import SpeechCodeLM, split_instruction, take
from cosy_engine.speech_lm.merged_vocabulary import MergedVocabulary
from cosy_engine.speech_lm.vllm_engine import Generation, VllmEngine
from cosy_engine.speech_lm.vllm_plugin import ras_argument


class VllmSpeechLM:
    """`SpeechLM` on vLLM.

    A request draws the same random numbers as on PyTorch, so it gives the same codes as there, but where the scores'
    rounding decides. That also holds for text streaming: each block is a request of its own that continues the one
    before, whose keys and values the prefix cache still has.

    Args:
        lm: the model, of which only the sizes are used: its weights need not be there.
        export: the same model, written by `vllm_export`.
        end_of_prompt: id of `<|endofprompt|>` in CosyVoice3, where text streaming has to know it.

    Raises:
        BackendUnavailableError: vLLM is not there, or does not start with these settings.
    """

    name = "vllm"

    def __init__(
        self, lm: SpeechCodeLM, export: Path, settings: VllmSettings, *, end_of_prompt: int | None = None
    ) -> None:
        self._vocabulary = MergedVocabulary.of(lm)
        self._mix_ratio = lm.mix_ratio
        self._end_of_prompt = end_of_prompt
        self._longest = settings.args.get("max_model_len", settings.max_model_len)
        warm_up = self._generation(SpeechLMRequest([0]), self._vocabulary.prompt([0], []), [], (4, 4))
        self.engine = VllmEngine(export, settings, self._vocabulary.not_a_number, warm_up)

    async def generate(self, request: SpeechLMRequest) -> AsyncGenerator[int, None]:
        """Speech codes for `request.text`, as they are generated.

        After `request.first` of them the request ends; whoever wants more begins another one that continues it, whose
        keys and values are mostly there.
        """
        sequence = self._vocabulary.prompt(request.prompt_text + request.text, request.prompt_speech)
        decoded: list[int] = []
        fewest, most = request.length_limits(len(request.text))
        for until in (most,) if request.first is None else (min(request.first, most), most):
            async with aclosing(self._codes(request, sequence, decoded, (fewest, until))) as codes:
                async for code in codes:
                    yield code
            if len(decoded) < until or len(sequence) >= self._longest:
                return

    async def generate_bistream(self, request: SpeechLMRequest, text: AsyncIterator[int]) -> AsyncGenerator[int, None]:
        """Speech codes for `request.text` and what arrives from `text`, in the blocks of `decoding.bistream`."""
        ids = self._vocabulary
        words_a_block, codes_a_block = self._mix_ratio
        instruction, prompt_text = split_instruction(request.prompt_text, self._end_of_prompt)
        waiting, prompt_speech = deque([*prompt_text, *request.text]), deque(request.prompt_speech)
        sequence = [ids.sos, *ids.text(instruction)]
        decoded: list[int] = []
        text_tokens = len(request.text)
        arriving = aiter(text)
        while True:
            while len(waiting) < words_a_block and (token := await anext(arriving, None)) is not None:
                waiting.append(token)
                text_tokens += 1
            if len(waiting) < words_a_block:
                break
            given = take(prompt_speech, codes_a_block)
            sequence += [*ids.text(take(waiting, words_a_block)), *given]
            until = len(decoded) + codes_a_block - len(given)
            async with aclosing(self._codes(request, sequence, decoded, (until, until))) as codes:
                async for code in codes:
                    yield code
        sequence += [*ids.text(waiting), ids.task, *prompt_speech]
        async with aclosing(self._codes(request, sequence, decoded, request.length_limits(text_tokens))) as codes:
            async for code in codes:
                yield code

    def close(self) -> None:
        """End vLLM's processes; every open iterator raises EngineStoppedError."""
        self.engine.close()

    async def _codes(
        self, request: SpeechLMRequest, sequence: list[int], decoded: list[int], limits: tuple[int, int]
    ) -> AsyncGenerator[int, None]:
        """Continue `sequence` until it ends or `decoded` holds as many codes as the limits want; both grow."""
        generation = self._generation(request, sequence, decoded, limits)
        if generation.most <= 0:
            return
        async with aclosing(self.engine.generate(generation)) as tokens:
            async for token in tokens:
                if token >= self._vocabulary.codes:
                    return
                decoded.append(token)
                sequence.append(token)
                yield token

    def _generation(
        self, request: SpeechLMRequest, sequence: list[int], decoded: list[int], limits: tuple[int, int]
    ) -> Generation:
        fewest, most = (limit - len(decoded) for limit in limits)
        room = self._longest - len(sequence)
        if room <= 0:
            raise InvalidRequestError(
                f"Text and prompt together are too long for the speech LM ({len(sequence)} tokens of {self._longest}): "
                "shorten them, or raise max_model_len.",
                param="text",
                code="too_long_together",
            )
        patience = request.patience if decoded else 0.0
        extra = ras_argument(request.sampling, request.seed, decoded, fewest, patience)
        return Generation(list(sequence), min(most, room), self._vocabulary.stop_ids, extra)
