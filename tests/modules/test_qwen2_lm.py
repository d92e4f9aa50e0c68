from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.modules.qwen2_lm import CosyVoice3LM, KVCache, Qwen2Encoder, Qwen2LM

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
}
YAML = {"length_normalized_loss": True, "lsm_weight": 0, "mix_ratio": [5, 15], "sampling": None}


@pytest.fixture
def backbone() -> Qwen2Encoder:
    torch.manual_seed(0)
    encoder = Qwen2Encoder(CONFIG).eval()
    for parameter in encoder.parameters():  # so that biases and norms matter too
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@torch.inference_mode()
def test_backbone_is_transformers_qwen2(backbone: Qwen2Encoder) -> None:
    reference = Qwen2ForCausalLM(Qwen2Config.from_dict(CONFIG)).eval()
    reference.load_state_dict(backbone.model.state_dict(), strict=True)
    embeddings = torch.randn(2, 23, 32)
    torch.testing.assert_close(
        backbone(embeddings), reference.model(inputs_embeds=embeddings).last_hidden_state, atol=1e-4, rtol=1e-4
    )


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [[1] * 300, [290, 1, 1, 8], [7, 255, 1, 37], [256, 44]])
def test_feeding_in_pieces_equals_feeding_at_once(backbone: Qwen2Encoder, pieces: list[int]) -> None:
    embeddings = torch.randn(1, 300, 32)
    cache = KVCache()
    fed = torch.cat([backbone(piece, cache) for piece in embeddings.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(fed, backbone(embeddings), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_later_input_does_not_change_earlier_output(backbone: Qwen2Encoder) -> None:
    embeddings = torch.randn(1, 12, 32)
    other = torch.cat([embeddings[:, :8], torch.randn(1, 4, 32)], dim=1)
    torch.testing.assert_close(backbone(embeddings)[:, :8], backbone(other)[:, :8])
    assert not torch.allclose(backbone(embeddings)[:, 8:], backbone(other)[:, 8:])


@torch.inference_mode()
def test_two_caches_do_not_share(backbone: Qwen2Encoder) -> None:
    first, second = torch.randn(2, 1, 6, 32)
    alone = backbone(first)
    caches = KVCache(), KVCache()
    together = []
    for position in range(6):
        together.append(backbone(first[:, position : position + 1], caches[0]))
        backbone(second[:, position : position + 1], caches[1])
    torch.testing.assert_close(torch.cat(together, dim=1), alone, atol=1e-5, rtol=1e-4)


def test_backbone_reads_only_a_directory_s_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Other"], "torch_dtype": "float32"}))
    (tmp_path / "model.safetensors").write_bytes(b"not a weight file")
    encoder = Qwen2Encoder(pretrain_path=tmp_path)
    assert encoder.model.model.embed_tokens.weight.shape == (60, 32)
    assert encoder.model.lm_head.weight is encoder.model.model.embed_tokens.weight


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}'])
def test_unusable_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelDirectoryError, match="configuration"):
        Qwen2Encoder(tmp_path)


def test_checkpoint_names() -> None:
    two = Qwen2LM(32, 32, 100, Qwen2Encoder(CONFIG), **YAML).state_dict()
    three = CosyVoice3LM(32, 32, 100, Qwen2Encoder(CONFIG), **YAML).state_dict()
    assert {name: tuple(two[name].shape) for name in two if not name.startswith("llm.")} == {
        "llm_embedding.weight": (2, 32),
        "speech_embedding.weight": (103, 32),
        "llm_decoder.weight": (103, 32),
        "llm_decoder.bias": (103,),
    }
    assert {name: tuple(three[name].shape) for name in three if not name.startswith("llm.")} == {
        "speech_embedding.weight": (300, 32),
        "llm_decoder.weight": (300, 32),
    }
    backbone = {name.removeprefix("llm.model.") for name in two if name.startswith("llm.")}
    assert backbone == set(Qwen2ForCausalLM(Qwen2Config.from_dict(CONFIG)).state_dict())


@pytest.mark.parametrize(("lm_class", "millions"), [(Qwen2LM, 505.8), (CosyVoice3LM, 506.1)])
def test_published_size(published_dir: Path, lm_class: type[Qwen2LM | CosyVoice3LM], millions: float) -> None:
    with torch.device("meta"):
        lm = lm_class(896, 896, 6561, Qwen2Encoder(published_dir / "CosyVoice-BlankEN"), **YAML)
    assert sum(parameter.numel() for parameter in lm.parameters()) / 1e6 == pytest.approx(millions, abs=0.051)


@torch.no_grad()
@pytest.mark.parametrize("lm_class", [Qwen2LM, CosyVoice3LM])
def test_loss_is_the_mean_surprise_of_codes_and_end(lm_class: type[Qwen2LM | CosyVoice3LM]) -> None:
    torch.manual_seed(1)
    lm = lm_class(32, 32, 40, Qwen2Encoder(CONFIG), **YAML).eval()
    sequences = [([5, 9, 11], [3, 4, 5, 6]), ([7], [39, 0])]
    surprise = []
    for text, speech in sequences:
        for count, target in enumerate([*speech, lm.eos_token]):
            surprise.append(-lm.next_scores(lm.prompt(text, speech[:count]), KVCache())[0, target])
    loss = lm.loss(
        torch.tensor([[5, 9, 11], [7, 0, 0]]),
        torch.tensor([3, 1]),
        torch.tensor([[3, 4, 5, 6], [39, 0, 2, 2]]),
        torch.tensor([4, 2]),
    )
    torch.testing.assert_close(loss, torch.stack(surprise).mean(), atol=1e-5, rtol=1e-5)


def test_loss_can_be_minimised() -> None:
    torch.manual_seed(2)
    lm = Qwen2LM(32, 32, 20, Qwen2Encoder(CONFIG), **YAML)
    optimizer = torch.optim.Adam(lm.parameters(), lr=1e-2)
    batch = torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([[4, 5, 6, 7, 8]]), torch.tensor([5])
    for _ in range(60):
        optimizer.zero_grad()
        loss = lm.loss(*batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
