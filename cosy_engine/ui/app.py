"""The page: a text, four ways to choose a voice, and what comes out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.routing import Route

from cosy_engine.checkpoint.default import is_embedded, is_standin
from cosy_engine.engine import Engine
from cosy_engine.serving.access import Access
from cosy_engine.serving.guard import MEGABYTE, Guard
from cosy_engine.ui import cross_lingual, instruct, saved_speakers, zero_shot
from cosy_engine.ui.common import PRIVATE, message, note_of
from cosy_engine.ui.examples import PROMPTS
from cosy_engine.ui.player import START_JS, STOP_JS, player
from cosy_engine.ui.run import PAGE_HEARTBEAT, Output, Running, generator, noter, stopper
from cosy_engine.ui.text_box import text_box
from cosy_engine.ui.texts import I18N, both, label
from cosy_engine.ui.transcribe import find_transcriber
from cosy_engine.ui.visitors import key_kept_by_browser, stores_of

logger = logging.getLogger(__name__)

CACHE_SECONDS = (600, 3600)  # look every ten minutes for uploads older than an hour

_SHOW_ERROR = "() => document.querySelector('.note .error')?.scrollIntoView({ block: 'center', behavior: 'smooth' })"

# From the tab that was open to the one that opens: the recording, and what is said in it. Each tab has two fields.
_OPEN = """(before, ...fields) => {
  const [to, tabs] = [%(to)d, %(tabs)s];
  const own = fields.slice(2 * to, 2 * to + 2);
  const from = 2 * tabs.indexOf(before);
  return [tabs[to], ...(fields[from] ? fields.slice(from, from + 2) : own)];
}"""

# A run that was stopped counts as failed with Gradio.
_LOST = """(status) => {
  if (window.livePlayer?.fail() === false) return status;
  return %s[navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"];
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
        with gr.Row(elem_id="head", equal_height=False):
            gr.HTML("<h1>CosyVoice</h1>", padding=False, min_width=0)
            gr.Markdown(label("tagline"), elem_id="tagline", min_width=0)
            gr.HTML(f"<p>{engine.model.name} · {engine.model.device}</p>", elem_id="model", padding=False, min_width=0)
        if is_standin(engine.model.directory):
            gr.Markdown(label("untrained"), elem_id="untrained")
        elif is_embedded(engine.model.directory):
            gr.Markdown(label("embedded"), elem_id="embedded", elem_classes="help")
        with gr.Row(elem_id="main", equal_height=False):
            with gr.Column(scale=3, min_width=320):
                with gr.Column(elem_id="say"):
                    text, text_note = text_box()
                with gr.Tabs() as tabs_area:
                    tabs = [
                        zero_shot.build(engine, text, transcriber),
                        cross_lingual.build(engine, text),
                        instruct.build(engine, text),
                        saved_speakers.build(engine, page, text, transcriber, visitor, store_of, shared_voices),
                    ]
                with gr.Accordion(label("help"), open=False, elem_id="help"):
                    gr.Markdown(label("help_text" if engine.model.continues_recordings else "help_text_timbre"))
            with gr.Column(scale=2, min_width=320, elem_id="output"):
                with gr.Column(elem_id="go"):
                    with gr.Row():
                        generate = gr.Button(label("generate"), variant="primary", scale=3, elem_id="generate")
                        stop = gr.Button(label("stop"), scale=1, min_width=80, elem_id="stop")
                    status = gr.HTML(elem_id="status", padding=False)
                live = player(engine.model.sample_rate)
                with gr.Group():
                    speed = gr.Slider(0.5, 2.0, 1.0, step=0.05, label=label("speed"), elem_id="speed")
                    seed = gr.Textbox(label=label("seed"), placeholder=label("seed_hint"), max_lines=1, elem_id="seed")
                    seed_note = note_of(seed)
                    use_again = gr.Button(visible=False, size="sm", elem_id="seed-again")
                    stream = gr.Checkbox(label=label("stream"), value=True, elem_id="stream")
                with gr.Accordion(label("advanced"), open=False, elem_id="advanced"):
                    text_frontend = gr.Checkbox(
                        label=label("text_frontend"), info=label("text_frontend_help"), value=True, elem_id="frontend"
                    )
        job = gr.Textbox(visible="hidden")
        last_seed = gr.Textbox(visible="hidden")
        active = gr.Textbox(tabs[0].id, visible="hidden")

        alive = gr.Timer(PAGE_HEARTBEAT, active=False)

        recordings = [field for tab in tabs for field in tab.recording]
        for number, (tab, area) in enumerate(zip(tabs, tabs_area.children, strict=True)):
            opening = _OPEN % {"to": number, "tabs": [tab.id for tab in tabs]}
            area.select(None, [active, *recordings], [active, *tab.recording], js=opening, **PRIVATE)
            audio, words = tab.recording
            audio.clear(None, None, words, js="() => ''", **PRIVATE)
        output = Output(live, status, last_seed, use_again, alive)
        notes = {"text": text_note, "seed": seed_note}
        inputs = [speed, seed, stream, text_frontend, *(component for tab in tabs for component in tab.inputs)]
        running = Running()
        run = {
            "fn": generator(engine, tabs, notes, output, running),
            "outputs": [*output.components, *notes.values(), *(note for tab in tabs for note in tab.notes.values())],
            "js": START_JS,
            "concurrency_limit": None,  # the engine has its own queue
            "concurrency_id": "speak",
            **PRIVATE,
        }
        said = json.dumps(both("file_too_large", "file_no_recording", "source_upload", "source_microphone"))
        own_part = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
        page.load(None, js=f"() => ({own_part})({said}, {engine.settings.max_upload_mb})", **PRIVATE)
        page.load(None, None, text, js="() => sessionStorage.getItem('text') ?? ''", **PRIVATE)
        saved = tabs[-1]
        runs = [
            gr.on([generate.click, text.submit], inputs=[job, active, text, *inputs], **run),
            saved.preview.click(inputs=[job, gr.State(saved.id), gr.State(None), *inputs], **run),
        ]
        lost = {language: message(texts["lost"], error=True) for language, texts in both("lost").items()}
        for started in runs:
            started.then(None, js=_SHOW_ERROR, **PRIVATE)
            started.failure(None, status, status, js=_LOST % json.dumps(lost), **PRIVATE)
        alive.tick(noter(running), concurrency_limit=None, **PRIVATE)
        stop.click(None, js=STOP_JS, **PRIVATE)  # at once; the next waits for the server
        stopping = stop.click(None, cancels=runs, **PRIVATE)
        stopping.then(stopper(running), None, [status, alive], **PRIVATE)  # a late line of the run would stay
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
        allowed_paths=[str(PROMPTS)],  # wherever the server is started
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
