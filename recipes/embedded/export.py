"""Last stage: checkpoints -> a model directory in the published layout.

    python -m recipes.embedded.export --checkpoints DIR --vocabulary CosyVoice-BlankEN --output assets/embedded \
        --prompts assets/prompts

DIR holds speech_tokenizer.pt, speaker_encoder.pt, flow.pt, vocoder.pt and speech_lm.pt. Weights become float16. The two
ONNX files are compared with PyTorch. `prompts/prompts.tsv` (file, name, text) says which recordings become the built-in
voices of spk2info.pt.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from cosy_engine.text.instructions import INSTRUCTIONS_FILE
from recipes.embedded import flow, speech_lm, vocoder
from recipes.embedded.instructions import INSTRUCTIONS
from recipes.embedded.library import load_speaker_encoder, load_tokenizer
from recipes.embedded.networks import CODES
from recipes.embedded.training import load_average

TEXT_MODEL = "CosyVoice-BlankEN"
SAMPLING = {"top_p": 0.8, "top_k": 25, "win_size": 10, "tau_r": 0.8}  # silence repeats one code eight times in ten
PAUSE = 0.3  # seconds; the training cuts the silence after a sentence (data.py), so that the first sound comes soon
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
SMALL = 1000  # ONNX constants with fewer values stay float32


def configuration(text_width: int) -> str:
    """The text of cosyvoice2.yaml."""
    cfm = {"in_channels": 240, "n_spks": 1, "spk_emb_dim": 80}
    lines = [
        "# CosyVoice2's architecture at a small size; written by recipes/embedded/export.py.",
        "sample_rate: 24000",
        f"llm_input_size: {text_width}",
        f"llm_output_size: {text_width}",
        "spk_embed_dim: 192",
        "qwen_pretrain_path: ''",
        "token_frame_rate: 25",
        "token_mel_ratio: 2",
        "chunk_size: 25",
        "num_decoding_left_chunks: -1",
        f"pause_after_text: {PAUSE}",
        "continues_recordings: false",  # after real ones, which it knows little of, the speech LM babbles
        "",
        "llm: !new:cosyvoice.llm.llm.Qwen2LM",
        *_options(
            {
                "llm_input_size": text_width,
                "llm_output_size": text_width,
                "speech_token_size": CODES,
                "length_normalized_loss": True,
                "lsm_weight": 0,
                "mix_ratio": [5, 15],
            },
            1,
        ),
        "    llm: !new:cosyvoice.llm.llm.Qwen2Encoder",
        "        pretrain_path: !ref <qwen_pretrain_path>",
        "    sampling: !name:cosyvoice.utils.common.ras_sampling",
        *_options(SAMPLING, 2),
        "",
        "flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec",
        *_options(
            {
                "input_size": flow.ENCODER["input_size"],
                "output_size": 80,
                "spk_embed_dim": 192,
                "output_type": "mel",
                "vocab_size": CODES,
                "input_frame_rate": 25,
                "only_mask_loss": True,
                "token_mel_ratio": 2,
                "pre_lookahead_len": 3,
            },
            1,
        ),
        "    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder",
        *_options(flow.ENCODER, 2),
        "    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM",
        *_options(cfm, 2),
        "        cfm_params: !new:omegaconf.DictConfig",
        "            content:",
        *_options(flow.CFM, 4),
        "        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder",
        *_options(flow.ESTIMATOR, 3),
        "",
        "hift: !new:cosyvoice.hifigan.generator.HiFTGenerator",
        *_options(vocoder.HIFT, 1),
        "    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
        *_options(vocoder.F0, 2),
        "",
        "feat_extractor: !name:matcha.utils.audio.mel_spectrogram",
        *_options(
            {
                "n_fft": 1920,
                "num_mels": 80,
                "sampling_rate": 24000,
                "hop_size": 480,
                "win_size": 1920,
                "fmin": 0,
                "fmax": 8000,
                "center": False,
            },
            1,
        ),
        "",
        "allowed_special: 'all'",
    ]
    return "\n".join(lines) + "\n"


def _options(options: dict[str, object], depth: int) -> list[str]:
    lines = []
    for name, value in options.items():
        if isinstance(value, dict):
            lines += [f"{'    ' * depth}{name}:", *_options(value, depth + 1)]
        else:
            text = "1.0e-06" if value == 1e-06 else json.dumps(value)
            lines.append(f"{'    ' * depth}{name}: {text}")
    return lines


def half_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict in float16; tensors that share memory still do, and are stored once."""
    made: dict[int, Tensor] = {}
    state = {}
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            if value.data_ptr() not in made:
                made[value.data_ptr()] = value.half().contiguous()
            value = made[value.data_ptr()]
        state[name] = value
    return state


def export_onnx(module: nn.Module, examples: tuple[Tensor, ...], names: list[str], output: str, path: Path) -> None:
    """Write an ONNX file with a free number of frames and float16 weights; inputs as in `examples`."""
    free = {names[0]: {2: "frames"}, output: {1: "codes"}} if len(examples) > 1 else {names[0]: {1: "frames"}}
    torch.onnx.export(
        module,
        examples,
        str(path),
        input_names=names,
        output_names=[output],
        dynamic_axes=free,
        opset_version=17,
        dynamo=False,
    )
    onnx.save(with_half_weights(onnx.load(str(path))), str(path))


