"""One run: from the Generate button to the line that sums it up."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import gradio as gr
import numpy as np

from cosy_engine.engine import Engine, Synthesis, SynthesisRequest
from cosy_engine.ui.common import Notes, Tab, Updates, message, place
from cosy_engine.ui.player import Feed
from cosy_engine.ui.texts import complaint, say, sentence

HEARTBEAT = 1.0  # seconds between signs of life, at which Gradio also notices that the listener has left
PAGE_HEARTBEAT = 20.0  # seconds between the page's own; a browser may let one that nobody sees wait for a minute
PAGE_PATIENCE = 180.0  # seconds without one, after which nobody is thought to listen

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """Where a run shows itself: the live player, the status line and the seed it used.

    Attributes:
        alive: the page's sign of life, which it gives while a run is going on.
    """

    live: gr.HTML
    status: gr.HTML
    last_seed: gr.Textbox
    use_again: gr.Button
    alive: gr.Timer

    @property
    def components(self) -> list[gr.components.Component]:
        return [self.live, self.status, self.last_seed, self.use_again, self.alive]


class Running:
    """The run that each page is in, by the page's session. One that is no longer there ends within a second: Gradio's
    own cancelling misses a run whose page does not yet know that it has begun, and a tab that has fallen asleep."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, float]] = {}

    def begin(self, session: str) -> object:
        run = object()
        self._seen[session] = run, time.monotonic()
        return run

    def seen(self, session: str) -> None:
        """The page has given a sign of life."""
        if session in self._seen:
            self._seen[session] = self._seen[session][0], time.monotonic()

    def stop(self, session: str) -> None:
        self._seen.pop(session, None)

    def end(self, session: str, run: object) -> None:
        if self.is_wanted(session, run):
            self.stop(session)

    def is_wanted(self, session: str, run: object) -> bool:
        return self._seen.get(session, (None,))[0] is run

    def is_busy(self, session: str) -> bool:
        return session in self._seen

    def is_asleep(self, session: str) -> bool:
        return time.monotonic() - self._seen[session][1] > PAGE_PATIENCE


@dataclass(frozen=True)
class Step:
    """A line for the page and, if there is some, new sound [n]; `done` is the synthesis, in the last step."""

    status: str
    samples: np.ndarray | None = None
    done: Synthesis | None = None


def generator(
    engine: Engine, tabs: list[Tab], notes: Notes, output: Output, running: Running
) -> Callable[..., AsyncIterator[Updates]]:
    """What the Generate button does; nothing that goes wrong in it leaves it as an exception.

    Args:
        notes: places for sentences about the text and the seed; the tabs have those of the other fields.
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
        session = web.session_hash
        this_run = running.begin(session)
        feed = Feed(job)
        yield empty | {output.status: message(say(web, "preparing")), output.alive: gr.Timer(active=True)}
        fields_at_fault = notes
        try:
            tab, own = _active(tabs, active, inputs)
            fields_at_fault = notes | tab.notes
            text = say(web, "preview_text") if text is None else text
            await asyncio.to_thread(engine.frontend.split, text, text_frontend=text_frontend)
            settings = {"speed": speed, "seed": _seed(seed), "stream": stream, "text_frontend": text_frontend}
            request = SynthesisRequest(text=text, **settings, **await tab.fields(web, *own))
            async with aclosing(speak(engine, request, web)) as steps:
                async for step in steps:
                    if not running.is_wanted(session, this_run):
                        if not running.is_busy(session):  # a line of this run may have come after the stop's
                            yield {output.status: message(say(web, "stopped"))}
                        return
                    if running.is_asleep(session):
                        raise complaint("stalled", minutes=PAGE_PATIENCE / 60)
                    updates = {output.status: step.status}
                    if step.samples is not None:
                        updates[output.live] = feed.packet(step.samples)
                    if step.done is not None:
                        updates |= _end(web, feed, output, step.done)
                    yield updates
        except Exception as error:
            at_rest = {output.live: feed.end(failed=True), output.alive: gr.Timer(active=False)}
            yield at_rest | place(error, web, fields_at_fault, output.status)
        finally:
            running.end(session, this_run)

    return generate


def stopper(running: Running) -> Callable[[gr.Request], tuple[str, gr.Timer]]:
    """What the Stop button does, says, and makes of the page's sign of life."""

    def stop(web: gr.Request) -> tuple[str, gr.Timer]:
        running.stop(web.session_hash)
        return message(say(web, "stopped")), gr.Timer(active=False)

    return stop


def noter(running: Running) -> Callable[[gr.Request], None]:
    """What the page's sign of life does."""

    def note(web: gr.Request) -> None:
        running.seen(web.session_hash)

    return note


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


def _seed(typed: str) -> int | None:
    if not typed.strip():
        return None
    try:
        return int(typed)
    except ValueError:
        raise complaint("bad_seed", "seed") from None


def _end(web: gr.Request, feed: Feed, output: Output, synthesis: Synthesis) -> Updates:
    return {
        output.live: feed.end(),
        output.last_seed: str(synthesis.seed),
        output.use_again: gr.Button(say(web, "seed_again", seed=synthesis.seed), visible=True),
        output.alive: gr.Timer(active=False),
    }


def _summary(engine: Engine, synthesis: Synthesis, web: gr.Request) -> str:
    timings = synthesis.timings
    summary = message(
        say(
            web,
            "summary",
            first_audio=timings.first_audio,
            rtf=timings.rtf,
            seconds=timings.audio_seconds,
            backend=f"{engine.settings.lm_backend} {engine.model.device}",
        )
    )
    return summary + "".join(message(sentence(web, notice)) for notice in synthesis.notices)


def _progress(web: gr.Request, piece: int, pieces: int) -> str:
    said = html.escape(say(web, "piece", piece=piece, pieces=pieces))
    bar = f'<progress value="{piece}" max="{pieces}" aria-hidden="true"></progress>'
    return f'<p role="status" class="message info">{said}{bar}</p>'
