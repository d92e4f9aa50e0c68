"""The live player: a component that plays 16-bit PCM as it arrives, in an audio worklet of the visitor's browser.

`START_JS` runs in the click, where browsers allow sound, and fills in the job id that every packet then carries; so
what an earlier click made is never heard in a later one. All that plays is JavaScript: player_core.js (plain logic),
player_worklet.js (the audio thread) and player.js (the page).
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import gradio as gr
import numpy as np

from cosy_engine.audio.encode import pcm16
from cosy_engine.ui.texts import both

START_JS = "async (job, ...inputs) => [window.livePlayer ? await window.livePlayer.start() : '', ...inputs]"
STOP_JS = "() => { window.livePlayer?.stop(); }"

_TEXTS = (
    "region waveform whole idle waiting playing buffering paused blocked finished stopped failed "
    "first buffered underruns pause resume download no_worklet no_sound"
).split()

# The modules are joined before they are loaded: not every browser lets one made of a blob import another.
_ON_LOAD = """
const address = (source) => URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
const texts = %(texts)s[navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"];
import(address(%(page)s)).then(({ Player }) => {
  const player = new Player(element, {
    rate: %(rate)d,
    say: (name) => texts["player_" + name],
    worklet: address(%(worklet)s),
  });
  watch("value", () => player.feed(props.value));
  window.livePlayer = player;
});
"""


def player(sample_rate: int) -> gr.HTML:
    """The component, one a page; its value is what a `Feed` of this sample rate gives."""
    return gr.HTML(
        html_template=_read("player.html"),
        css_template=_read("player.css"),
        js_on_load=_ON_LOAD
        % {
            "page": json.dumps(_with_core("player.js")),
            "worklet": json.dumps(_with_core("player_worklet.js")),
            "texts": json.dumps(both(*(f"player_{name}" for name in _TEXTS))),
            "rate": sample_rate,
        },
        apply_default_css=False,
        elem_id="live",
    )


class Feed:
    """The values of the component in one run: a numbered packet for each stretch of sound, and the end."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._sequence = 0

    def packet(self, samples: np.ndarray) -> str:
        """Sound `[n]` in -1..1."""
        return self._next(pcm=base64.b64encode(pcm16(samples)).decode())

    def end(self, *, failed: bool = False) -> str:
        """Nothing follows: the player plays what it has and rests."""
        return self._next(end=True, failed=failed)

    def _next(self, **content: object) -> str:
        value = json.dumps({"job": self._job, "sequence": self._sequence, **content})
        self._sequence += 1
        return value


def _with_core(name: str) -> str:
    """A module and what it imports, as one."""
    return _read("player_core.js") + re.sub(r'^import {.*} from "./player_core.js";$', "", _read(name), flags=re.M)


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