def with_half_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store the large constants in float16 and cast them back when the model is loaded."""
    graph = model.graph
    for constant in list(graph.initializer):
        values = numpy_helper.to_array(constant)
        if values.dtype != np.float32 or values.size < SMALL:
            continue
        name = constant.name
        graph.initializer.remove(constant)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        graph.node.insert(0, helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    onnx.checker.check_model(model)
    return model


def check_onnx(module: nn.Module, path: Path, make_inputs: object, *, exact: bool) -> float:
    """The largest difference to PyTorch over several lengths; for codes (`exact`), the share that differs."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    worst = 0.0
    for frames in (37, 100, 333, 1000):
        inputs = make_inputs(frames)
        wanted = module(*inputs).numpy()
        got = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
        assert got.shape == wanted.shape, f"{path.name}: {got.shape} instead of {wanted.shape}"
        difference = np.abs(got.astype(np.float64) - wanted)
        worst = max(worst, float((difference > 0).mean()) if exact else float(difference.max()))
    return worst


def round_to_half(module: nn.Module) -> nn.Module:
    """The module with the values that float16 keeps."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    return module.eval()


def write_directory(checkpoints: Path, vocabulary: Path, output: Path) -> None:
    """Everything but the voices."""
    cpu = torch.device("cpu")
    output.mkdir(parents=True, exist_ok=True)
    text_model = output / TEXT_MODEL
    text_model.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(vocabulary / name, text_model / name)
    lm = load_average(checkpoints / "speech_lm.pt", speech_lm.Stage(vocabulary)).lm
    text_size = lm.llm.model.model.embed_tokens.weight.shape[0]
    (text_model / "config.json").write_text(json.dumps(speech_lm.qwen2_config(text_size), indent=1), encoding="utf-8")
    (output / "cosyvoice2.yaml").write_text(configuration(speech_lm.WIDTH), encoding="utf-8")
    (output / INSTRUCTIONS_FILE).write_text(json.dumps(INSTRUCTIONS, ensure_ascii=False, indent=1), encoding="utf-8")
    parts = {
        "llm.pt": lm,
        "flow.pt": load_average(checkpoints / "flow.pt", flow.Stage()).flow,
        "hift.pt": load_average(checkpoints / "vocoder.pt", vocoder.build_vocoder()),
    }
    for name, module in parts.items():
        torch.save(half_state(module), output / name)
    with torch.no_grad():
        tokenizer = round_to_half(load_tokenizer(checkpoints / "speech_tokenizer.pt", cpu))
        path = output / "speech_tokenizer_v2.onnx"

        def log_mel(frames: int) -> tuple[Tensor, Tensor]:
            return torch.randn(1, 128, frames), torch.tensor([frames], dtype=torch.int32)

        export_onnx(tokenizer, log_mel(200), ["feats", "feats_length"], "indices", path)
        print(f"{path.name}: {check_onnx(tokenizer, path, log_mel, exact=True):.2%} of the codes differ from PyTorch")
        encoder = round_to_half(load_speaker_encoder(checkpoints / "speaker_encoder.pt", cpu))
        path = output / "campplus.onnx"

        def fbank(frames: int) -> tuple[Tensor]:
            return (torch.randn(1, frames, 80),)

        export_onnx(encoder, fbank(200), ["input"], "output", path)
        print(f"{path.name}: largest difference to PyTorch {check_onnx(encoder, path, fbank, exact=False):.2g}")


def write_voices(output: Path, prompts: Path) -> None:
    """spk2info.pt from the recordings that prompts.tsv lists."""
    from cosy_engine.checkpoint.load import load_model
    from cosy_engine.frontend import Frontend
    from cosy_engine.voices.spk2info import write_spk2info
    from cosy_engine.voices.voice import Voice

    model = load_model(output)
    frontend = Frontend(replace(model, continues_recordings=True))  # these are the model's own voices
    voices = {}
    with (prompts / "prompts.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            prompt = frontend.make_prompt(prompts / row["file"], row["text"])
            speaker = Path(row["file"]).stem
            voices[speaker] = Voice(speaker, row["name"], "builtin", prompt, model.fingerprint, "")
    write_spk2info(output / "spk2info.pt", voices)
    print(f"{len(voices)} built-in voices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder that text_vocabulary.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="folder with prompts.tsv and its recordings")
    arguments = parser.parse_args()
    write_directory(arguments.checkpoints, arguments.vocabulary, arguments.output)
    if arguments.prompts:
        write_voices(arguments.output, arguments.prompts)
    sizes = {path.name: path.stat().st_size for path in sorted(arguments.output.rglob("*")) if path.is_file()}
    print(json.dumps(sizes, indent=1), f"{sum(sizes.values()) / 1e6:.2f} MB in all", sep="\n")


if __name__ == "__main__":
    main()
