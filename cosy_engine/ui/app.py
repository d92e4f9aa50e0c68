"""The page: a text, four ways to choose a voice, and what comes out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import gradio as gr

from cosy_engine.checkpoint.default import is_standin
from cosy_engine.engine import Engine, SynthesisRequest
from cosy_engine.errors import InvalidRequestError
from cosy_engine.ui import cross_lingual, instruct, saved_speakers, zero_shot
from cosy_engine.ui.common import PRIVATE, Tab, explain, message, speak
from cosy_engine.ui.texts import I18N, label, say

logger = logging.getLogger(__name__)

MAX_UPLOAD = "30mb"
CACHE_SECONDS = (600, 3600)  # look every ten minutes for uploads and results older than an hour

_Outputs = tuple[object, object, object]  # live player, whole recording, message


def build(engine: Engine) -> gr.Blocks:
    """The page over a running engine; `launch` serves it."""
    can_stream = shutil.which("ffmpeg") is not None  # Gradio's streaming player encodes with it
    with gr.Blocks(title="CosyVoice", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.HTML(f"<h1>CosyVoice</h1><p>{engine.model.name} · {engine.model.device}</p>", elem_id="head", padding=False)
        if is_standin(engine.model.directory):
            gr.Markdown(label("untrained"), elem_id="untrained")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                text = gr.Textbox(
                    label=label("text"), placeholder=label("text_hint"), lines=4, max_lines=12, elem_id="text"
                )
                with gr.Tabs() as tabs_area:
                    tabs = [
                        zero_shot.build(engine),
                        cross_lingual.build(engine),
                        instruct.build(engine),
                        saved_speakers.build(engine, page),
                    ]
            with gr.Column(scale=2, min_width=320, elem_id="output"):
                with gr.Row():
                    generate = gr.Button(label("generate"), variant="primary", scale=3, elem_id="generate")
                    stop = gr.Button(label("stop"), scale=1, min_width=80, elem_id="stop")
                status = gr.HTML(elem_id="status", padding=False)
                live = gr.Audio(
                    label=label("live"),
                    streaming=True,
                    autoplay=True,
                    interactive=False,
                    buttons=[],
                    visible=can_stream,
                    elem_id="live",
                )
                result = gr.Audio(
                    label=label("result"),
                    interactive=False,
                    autoplay=not can_stream,
                    buttons=["download"],
                    elem_id="result",
                )
                with gr.Group():
                    stream = gr.Checkbox(
                        label=label("stream"),
                        info=None if can_stream else label("no_ffmpeg"),
                        value=can_stream,
                        interactive=can_stream,
                        elem_id="stream",
                    )
                    speed = gr.Slider(0.5, 2.0, 1.0, step=0.05, label=label("speed"), elem_id="speed")
                    seed = gr.Textbox(label=label("seed"), placeholder=label("seed_hint"), max_lines=1, elem_id="seed")
        active = gr.Textbox(tabs[0].id, visible="hidden")

        for tab, area in zip(tabs, tabs_area.children, strict=True):
            area.select(None, None, active, js=f"() => '{tab.id}'", **PRIVATE)
        inputs = [component for tab in tabs for component in tab.inputs]
        run = gr.on(
            [generate.click, text.submit],
            _generator(engine, tabs, can_stream),
            [active, text, speed, seed, stream, *inputs],
            [live, result, status],
            concurrency_limit=None,  # the engine has its own queue
            **PRIVATE,
        )
        stop.click(_stopped, None, [live, status], cancels=[run], **PRIVATE)
    return page


def launch(page: gr.Blocks, host: str, port: int, *, block: bool = True) -> None:
    """Serve the page; returns when it is stopped, or at once with `block=False`.

    Raises:
        OSError: the port is taken.
    """
    page.queue(max_size=64)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        i18n=I18N,
        theme=_theme(),
        css_paths=Path(__file__).with_name("style.css"),
        footer_links=["gradio", "settings"],
        run_history=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        share=False,
    )
    logger.info("The page is at %s", page.local_url)
    if block:
        page.block_thread()


def _generator(engine: Engine, tabs: list[Tab], can_stream: bool) -> Callable[..., AsyncIterator[_Outputs]]:
    """What the Generate button does; nothing that goes wrong in it leaves it as an exception."""

    async def generate(
        web: gr.Request, active: str, text: str, speed: float, seed: str, stream: bool, *inputs: object
    ) -> AsyncIterator[_Outputs]:
        try:
            yield gr.skip(), None, message(say(web, "working"))
            fields = await _fields_of(tabs, active, web, inputs)
            request = SynthesisRequest(text=text, speed=speed, seed=_seed(web, seed), stream=stream, **fields)
            async with aclosing(speak(engine, request, web)) as steps:
                async for live, whole, said in steps:
                    yield live if can_stream else gr.skip(), whole, said
        except Exception as error:
            yield gr.skip(), gr.skip(), explain(error, web)

    return generate


async def _fields_of(tabs: list[Tab], active: str, web: gr.Request, inputs: tuple[object, ...]) -> dict[str, object]:
    """What the active tab adds to a request, from the values of all tabs' inputs."""
    for tab in tabs:
        own, inputs = inputs[: len(tab.inputs)], inputs[len(tab.inputs) :]
        if tab.id == active:
            return await tab.fields(web, *own)
    raise ValueError(f"no tab is called {active!r}")


def _seed(web: gr.Request, typed: str) -> int | None:
    if not typed.strip():
        return None
    try:
        return int(typed)
    except ValueError:
        raise InvalidRequestError(say(web, "bad_seed"), param="seed") from None


def _stopped(web: gr.Request) -> tuple[object, str]:
    return None, message(say(web, "stopped"))


def _theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        button_cancel_text_color="#b91c1c",
        button_cancel_text_color_dark="#fca5a5",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
