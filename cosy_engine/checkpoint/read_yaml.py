"""Read `cosyvoice2.yaml` / `cosyvoice3.yaml` as data.

The published files are HyperPyYAML: `!new:` and `!name:` name Python classes and functions, `!apply:` calls one,
`!ref` refers to other keys. Here nothing is imported and nothing is called: a known name becomes a `Call` (a record of
the name and its arguments) and everything else that asks for code is refused.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cosy_engine.errors import ModelDirectoryError, UnsafeModelError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000  # after references and aliases are expanded; a published file has about 500
MAX_DEPTH = 40
MAX_NUMBER = 10**15

MODEL_NAMES = frozenset(
    {
        "cosyvoice.llm.llm.Qwen2LM",
        "cosyvoice.llm.llm.CosyVoice3LM",
        "cosyvoice.llm.llm.Qwen2Encoder",
        "cosyvoice.flow.flow.CausalMaskedDiffWithXvec",
        "cosyvoice.flow.flow.CausalMaskedDiffWithDiT",
        "cosyvoice.flow.flow_matching.CausalConditionalCFM",
        "cosyvoice.flow.decoder.ConditionalDecoder",
        "cosyvoice.flow.decoder.CausalConditionalDecoder",
        "cosyvoice.flow.DiT.dit.DiT",
        "cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder",
        "cosyvoice.transformer.upsample_encoder.PreLookaheadLayer",
        "cosyvoice.hifigan.generator.HiFTGenerator",
        "cosyvoice.hifigan.generator.CausalHiFTGenerator",
        "cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
        "cosyvoice.hifigan.f0_predictor.CausalConvRNNF0Predictor",
    }
)
SETTING_NAMES = frozenset({"cosyvoice.utils.common.ras_sampling", "matcha.utils.audio.mel_spectrogram"})
TRAINING_NAMES = frozenset(
    {
        "cosyvoice.hifigan.hifigan.HiFiGan",
        "cosyvoice.hifigan.discriminator.MultipleDiscriminator",
        "cosyvoice.hifigan.discriminator.MultiResSpecDiscriminator",
        "cosyvoice.hifigan.discriminator.MultiResolutionDiscriminator",
        "matcha.hifigan.models.MultiPeriodDiscriminator",
        "cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer",
        *(
            f"cosyvoice.dataset.processor.{function}"
            for function in (
                "parquet_opener tokenize filter resample truncate compute_fbank compute_whisper_fbank compute_f0 "
                "parse_embedding shuffle sort batch padding"
            ).split()
        ),
    }
)
KNOWN_NAMES = MODEL_NAMES | SETTING_NAMES | TRAINING_NAMES
PLAIN_MAPPING = "omegaconf.DictConfig"  # `content:` holds an ordinary mapping
SEEDS = frozenset({"random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed_all"})


@dataclass(frozen=True)
class Call:
    """A class or function that the file names, with its arguments. Nothing more than a record."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; plain scalars are resolved by YAML 1.2's core schema (so `1e-06` is a number)."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_CORE = "tag:yaml.org,2002:"
_Loader.add_implicit_resolver(f"{_CORE}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_CORE}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_CORE}int", re.compile(r"^[-+]?[0-9]{1,15}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_CORE}float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,3})?$"),
    list("-+.0123456789"),
)

