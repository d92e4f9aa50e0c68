"""The page: a text, four ways to choose a voice, and what comes out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.routing import Route

from cosy_engine.checkpoint.default import is_standin
from cosy_engine.engine import Engine
from cosy_engine.serving.access import Access
from cosy_engine.serving.guard import MEGABYTE, Guard
from cosy_engine.ui import cross_lingual, instruct, saved_speakers, zero_shot
from cosy_engine.ui.common import PRIVATE, note_of
from cosy_engine.ui.player import START_JS, STOP_JS, player
from cosy_engine.ui.run import Output, generator, stopper
from cosy_engine.ui.text_box import text_box
from cosy_engine.ui.texts import I18N, label
from cosy_engine.ui.transcribe import find_transcriber
from cosy_engine.ui.visitors import key_kept_by_browser, stores_of

logger = logging.getLogger(__name__)

CACHE_SECONDS = (600, 3600)  # look every ten minutes for uploads and results older than an hour
SHOW_ERROR = "() => document.querySelector('.note .error')?.scrollIntoView({ block: 'center', behavior: 'smooth' })"

# Clicks that follow at once would each start a run, for Gradio learns only a moment later that one is going on.
ONE_CLICK_A_TIME = """() => {
  let last = -Infinity;
  document.addEventListener("click", (click) => {
    if (click.target.closest("#stop")) last = -Infinity;
    if (!click.target.closest("#generate, #preview")) return;
    if (click.timeStamp - last < 150) click.stopImmediatePropagation();
    else last = click.timeStamp;
  }, true);
}"""


def build(engine: Engine, *, shared_voices: bool = False) -> gr.Blocks:
    """The page over a running engine; `launch` serves it.

    Args:
        shared_voices: all visitors have the same saved voices, those of `engine.voices`; else each has their own.
    """
    transcriber = find_transcriber()
    store_of = stores_of(engine, shared_voices)
    with gr.Blocks(title="CosyVoice", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        visitor = key_kept_by_browser()
        gr.HTML(f"<h1>CosyVoice</h1><p>{engine.model.name} · {engine.model.device}</p>", elem_id="head", padding=False)
        if is_standin(engine.model.directory):
            gr.Markdown(label("untrained"), elem_id="untrained")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                text, text_note = text_box()
                with gr.Tabs() as tabs_area:
                    tabs = [
                        zero_shot.build(engine, text, transcriber),
                        cross_lingual.build(engine, text),
                        instruct.build(engine, text),
                        saved_speakers.build(engine, page, text, transcriber, visitor, store_of, shared_voices),
                    ]
                with gr.Accordion(label("help"), open=False, elem_id="help"):
                    gr.Markdown(label("help_text"))
            with gr.Column(scale=2, min_width=320, elem_id="output"):
                with gr.Row():
                    generate = gr.Button(label("generate"), variant="primary", scale=3, elem_id="generate")
                    stop = gr.Button(label("stop"), scale=1, min_width=80, elem_id="stop")
                status = gr.HTML(elem_id="status", padding=False)
                live = player(engine.model.sample_rate)
                result = gr.Audio(
                    label=label("result"), interactive=False, buttons=["download"], visible=False, elem_id="result"
                )
                with gr.Group():
                    stream = gr.Checkbox(label=label("stream"), value=True, elem_id="stream")
                    speed = gr.Slider(0.5, 2.0, 1.0, step=0.05, label=label("speed"), elem_id="speed")
                    seed = gr.Textbox(label=label("seed"), placeholder=label("seed_hint"), max_lines=1, elem_id="seed")
                    seed_note = note_of(seed)
                    use_again = gr.Button(label("seed_again"), interactive=False, size="sm", elem_id="seed-again")
                with gr.Accordion(label("advanced"), open=False, elem_id="advanced"):
                    text_frontend = gr.Checkbox(
                        label=label("text_frontend"), info=label("text_frontend_help"), value=True, elem_id="frontend"
                    )
        job = gr.Textbox(visible="hidden")
        last_seed = gr.Textbox(visible="hidden")
        active = gr.Textbox(tabs[0].id, visible="hidden")

        for tab, area in zip(tabs, tabs_area.children, strict=True):
            area.select(None, None, active, js=f"() => '{tab.id}'", **PRIVATE)
        output = Output(live, result, status, last_seed, use_again)
        notes = {"text": text_note, "seed": seed_note}
        inputs = [speed, seed, stream, text_frontend, *(component for tab in tabs for component in tab.inputs)]
        running: dict[str, object] = {}
        run = {
            "fn": generator(engine, tabs, notes, output, running),
            "outputs": [*output.components, *notes.values(), *(note for tab in tabs for note in tab.notes.values())],
            "js": START_JS,
            "concurrency_limit": None,  # the engine has its own queue
            "concurrency_id": "speak",
            **PRIVATE,
        }
        page.load(None, js=ONE_CLICK_A_TIME, **PRIVATE)
        saved = tabs[-1]
        runs = [
            gr.on([generate.click, text.submit], inputs=[job, active, text, *inputs], **run),
            saved.preview.click(inputs=[job, gr.State(saved.id), gr.State(None), *inputs], **run),
        ]
        for started in runs:
            started.then(None, js=SHOW_ERROR, **PRIVATE)
            started.failure(None, js=STOP_JS, **PRIVATE)
        stop.click(None, js=STOP_JS, **PRIVATE)  # at once; the next waits for the server
        stopping = stop.click(None, cancels=runs, **PRIVATE)
        stopping.then(stopper(running), None, status, **PRIVATE)  # not before: a late line of the run would stay
        use_again.click(None, last_seed, seed, js="(seed) => seed", **PRIVATE)
    return page


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    *,
    access: Access | None = None,
    routes: Sequence[Route] = (),
    block: bool = True,
) -> None:
    """Serve the page, and `routes` beside it; returns when it is stopped, or at once with `block=False`.

    Raises:
        OSError: the port is taken.
    """
    access = access or Access()
    tls = {}
    if access.tls is not None:
        tls = {
            "ssl_certfile": str(access.tls.certfile),
            "ssl_keyfile": str(access.tls.keyfile),
            "ssl_keyfile_password": access.tls.password,
            "ssl_verify": False,  # Gradio calls itself once, by an address that the certificate need not name
        }
    page.queue(max_size=64, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        i18n=I18N,
        theme=_theme(),
        css_paths=Path(__file__).with_name("style.css"),
        footer_links=["gradio", "settings"],
        auth=list(access.accounts) or None,
        root_path=access.root_path,
        max_file_size=access.max_upload_mb * MEGABYTE,
        blocked_paths=[str(folder.absolute()) for folder in access.private],
        app_kwargs={
            "routes": list(routes),
            "middleware": [Middleware(Guard, max_upload_mb=access.max_upload_mb)],
            "openapi_url": None,
        },
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        share=False,
        **tls,
    )
    logger.info("The page is at %s", page.local_url)
    if block:
        page.block_thread()


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
        button_cancel_text_color_dark="#fecaca",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
