"""Write a complete, tiny, untrained model directory: `python -m tests.standin DIR --layout cosyvoice2|cosyvoice3`.

Everything that a published directory holds is there in its published form - configuration, weights, ONNX models,
tokenizer - with random weights from a seed and small widths, so that the whole engine runs in seconds on a CPU. It
makes noise, not speech.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cosy_engine.checkpoint.build import TEXT_MODEL, build_modules
from cosy_engine.checkpoint.read_yaml import read_config

Layout = Literal["cosyvoice2", "cosyvoice3"]

WIDTH = 64  # of the speech LM, the encoder and the DiT
SPEECH_CODES = 6561
ROOM_FOR_SPECIAL_TOKENS = 293  # as in the published vocabulary: 151936 rows, 151643 tokens

_HEAD = """\
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:numpy.random.seed [1986]
__set_seed3: !apply:torch.manual_seed [1986]
__set_seed4: !apply:torch.cuda.manual_seed_all [1986]

sample_rate: 24000
llm_input_size: 64
llm_output_size: 64
spk_embed_dim: 192
qwen_pretrain_path: ''
token_frame_rate: 25
token_mel_ratio: 2
chunk_size: 25
num_decoding_left_chunks: -1

llm: !new:cosyvoice.llm.llm.{lm_class}
    llm_input_size: !ref <llm_input_size>
    llm_output_size: !ref <llm_output_size>
    speech_token_size: 6561
    length_normalized_loss: True
    lsm_weight: 0
    mix_ratio: [5, 15]
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: 0.8
        top_k: 25
        win_size: 10
        tau_r: 0.1
"""

_FLOW_V2 = """
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: 64
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        output_size: 64
        attention_heads: 2
        linear_units: 128
        num_blocks: 2
        num_up_blocks: 1
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: 64
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [32]
            dropout: 0.0
            attention_head_dim: 16
            n_blocks: 1
            num_mid_blocks: 1
            num_heads: 2
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>
"""

_FLOW_V3 = """
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT
    input_size: 80
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    pre_lookahead_layer: !new:cosyvoice.transformer.upsample_encoder.PreLookaheadLayer
        in_channels: 80
        channels: 64
        pre_lookahead_len: 3
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.DiT.dit.DiT
            dim: 64
            depth: 2
            heads: 2
            dim_head: 32
            ff_mult: 2
            mel_dim: 80
            mu_dim: 80
            spk_dim: 80
            out_channels: 80
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>
"""

_TAIL = """
hift: !new:cosyvoice.hifigan.generator.{hift_class}
    in_channels: 80
    base_channels: 32
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 5, 3]
    upsample_kernel_sizes: [16, 11, 7]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
{hift_extra}    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.{f0_class}
        num_class: 1
        in_channels: 80
        cond_channels: 32

parquet_opener: !name:cosyvoice.dataset.processor.parquet_opener
get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <qwen_pretrain_path>
    skip_special_tokens: True
allowed_special: 'all'
tokenize: !name:cosyvoice.dataset.processor.tokenize
    get_tokenizer: !ref <get_tokenizer>
    allowed_special: !ref <allowed_special>
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: {fmax}
    center: False

data_pipeline: [
    !ref <parquet_opener>,
    !ref <tokenize>,
]
"""

_CONFIGS: dict[Layout, str] = {
    "cosyvoice2": _HEAD.format(lm_class="Qwen2LM")
    + _FLOW_V2
    + _TAIL.format(hift_class="HiFTGenerator", hift_extra="", f0_class="ConvRNNF0Predictor", fmax=8000),
    "cosyvoice3": _HEAD.format(lm_class="CosyVoice3LM")
    + _FLOW_V3
    + _TAIL.format(
        hift_class="CausalHiFTGenerator",
        hift_extra="    conv_pre_look_right: 4\n",
        f0_class="CausalConvRNNF0Predictor",
        fmax="null",
    ),
}


def write_standin(directory: str | Path, layout: Layout, seed: int = 0) -> Path:
    """Write the directory (made if need be) and return it. The same seed gives the same weights."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config_path = directory / f"{layout}.yaml"
    config_path.write_text(_CONFIGS[layout], encoding="utf-8")
    _write_text_model(directory / TEXT_MODEL)
    _write_weights(directory, layout, seed)
    numbers = np.random.default_rng(seed)
    version = layout.removeprefix("cosyvoice")
    onnx.save(_speech_tokenizer(numbers), directory / f"speech_tokenizer_v{version}.onnx")
    onnx.save(_speaker_encoder(numbers), directory / "campplus.onnx")
    return directory


def _write_weights(directory: Path, layout: Layout, seed: int) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        lm, flow, hift = build_modules(read_config(directory / f"{layout}.yaml"), directory)
        _tune_speech_lm(lm)
        _tune_vocoder(hift)
    torch.save(lm.state_dict(), directory / "llm.pt")
    torch.save(flow.state_dict(), directory / "flow.pt")
    prefix = "generator." if layout == "cosyvoice2" else ""  # published files have come with and without
    torch.save({prefix + name: value for name, value in hift.state_dict().items()}, directory / "hift.pt")


