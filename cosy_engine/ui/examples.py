"""Texts to try, one click each: they fill the fields in, and play as soon as there is a voice."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from cosy_engine.text.instructions import Instructions
from cosy_engine.text.normalize import Language, language_of
from cosy_engine.ui.common import PRIVATE
from cosy_engine.ui.texts import label

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts"  # recordings, each with its words in a .txt

_PLAY = "(voice) => { if (voice) document.getElementById('generate').click(); }"


_PROMPT_OF: dict[Language, str] = {"en": "emma", "zh": "xiaoxiao"}


@dataclass(frozen=True)
class Example:
    """`prompt` names the shipped recording that speaks it, if it is not that of the text's language; `label` is on its
    button, if that is not all of it."""

    text: str
    instruct: str = ""
    prompt: str = ""
    label: str = ""

    @property
    def recording(self) -> Path:
        return PROMPTS / f"{self.prompt or _PROMPT_OF[language_of(self.text)]}.wav"


EXAMPLES: dict[str, list[Example]] = {
    "zero_shot": [
        Example("Good morning! The first train leaves at 8:45."),
        Example("早上好！今天天气不错，我们出去走走吧。"),
        Example("这个 project 下周一上线，大家辛苦了！", prompt="yunxi"),
    ],
    "cross_lingual": [
        Example("After the rain, the garden smelled of earth.", prompt="xiaobei"),
        Example("下了一夜的雨，清晨的花园里满是泥土的气息。", prompt="michael"),
    ],
    "instruct": [
        Example("The snow kept falling.", "Speak slowly."),
        Example("Hurry, the shop closes in a minute!", "Speak fast, excited."),
        Example("周末我们一起去爬山吧。", "用四川话说这句话"),
        Example("恭喜你，终于成功了！", "用开心的语气说这句话"),
    ],
    "saved": [
        Example("Welcome back! Shall we go on where we stopped?"),
        Example("欢迎回来！我们接着昨天的内容继续吧。"),
    ],
}


def of_instructions(instructions: Instructions) -> list[Example]:
    """One for each style of speaking that the model has learned, in each language: the same sentence, to compare."""
    return [
        Example(example.text, instruct, label=instruct)
        for example in EXAMPLES["instruct"][::2]
        for instruct in instructions.examples(language_of(example.text)).values()
    ]


@dataclass(frozen=True)
class Buttons:
    """One for each example."""

    examples: list[Example]
    dataset: gr.Dataset

    def fill(
        self,
        text: gr.Textbox,
        voice: gr.components.Component,
        *,
        transcript: gr.Textbox | None = None,
        instruction: gr.Textbox | None = None,
    ) -> None:
        """What a click fills in. If `voice` is an audio field, its recording comes with the example, unless the
        visitor has given one."""
        brings_voice = isinstance(voice, gr.Audio)

        def filled(index: int, given: str | None) -> dict[gr.components.Component, object]:
            example = self.examples[index]
            values: dict[gr.components.Component, object] = {text: example.text}
            if instruction is not None:
                values[instruction] = example.instruct
            if brings_voice and (given is None or _is_shipped(given)):
                values[voice] = str(example.recording)
                if transcript is not None:
                    values[transcript] = example.recording.with_suffix(".txt").read_text(encoding="utf-8").strip()
            return values

        fields = [field for field in (text, instruction, transcript) if field is not None]
        outputs = [*fields, voice] if brings_voice else fields
        filling = self.dataset.click(filled, [self.dataset, voice], outputs, **PRIVATE)
        filling.then(None, voice, None, js=_PLAY, **PRIVATE)


def build(examples: list[Example], *, need_voice: bool = False) -> Buttons:
    """Args:
    need_voice: they do not bring a recording.
    """
    dataset = gr.Dataset(
        label=label("examples_need_voice" if need_voice else "examples"),
        components=[gr.Textbox(visible=False)],
        samples=[[example.text] for example in examples],
        sample_labels=[each.label or " · ".join(filter(None, (each.text, each.instruct))) for each in examples],
        samples_per_page=len(examples),
        type="index",
        elem_classes="examples",
    )
    return Buttons(examples, dataset)


def _is_shipped(path: str) -> bool:
    """Whether a recording is one of those that come with the examples."""
    return any(filecmp.cmp(path, prompt, shallow=False) for prompt in PROMPTS.glob("*.wav"))
