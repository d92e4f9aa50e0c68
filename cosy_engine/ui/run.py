"""One run: from the Generate button to the line that sums it up."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import gradio as gr
import numpy as np

from cosy_engine.audio.encode import pcm16
from cosy_engine.engine import Engine, Synthesis, SynthesisRequest
from cosy_engine.errors import InvalidRequestError
from cosy_engine.ui.common import Notes, Tab, Updates, message, place
from cosy_engine.ui.player import Feed
from cosy_engine.ui.texts import say

HEARTBEAT = 1.0  # seconds between signs of life, at which Gradio also notices that the listener has left

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """Where a run shows itself: the live player, the whole recording, the status line and the seed it used."""

    live: gr.HTML
    result: gr.Audio
    status: gr.HTML
    last_seed: gr.Textbox
    use_again: gr.Button

    @property
    def components(self) -> list[gr.components.Component]:
        return [self.live, self.result, self.status, self.last_seed, self.use_again]


@dataclass(frozen=True)
class Step:
    """A line for the page and, if there is some, new sound [n]; `done` is the synthesis, in the last step."""

    status: str
    samples: np.ndarray | None = None
    done: Synthesis | None = None


def generator(
    engine: Engine, tabs: list[Tab], notes: Notes, output: Output, running: dict[str, object]
) -> Callable[..., AsyncIterator[Updates]]:
    """What the Generate button does; nothing that goes wrong in it leaves it as an exception.

    Args:
        notes: places for sentences about the text and the seed; the tabs have those of the other fields.
        running: the run that a page is in, by the page's session. One that is no longer there ends within a second:
            Gradio's own cancelling misses a run whose page does not yet know that it has begun.
    """
    empty = dict.fromkeys([*notes.values(), *(note for tab in tabs for note in tab.notes.values())], "")

    async def generate(
        web: gr.Request,
        job: str,
        active: str,
        text: str | None,
        speed: float,
        seed: str,
        stream: bool,
        text_frontend: bool,
        *inputs: object,
    ) -> AsyncIterator[Updates]:
        this_run = running[web.session_hash] = object()
        feed = Feed(job)
        heard: list[np.ndarray] = []
        yield empty | {output.result: gr.Audio(None, visible=False), output.status: message(say(web, "working"))}
        fields_at_fault = notes
        try:
            tab, own = _active(tabs, active, inputs)
            fields_at_fault = notes | tab.notes
            text = say(web, "preview_text") if text is None else text
            await asyncio.to_thread(engine.frontend.split, text, text_frontend=text_frontend)
            settings = {"speed": speed, "seed": _seed(web, seed), "stream": stream, "text_frontend": text_frontend}
            request = SynthesisRequest(text=text, **settings, **await tab.fields(web, *own))
            async with aclosing(speak(engine, request, web)) as steps:
                async for step in steps:
                    if running.get(web.session_hash) is not this_run:
                        return
                    updates = {output.status: step.status}
                    if step.samples is not None:
                        heard.append(step.samples)
                        updates[output.live] = feed.packet(step.samples)
                    if step.done is not None:
                        updates |= _end(engine, feed, output, heard, step.done)
                    yield updates
        except Exception as error:
            yield {output.live: feed.end()} | place(error, web, fields_at_fault, output.status)
        finally:
            if running.get(web.session_hash) is this_run:
                del running[web.session_hash]

    return generate


def stopper(running: dict[str, object]) -> Callable[[gr.Request], str]:
    """What the Stop button does, and says."""

    def stop(web: gr.Request) -> str:
        running.pop(web.session_hash, None)
        return message(say(web, "stopped"))

    return stop


async def speak(engine: Engine, request: SynthesisRequest, web: gr.Request) -> AsyncIterator[Step]:
    """The steps of a run, at least one a second.

    Raises:
        CosyError: as the engine does. However the run ends, the engine stops working on it.
    """
    ahead = 0

    def on_position(position: int) -> None:
        nonlocal ahead
        ahead = position

    synthesis = engine.synthesize(request, on_position=on_position)
    status = message(say(web, "working"))
    try:
        async with aclosing(or_nothing(aiter(synthesis), HEARTBEAT)) as chunks:
            async for chunk in chunks:
                if ahead:
                    seconds = max(1, engine.queue.expected_wait(ahead))
                    yield Step(message(say(web, "waiting", count=ahead, seconds=seconds)))
                elif chunk is None:
                    yield Step(status)
                else:
                    if chunk.pieces > 1:
                        status = _progress(web, chunk.piece + 1, chunk.pieces)
                    yield Step(status, chunk.samples)
    finally:
        await synthesis.cancel()
    yield Step(_summary(engine, synthesis, web), done=synthesis)


async def or_nothing(steps: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """The items of `steps`, and None each time `seconds` pass without one."""
    end = object()
    step = None
    try:
        while True:
            step = asyncio.ensure_future(anext(steps, end))
            while not (await asyncio.wait({step}, timeout=seconds))[0]:
                yield None
            if step.result() is end:
                return
            yield step.result()
    finally:
        if step is not None:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)


def _active(tabs: list[Tab], active: str, inputs: tuple[object, ...]) -> tuple[Tab, tuple[object, ...]]:
    """The active tab and its own inputs, from the values of all tabs' inputs."""
    for tab in tabs:
        own, inputs = inputs[: len(tab.inputs)], inputs[len(tab.inputs) :]
        if tab.id == active:
            return tab, own
    raise ValueError(f"no tab is called {active!r}")


def _seed(web: gr.Request, typed: str) -> int | None:
    if not typed.strip():
        return None
    try:
        return int(typed)
    except ValueError:
        raise InvalidRequestError(say(web, "bad_seed"), param="seed") from None


def _end(engine: Engine, feed: Feed, output: Output, heard: list[np.ndarray], synthesis: Synthesis) -> Updates:
    return {
        output.live: feed.end(),
        output.result: gr.Audio(
            (engine.model.sample_rate, np.frombuffer(pcm16(np.concatenate(heard)), np.int16)), visible=True
        ),
        output.last_seed: str(synthesis.seed),
        output.use_again: gr.Button(interactive=True),
    }


def _summary(engine: Engine, synthesis: Synthesis, web: gr.Request) -> str:
    timings = synthesis.timings
    return message(
        say(
            web,
            "summary",
            first_audio=timings.first_audio,
            rtf=timings.rtf,
            seconds=timings.audio_seconds,
            backend=f"{engine.settings.lm_backend} {engine.model.device}",
            seed=synthesis.seed,
        )
    )


def _progress(web: gr.Request, piece: int, pieces: int) -> str:
    said = html.escape(say(web, "piece", piece=piece, pieces=pieces))
    bar = f'<progress value="{piece}" max="{pieces}" aria-hidden="true"></progress>'
    return f'<p role="status" class="message info">{said}{bar}</p>'