def _tune_speech_lm(lm: nn.Module) -> None:
    """Scale the speech LM so that it speaks: varied codes that depend on the text, and an end now and then.

    Channel 0 is the same for every token. Only the special ids look at it, so the end has about the same chance at
    every step and the other special ids have none.
    """
    for name, parameter in lm.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.12 if ".layers." in name else 1.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    embeddings = [module.weight for module in lm.modules() if isinstance(module, nn.Embedding)]
    for weight in embeddings:
        weight[:, 0] = 5.0
    scores = lm.llm_decoder.weight
    scores *= 0.3
    scores[:, 0] = 0.0
    scores[SPEECH_CODES:] = 0.0
    scores[SPEECH_CODES:, 0] = -5.0
    scores[lm.eos_token, 0] = 2.3


def _tune_vocoder(hift: nn.Module) -> None:
    """A voiced pitch that moves around 150 Hz, and an output that is neither faint nor clipped nor off centre."""
    hift.f0_predictor.classifier.weight.mul_(1000.0)
    hift.f0_predictor.classifier.bias.fill_(150.0)
    hift.conv_post.parametrizations.weight.original0.mul_(4.0)
    hift.conv_post.bias[0] = -5.0  # log-magnitude of the constant part


def _write_text_model(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    merges = _merges()
    tokens = [*_byte_characters(), *(left + right for left, right in merges)]
    first_special = len(tokens)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    files = {
        "vocab.json": vocabulary,
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 32768,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "added_tokens_decoder": {
                str(first_special + index): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for index, token in enumerate(special)
            },
        },
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,  # vLLM on a CPU has no heads narrower than 32
            "num_key_value_heads": 1,
            "intermediate_size": 2 * WIDTH,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "vocab_size": first_special + ROOM_FOR_SPECIAL_TOKENS,
            "bos_token_id": first_special,
            "eos_token_id": first_special,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if visible, else U+0100 and up."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _merges() -> list[tuple[str, str]]:
    """One token for each of the 3,755 most common Chinese characters and for each pair of small letters."""
    byte_character = _byte_characters()
    common = bytes(byte for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for byte in (row, cell))
    merges: dict[tuple[str, str], None] = {}
    for character in common.decode("gb2312", errors="ignore") + "，。！？、；：":
        first, second, third = (byte_character[byte] for byte in character.encode())
        merges[first, second] = None
        merges[first + second, third] = None
    letters = "abcdefghijklmnopqrstuvwxyz"
    for left in byte_character[ord(" ")] + letters:
        merges |= dict.fromkeys((left, right) for right in letters)
    return list(merges)


def _speech_tokenizer(numbers: np.random.Generator) -> onnx.ModelProto:
    """Log-mel [1, 128, T] and its length [1] -> codes [1, length / 4], the digits of a code in base 3 (FSQ)."""
    digits = 8
    weight = numbers.normal(size=(digits, 128, 4)).astype(np.float32) / 8
    nodes = [
        helper.make_node("Conv", ["feats", "weight"], ["projected"], kernel_shape=[4], strides=[4], pads=[0, 3]),
        helper.make_node("Tanh", ["projected"], ["bounded"]),
        helper.make_node("Round", ["bounded"], ["rounded"]),
        helper.make_node("Add", ["rounded", "one"], ["digits"]),
        helper.make_node("Mul", ["digits", "powers"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "axis"], ["summed"], keepdims=0),
        helper.make_node("Cast", ["summed"], ["all_codes"], to=TensorProto.INT32),
        helper.make_node("Add", ["feats_length", "three"], ["padded_length"]),
        helper.make_node("Div", ["padded_length", "four"], ["length"]),
        helper.make_node("Slice", ["all_codes", "zero", "length", "axis_int32"], ["codes"]),
    ]
    constants = {
        "weight": weight,
        "one": np.float32(1),
        "powers": (3.0 ** np.arange(digits)).astype(np.float32)[None, :, None],
        "axis": np.array([1]),
        "three": np.int32(3),
        "four": np.int32(4),
        "zero": np.array([0], np.int32),
        "axis_int32": np.array([1], np.int32),
    }
    inputs = [
        helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, 128, "T"]),
        helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
    ]
    return _onnx_model(nodes, inputs, helper.make_tensor_value_info("codes", TensorProto.INT32, [1, "n"]), constants)


def _speaker_encoder(numbers: np.random.Generator) -> onnx.ModelProto:
    """Filter bank [1, T, 80] without its mean -> embedding [1, 192]."""
    nodes = [
        helper.make_node("MatMul", ["input", "widen"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("ReduceMean", ["positive"], ["pooled"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["pooled", "mix"], ["output"]),
    ]
    constants = {
        "widen": numbers.normal(size=(80, 192)).astype(np.float32) / 9,
        "mix": numbers.normal(size=(192, 192)).astype(np.float32) / 14,
    }
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, "T", 80])]
    return _onnx_model(nodes, inputs, helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 192]), constants)


def _onnx_model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "standin", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layout", choices=list(_CONFIGS), default="cosyvoice2")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_standin(arguments.directory, arguments.layout, arguments.seed))


if __name__ == "__main__":
    main()
