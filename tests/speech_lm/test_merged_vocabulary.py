from __future__ import annotations

import pytest
import torch

from cosy_engine.speech_lm.merged_vocabulary import MergedVocabulary, merged_embedding
from tests.speech_lm.small_lm import CODES, TEXT_VOCABULARY, small_lm


@pytest.mark.parametrize("version", [2, 3])
def test_embedding_a_merged_prompt_gives_the_models_own_prompt(version: int) -> None:
    lm = small_lm(version)
    vocabulary = MergedVocabulary.of(lm)
    text, speech = [0, 5, TEXT_VOCABULARY - 1], [0, 7, CODES - 1]
    embedding = merged_embedding(lm)
    assert embedding.shape[0] == vocabulary.size
    torch.testing.assert_close(
        embedding[vocabulary.prompt(text, speech)][None], lm.prompt(text, speech), atol=0, rtol=0
    )


@pytest.mark.parametrize("version", [2, 3])
def test_what_the_head_emits_is_the_next_input(version: int) -> None:
    lm = small_lm(version)
    vocabulary = MergedVocabulary.of(lm)
    generated = list(range(vocabulary.speech_rows))
    assert len(generated) == lm.llm_decoder.out_features
    torch.testing.assert_close(merged_embedding(lm)[generated][None], lm.embed_speech(generated), atol=0, rtol=0)
    assert vocabulary.stop_ids == generated[CODES:]
    assert lm.eos_token in vocabulary.stop_ids
    assert vocabulary.not_a_number not in generated
