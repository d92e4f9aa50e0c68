"""The live player: its JavaScript under node, and what a listener hears from it in a browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import soundfile

from cosy_engine.audio.resample import resample
from cosy_engine.engine import Engine, SynthesisRequest
from cosy_engine.ui.player import START_JS, STOP_JS, Feed, player
from tests.recordings import encoded, hum
from tests.ui.browser import INSECURE_HOST, PATIENCE, free_port, needs_chromium
from tests.ui.visitor import downloaded

RATE = 24000
Speaker = Callable[[], AsyncIterator[np.ndarray]]


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("node") is None, reason="node is missing: sudo apt-get install nodejs")
@pytest.mark.parametrize("file", sorted(Path(__file__).with_name("js").glob("*.test.mjs")), ids=lambda file: file.stem)
def test_javascript(file: Path) -> None:
    ran = subprocess.run(["node", "--test", str(file)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_feed_numbers_its_packets_and_ends() -> None:
    feed = Feed("a job")
    values = [json.loads(value) for value in (feed.packet(np.array([0.0, 1.0, -1.0, 3.0])), feed.end())]
    assert [value["sequence"] for value in values] == [0, 1]
    assert {value["job"] for value in values} == {"a job"}
    assert np.frombuffer(base64.b64decode(values[0]["pcm"]), "<i2").tolist() == [0, 32767, -32767, 32767]
    assert values[1]["end"] is True


def chirp(seconds: float, lowest: float = 200.0) -> np.ndarray:
    """No stretch of it sounds like another, and no sample of it is zero."""
    moment = np.arange(int(seconds * RATE)) / RATE
    wave = 0.4 * np.sin(2 * np.pi * (lowest * moment + 150 * moment**2))
    return (wave + np.where(wave < 0, -0.01, 0.01)).astype(np.float32)


def paced(sound: np.ndarray, chunk: float, pace: float, stalls: dict[int, float] | None = None) -> Speaker:
    """Each chunk takes `pace` of its length to make, and those with a number in `stalls` so many seconds more."""

    async def speak() -> AsyncIterator[np.ndarray]:
        size = int(chunk * RATE)
        for number, start in enumerate(range(0, len(sound), size)):
            await asyncio.sleep(pace * chunk + (stalls or {}).get(number, 0))
            yield sound[start : start + size]

    return speak


async def burst() -> AsyncIterator[np.ndarray]:
    for part in np.array_split(chirp(2), 300):
        yield part


async def broken() -> AsyncIterator[np.ndarray]:
    yield chirp(0.1)
    raise ValueError("The speaker broke.")


async def mute() -> AsyncIterator[np.ndarray]:
    for _ in ():
        yield chirp(0)
    raise ValueError("The speaker says nothing.")


SPEAKERS: dict[str, Speaker] = {
    "steady": paced(chirp(4), chunk=0.5, pace=0.7),
    "eager": paced(chirp(2), chunk=0.5, pace=0.1),
    "other": paced(chirp(1.5, lowest=900), chunk=0.5, pace=0.1),
    "stalling": paced(chirp(2), chunk=0.5, pace=0.1, stalls={2: 1.5}),
    "long": paced(chirp(60), chunk=0.5, pace=0.5),
    "tiny": paced(chirp(0.1), chunk=0.1, pace=0.1),
    "burst": burst,
    "broken": broken,
    "mute": mute,
}


@dataclass
class Stage:
    """A page with the player and little else: the text names the speaker."""

    speakers: dict[str, Speaker]
    chunk_times: list[float] = field(default_factory=list)  # of the latest run

    def page(self) -> gr.Blocks:
        with gr.Blocks(analytics_enabled=False) as page:
            text = gr.Textbox(label="Text", elem_id="text")
            generate = gr.Button("Generate")
            stop = gr.Button("Stop")
            live = player(RATE)
            said = gr.Textbox(label="Said", elem_id="said")
            job = gr.Textbox(visible="hidden")
            outputs = [live, said]
            running = generate.click(self._run, [job, text], outputs, js=START_JS, concurrency_limit=None)
            stop.click(None, js=STOP_JS)
            stop.click(None, cancels=[running])
        return page

    async def _run(self, job: str, text: str) -> AsyncIterator[tuple[object, ...]]:
        feed = Feed(job)
        self.chunk_times.clear()
        try:
            yield gr.skip(), ""
            async for samples in self.speakers[text]():
                self.chunk_times.append(time.time())
                yield feed.packet(samples), gr.skip()
        except ValueError as error:
            yield feed.end(failed=True), str(error)
        else:
            yield feed.end(), gr.skip()


# Whatever goes to the loudspeaker is recorded: `heard` lists blocks of samples, `at` is when they left, as Date.now().
TAP = """
window.heard = [];
const connect = AudioNode.prototype.connect;
const taps = new WeakMap();

