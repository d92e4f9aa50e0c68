"""Texts to try, one click each: they fill the fields in, and play as soon as there is a voice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from cosy_engine.ui.common import PRIVATE
from cosy_engine.ui.texts import label

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts"  # recordings, each with its words in a .txt

_PLAY = "(voice) => { if (voice) document.getElementById('generate').click(); }"


@dataclass(frozen=True)
class Example:
    text: str
    instruct: str = ""


EXAMPLES: dict[str, list[Example]] = {
    "zero_shot": [
        Example("Good morning! The first train leaves at 8:45."),
        Example("早上好！今天天气不错，我们出去走走吧。"),
        Example("这个 project 下周一上线，大家辛苦了！"),
    ],
    "cross_lingual": [
        Example("After the rain, the garden smelled of earth."),
        Example("下了一夜的雨，清晨的花园里满是泥土的气息。"),
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


def build(
    tab: str,
    text: gr.Textbox,
    voice: gr.components.Component,
    *,
    transcript: gr.Textbox | None = None,
    instruction: gr.Textbox | None = None,
) -> None:
    """Buttons for the examples of a tab. If `voice` is an audio field that is empty, a shipped recording fills it."""
    examples = EXAMPLES[tab]
    prompts = sorted(PROMPTS.glob("*.wav")) if isinstance(voice, gr.Audio) else []
    buttons = gr.Dataset(
        label=label("examples" if prompts else "examples_need_voice"),
        components=[gr.Textbox(visible=False)],
        samples=[[example.text] for example in examples],
        sample_labels=[" · ".join(filter(None, (example.text, example.instruct))) for example in examples],
        type="index",
        elem_classes="examples",
    )

    def fill(index: int, has_voice: object) -> dict[gr.components.Component, object]:
        filled: dict[gr.components.Component, object] = {text: examples[index].text}
        if instruction is not None:
            filled[instruction] = examples[index].instruct
        if prompts and not has_voice:
            prompt = prompts[index % len(prompts)]
            filled[voice] = str(prompt)
            if transcript is not None:
                filled[transcript] = prompt.with_suffix(".txt").read_text(encoding="utf-8").strip()
        return filled

    fields = [field for field in (text, instruction, transcript) if field is not None]
    filling = buttons.click(fill, [buttons, voice], [*fields, *([voice] if prompts else [])], **PRIVATE)
    filling.then(None, voice, None, js=_PLAY, **PRIVATE)