_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_CORE}null": lambda text: None,
    f"{_CORE}bool": lambda text: text.lower() == "true",
    f"{_CORE}int": int,
    f"{_CORE}float": float,
    f"{_CORE}str": str,
}

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def read_config(path: Path) -> dict[str, Any]:
    """The file's keys in order: plain data, and `Call` records where it names a known class or function.

    Calls of the four seeds become the list of their arguments and `omegaconf.DictConfig` its content.

    Raises:
        UnsafeModelError: the file names anything else; nothing of it was run.
        ModelDirectoryError: not a readable file of this dialect, or far larger than any published one.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ModelDirectoryError(
                f"{path.name} is larger than {MAX_BYTES // 1024} KiB; this is no model configuration."
            )
        root = yaml.compose(raw.decode("utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelDirectoryError(f"{path.name} is not readable YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ModelDirectoryError(f"{path.name} is nested too deeply.") from None
    if not isinstance(root, yaml.MappingNode):
        raise ModelDirectoryError(f"{path.name} must hold keys and values.")
    return _Reader(path.name, root).read()


class _Reader:
    """Turns the node tree of one file into data, resolving references to its top-level keys."""

    def __init__(self, file_name: str, root: yaml.MappingNode) -> None:
        self.file_name = file_name
        self.root = root
        self.top_level: dict[str, yaml.Node] = {}
        self.nodes_left = MAX_NODES

    def read(self) -> dict[str, Any]:
        if self.root.tag != f"{_CORE}map":
            raise self.refused(self.root, f"the tag `{self.root.tag}`")
        for key, node in self.items(self.root):
            self.top_level[key] = node
        return {key: self.value(node, (key,)) for key, node in self.top_level.items()}

    def value(self, node: yaml.Node, trail: tuple[str, ...]) -> Any:
        """The node as data. `trail` holds the keys being resolved on the way here."""
        self.nodes_left -= 1
        if self.nodes_left < 0 or len(trail) > MAX_DEPTH:
            raise ModelDirectoryError(f"{self.file_name} expands to more than a model configuration ever holds.")
        tag, _, name = node.tag.partition(":")
        if tag in ("!new", "!name"):
            return self.call(node, name, trail)
        if tag == "!apply":
            return self.seed(node, name, trail)
        if node.tag == "!ref" and isinstance(node, yaml.ScalarNode):
            return self.reference(node, trail)
        if node.tag == f"{_CORE}map" and isinstance(node, yaml.MappingNode):
            return self.mapping(node, trail)
        if node.tag == f"{_CORE}seq" and isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*trail, "")) for item in node.value]
        if node.tag in _SCALARS and isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        raise self.refused(node, f"the tag `{node.tag}`")

    def items(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
        keys: list[str] = []
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _SCALARS:
                raise self.refused(key_node, f"a key with the tag `{key_node.tag}`")
            if key_node.value in keys:
                raise self.wrong(key_node, f"the key `{key_node.value}` comes twice")
            keys.append(key_node.value)
        return list(zip(keys, (value for _, value in node.value), strict=True))

    def mapping(self, node: yaml.MappingNode, trail: tuple[str, ...]) -> dict[str, Any]:
        return {key: self.value(item, (*trail, "")) for key, item in self.items(node)}

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return _SCALARS[node.tag](node.value)
        except ValueError:
            raise self.wrong(node, f"`{node.value[:40]}` is not a {node.tag.removeprefix(_CORE)}") from None

    def call(self, node: yaml.Node, name: str, trail: tuple[str, ...]) -> Any:
        if name not in KNOWN_NAMES and name != PLAIN_MAPPING:
            raise self.refused(node, f"`{name}`")
        if isinstance(node, yaml.MappingNode):
            kwargs = self.mapping(node, trail)
        elif isinstance(node, yaml.ScalarNode) and not node.value:
            kwargs = {}
        else:
            raise self.wrong(node, f"`{name}` takes named arguments only")
        if name != PLAIN_MAPPING:
            return Call(name, kwargs)
        content = kwargs.get("content")
        if set(kwargs) != {"content"} or not isinstance(content, dict):
            raise self.wrong(node, f"`{name}` needs `content:` and nothing else")
        return content

    def seed(self, node: yaml.Node, name: str, trail: tuple[str, ...]) -> list[Any]:
        if name not in SEEDS:
            raise self.refused(node, f"a call of `{name}`")
        if not isinstance(node, yaml.SequenceNode):
            raise self.wrong(node, f"`{name}` takes a list with one number")
        return [self.value(item, (*trail, "")) for item in node.value]

    def reference(self, node: yaml.ScalarNode, trail: tuple[str, ...]) -> Any:
        """`<key>` is that key's value, whatever it is; anything longer is arithmetic on numbers."""
        whole = re.fullmatch(r"\s*<([^<>]+)>\s*", node.value)
        if whole:
            return self.lookup(node, whole.group(1), trail)

        def number(match: re.Match[str]) -> str:
            value = self.lookup(node, match.group(1), trail)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self.wrong(node, f"`<{match.group(1)}>` is not a number")
            return f"({value!r})"

        expression = re.sub(r"<([^<>]+)>", number, node.value).strip()
        try:
            return _evaluate(ast.parse(expression, mode="eval").body)
        except (ArithmeticError, MemoryError, RecursionError, SyntaxError, ValueError):
            raise self.wrong(node, f"`{node.value[:60]}` is not arithmetic on numbers (+ - * / // %)") from None

    def lookup(self, node: yaml.Node, key: str, trail: tuple[str, ...]) -> Any:
        if key not in self.top_level:
            raise self.wrong(node, f"`<{key}>` refers to no key of this file")
        if key in trail:
            raise self.wrong(node, f"`<{key}>` refers to itself")
        return self.value(self.top_level[key], (*trail, key))

    def refused(self, node: yaml.Node, what: str) -> UnsafeModelError:
        return UnsafeModelError(
            f"{self.file_name}, line {node.start_mark.line + 1}: {what} is not on the list of what CosyVoice2 and "
            "CosyVoice3 configurations name. The directory is refused and nothing of it was run."
        )

    def wrong(self, node: yaml.Node, what: str) -> ModelDirectoryError:
        return ModelDirectoryError(f"{self.file_name}, line {node.start_mark.line + 1}: {what}.")


def _evaluate(node: ast.expr) -> int | float:
    """Arithmetic on number literals.

    Raises:
        ValueError: anything else, or a result beyond `MAX_NUMBER`.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        result = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        result = _evaluate(node.operand)
        result = -result if isinstance(node.op, ast.USub) else result
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        result = _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    else:
        raise ValueError("not arithmetic")
    if not abs(result) <= MAX_NUMBER:
        raise ValueError("out of range")
    return result