async function makeTap(context) {
  if (!window.isSecureContext) {
    const tap = context.createScriptProcessor(16384, 1, 1);
    tap.onaudioprocess = ({ inputBuffer }) => heard.push({ samples: inputBuffer.getChannelData(0).slice() });
    connect.call(tap, context.destination);
    return tap;
  }
  const module = `registerProcessor("tap", class extends AudioWorkletProcessor {
    process([[samples]]) {
      if (samples) this.port.postMessage({ samples: samples.slice(), time: currentTime });
      return true;
    }
  });`;
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([module], { type: "text/javascript" })));
  const tap = new AudioWorkletNode(context, "tap", { numberOfOutputs: 0 });
  tap.port.onmessage = ({ data: { samples, time } }) =>
    heard.push({ samples, at: Date.now() / 1000 - (context.currentTime - time) });
  return tap;
}

window.AudioContext = class extends AudioContext {
  constructor(options) {
    const live = options?.latencyHint; // Gradio's own player makes contexts too
    if (live && options.sampleRate && window.refuseSampleRate) throw new DOMException("no", "NotSupportedError");
    super(options);
    if (!live) return;
    taps.set(this, makeTap(this));
    window.rate = this.sampleRate;
  }
};
AudioNode.prototype.connect = function (target, ...rest) {
  if (target === this.context.destination) taps.get(this.context)?.then((tap) => connect.call(this, tap));
  return connect.call(this, target, ...rest);
};
"""

HEARD = """async () => {
  const reader = new FileReader();
  const read = new Promise((resolve) => (reader.onload = resolve));
  reader.readAsDataURL(new Blob(heard.map((block) => block.samples)));
  await read;
  return reader.result.split(",")[1] ?? "";
}"""


@dataclass
class Listener:
    """A browser tab with ears."""

    page: object
    errors: list[str] = field(default_factory=list)

    def ask(self, text: str) -> None:
        self.page.get_by_label("Text", exact=True).fill(text)
        self.press("Generate")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def wait_for(self, state: str) -> None:
        self.page.locator(f"#live .live[data-state={state}]").wait_for(timeout=PATIENCE)

    def shown(self, name: str) -> str:
        return self.page.locator(f"#live .{name} dd").inner_text()

    def wav(self) -> np.ndarray:
        """The finished recording, int16, in -1..1."""
        samples, rate = soundfile.read(io.BytesIO(downloaded(self.page)), dtype="float32")
        assert rate == RATE
        return samples

    def heard(self) -> np.ndarray:
        """From the first sound to the last; silence between them too."""
        samples = np.frombuffer(base64.b64decode(self.page.evaluate(HEARD)), np.float32)
        loud = np.flatnonzero(samples)
        return samples[loud[0] : loud[-1] + 1]

    def first_sound(self) -> float:
        """When the first sample that is not silence left for the loudspeaker."""
        return self.page.evaluate("heard.find((block) => block.samples.some((sample) => sample !== 0)).at")


def sound(samples: np.ndarray) -> np.ndarray:
    """Without its silence."""
    return samples[samples != 0]


@pytest.fixture(scope="module")
def stage(engine: Engine) -> Stage:
    async def speak() -> AsyncIterator[np.ndarray]:
        prompt = await engine.make_prompt(encoded(hum(2)))
        request = SynthesisRequest(text="Hello, this is a test.", mode="cross_lingual", prompt=prompt, seed=1)
        async for chunk in engine.synthesize(request):
            yield chunk.samples

    return Stage(SPEAKERS | {"engine": speak})


@pytest.fixture(scope="module")
def port(stage: Stage) -> Iterator[int]:
    port = free_port()
    page = stage.page()
    page.queue().launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield port
    page.close(verbose=False)


@pytest.fixture
def visit(browser: object, port: int) -> Iterator[Callable[..., Listener]]:
    context = browser.new_context(locale="en-US")
    context.add_init_script(TAP)

    def open_page(host: str = "127.0.0.1", script: str = "") -> Listener:
        listener = Listener(context.new_page())
        listener.page.add_init_script(script)
        listener.page.on("console", lambda said: listener.errors.append(said.text) if said.type == "error" else None)
        listener.page.on("pageerror", lambda error: listener.errors.append(str(error)))
        listener.page.goto(f"http://{host}:{port}")
        listener.page.wait_for_function("window.livePlayer", timeout=PATIENCE)
        return listener

    yield open_page
    context.close()


@pytest.fixture
def listener(visit: Callable[..., Listener]) -> Iterator[Listener]:
    listener = visit()
    yield listener
    assert listener.errors == []
    assert not listener.page.locator("#live .notice").is_visible()


def in_the_browser(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.browser(needs_chromium(test))


@in_the_browser
@pytest.mark.parametrize("speaker", ["engine", "eager", "tiny"])
def test_the_listener_hears_every_sample_of_the_recording(listener: Listener, speaker: str) -> None:
    listener.ask(speaker)
    listener.wait_for("finished")
    assert np.array_equal(sound(listener.heard()), sound(listener.wav()))
    assert 0 < float(listener.shown("first").removesuffix(" s")) < PATIENCE / 1000


@in_the_browser
def test_no_packet_is_lost_when_there_are_many_and_the_page_is_busy(visit: Callable[..., Listener]) -> None:
    busy = "setInterval(() => { for (const since = Date.now(); Date.now() - since < 150; ); }, 200)"
    listener = visit(script=busy)
    listener.ask("burst")
    listener.wait_for("finished")
    assert np.array_equal(sound(listener.heard()), listener.wav())


@in_the_browser
@pytest.mark.parametrize("speaker", ["engine", "steady"])
def test_no_gap_while_sound_is_made_faster_than_it_plays(visit: Callable[..., Listener], speaker: str) -> None:
    for _ in range(4):  # other work on the machine can hold up one run, not all
        listener = visit()
        listener.ask(speaker)
        listener.wait_for("finished")
        if listener.shown("underruns") == "0":
            break
    assert np.array_equal(listener.heard(), np.trim_zeros(listener.wav()))


@in_the_browser
def test_sound_starts_when_the_first_chunk_is_there(visit: Callable[..., Listener], stage: Stage) -> None:
    waits = []
    for _ in range(3):
        listener = visit()
        listener.ask("engine")
        listener.wait_for("finished")
        waits.append(listener.first_sound() - stage.chunk_times[0])
    print("seconds from the engine's first chunk to the first sample:", waits)
    assert min(waits) <= 0.3


@in_the_browser
def test_a_slow_engine_makes_a_pause_and_loses_nothing(listener: Listener) -> None:
    listener.ask("stalling")
    listener.wait_for("playing")
    listener.wait_for("buffering")
    listener.wait_for("finished")
    heard = listener.heard()
    pauses = np.count_nonzero(np.diff((heard == 0).astype(int)) == 1)
    assert pauses == int(listener.shown("underruns")) >= 1
    assert np.array_equal(sound(heard), listener.wav())


@in_the_browser
def test_a_failure_plays_what_there_is_and_is_told(listener: Listener) -> None:
    listener.ask("broken")
    listener.wait_for("failed")
    assert len(sound(listener.heard())) == 0.1 * RATE
    assert listener.page.get_by_label("Said").input_value() == "The speaker broke."
    assert "did not work" in listener.page.locator("#live .state").inner_text()
    assert not listener.page.locator("#live a.download").is_visible()


@in_the_browser
def test_a_failure_before_the_first_sound_is_not_called_played(listener: Listener) -> None:
    listener.ask("mute")
    listener.wait_for("failed")
    listener.ask("tiny")
    listener.wait_for("finished")
    assert np.array_equal(sound(listener.heard()), listener.wav())


@in_the_browser
def test_stop_is_silence_at_once(listener: Listener) -> None:
    listener.ask("long")
    listener.wait_for("playing")
    listener.page.wait_for_function("heard.length > 100")
    listener.press("Stop")
    listener.wait_for("stopped")
    listener.page.evaluate("window.heard = []")
    listener.page.wait_for_timeout(500)
    assert not listener.page.evaluate("heard.some((block) => block.samples.some((sample) => sample !== 0))")
    assert listener.shown("buffered") == "0.0 s"

    listener.ask("tiny")
    listener.wait_for("finished")
    assert np.array_equal(sound(listener.heard()), listener.wav())


@in_the_browser
def test_another_click_while_playing_starts_anew(listener: Listener) -> None:
    listener.ask("eager")
    first = listener.wav()
    listener.wait_for("playing")
    listener.ask("other")
    listener.wait_for("finished")
    other = listener.wav()
    heard = sound(listener.heard())
    assert np.array_equal(heard[-len(other) :], other)
    before = heard[: -len(other)]
    assert 0 < len(before) < len(first)
    assert np.array_equal(before, first[: len(before)])


@in_the_browser
def test_two_tabs_do_not_hear_each_other(visit: Callable[..., Listener]) -> None:
    tabs = {"eager": visit(), "other": visit()}
    for speaker, tab in tabs.items():
        tab.ask(speaker)
    for tab in tabs.values():
        tab.wait_for("finished")
        assert np.array_equal(sound(tab.heard()), tab.wav())


@in_the_browser
def test_packets_may_come_twice_late_or_not_at_all(listener: Listener) -> None:
    listener.ask("tiny")
    listener.wait_for("finished")
    listener.page.evaluate("window.heard = []")
    feed = Feed(listener.page.evaluate("livePlayer.start()"))
    parts = np.array_split(chirp(1), 20)
    lost = 13
    values = [feed.packet(part) for part in parts] + [feed.end()]
    del values[lost]
    values = 2 * values
    random.Random(0).shuffle(values)
    stranger = Feed("another run").packet(chirp(1, lowest=900))
    listener.page.evaluate("(values) => values.forEach((value) => livePlayer.feed(value))", [stranger, *values])
    listener.wait_for("finished")
    expected = np.concatenate([part for number, part in enumerate(parts) if number != lost])
    assert np.allclose(sound(listener.heard()), expected, atol=2 / 32768)


@in_the_browser
def test_an_insecure_address_plays_too_and_says_so(visit: Callable[..., Listener]) -> None:
    listener = visit(host=INSECURE_HOST)
    assert listener.page.evaluate("window.isSecureContext") is False
    assert "https" in listener.page.locator("#live .notice").inner_text()
    listener.ask("eager")
    listener.wait_for("finished")
    listener.page.wait_for_timeout(1500)  # the recorder hands over its last block
    assert np.array_equal(sound(listener.heard()), listener.wav())
    assert listener.errors == []


@in_the_browser
def test_a_browser_with_another_rate_hears_the_same(visit: Callable[..., Listener]) -> None:
    listener = visit(script="window.refuseSampleRate = true")
    listener.ask("eager")
    listener.wait_for("finished")
    rate = listener.page.evaluate("rate")
    assert rate != RATE
    expected = resample(listener.wav(), RATE, rate)
    heard = listener.heard()
    assert abs(len(heard) - len(expected)) < 0.01 * rate
    shift = int(np.argmax(np.correlate(heard[:4096], expected[:2048], "valid")))
    length = min(len(heard) - shift, len(expected)) - rate // 10
    error = heard[shift : shift + length] - expected[:length]
    assert np.sqrt(np.mean(error**2)) < 0.02
    assert listener.errors == []


@in_the_browser
def test_pause_and_resume_by_keyboard(listener: Listener) -> None:
    listener.ask("eager")
    listener.wait_for("playing")
    button = listener.page.get_by_role("region", name="Live player").get_by_role("button")
    button.press("Enter")
    listener.wait_for("paused")
    assert button.inner_text() == "Resume"
    button.press("Space")
    listener.wait_for("finished")
    assert np.array_equal(sound(listener.heard()), listener.wav())
