import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { Player } from "../../../cosy_engine/ui/player.js";

const RATE = 24000;

/** Enough of an element: it keeps what is set and hears what is told. */
class FakeElement extends EventTarget {
  dataset = {};
  clientWidth = 300;
  clientHeight = 64;
  hidden = false;
  textContent = "";
  currentTime = 0;
  #children = new Map();

  querySelector(selector) {
    if (!this.#children.has(selector)) this.#children.set(selector, new FakeElement());
    return this.#children.get(selector);
  }

  setAttribute() {}
  toggleAttribute() {}
  removeAttribute(name) {
    this[name] = "";
  }
  scrollIntoView() {}
  pause() {}
  click() {
    this.dispatchEvent(new Event("click"));
  }
  getContext() {
    return { scale() {}, fillRect() {} };
  }
}

/** A context whose state the test sets, as a browser or a phone call would. */
class FakeContext extends EventTarget {
  static allowed = true;
  static latest;
  state = "suspended";
  sampleRate = RATE;
  currentTime = 0;
  resumed = 0;

  constructor() {
    super();
    FakeContext.latest = this;
  }

  become(state) {
    this.state = state;
    this.dispatchEvent(new Event("statechange"));
  }

  async resume() {
    this.resumed++;
    if (this.state === "interrupted") throw new DOMException("in a call", "InvalidStateError");
    if (FakeContext.allowed) this.become("running");
  }

  async suspend() {
    this.become("suspended");
  }

  createBuffer(_channels, length, rate) {
    return { duration: length / rate, copyToChannel() {} };
  }

  createBufferSource() {
    return { connect() {}, start() {}, stop() {} };
  }
}

let element, player, context;

beforeEach(async () => {
  mock.timers.enable({ apis: ["setInterval", "setTimeout"] });
  globalThis.document = Object.assign(new EventTarget(), { hidden: false });
  globalThis.AudioContext = FakeContext;
  globalThis.ResizeObserver = class {
    observe() {}
  };
  globalThis.requestAnimationFrame = (draw) => setTimeout(draw, 0);
  globalThis.getComputedStyle = () => ({ getPropertyValue: () => "black" });
  Object.defineProperty(globalThis, "navigator", { value: { audioSession: { type: "auto" } }, configurable: true });
  FakeContext.allowed = true;
  element = new FakeElement();
  player = new Player(element, { rate: RATE, say: (name) => name, worklet: "" });
});

afterEach(() => mock.timers.reset());

async function begin() {
  const job = await player.start();
  context = FakeContext.latest;
  return job;
}

const packet = (job, sequence, content) => player.feed(JSON.stringify({ job, sequence, ...content }));
const pcm = (seconds) => ({ pcm: Buffer.from(new Int16Array(seconds * RATE).fill(1000).buffer).toString("base64") });

/** What the page shows `seconds` of the context's time later. */
function shown(seconds = 0) {
  context.currentTime += seconds;
  mock.timers.tick(100);
  mock.timers.tick(1);
  return element.querySelector(".live").dataset.state;
}

const button = () => element.querySelector("button");

test("plays, ends, and offers the whole recording", async () => {
  const job = await begin();
  assert.equal(shown(), "waiting");
  packet(job, 0, pcm(1));
  assert.equal(shown(0.1), "playing");
  assert.equal(element.querySelector(".download").hidden, true);
  packet(job, 1, { end: true, failed: false });
  assert.equal(shown(), "playing");
  assert.equal(element.querySelector(".download").hidden, false);
  assert.equal(element.querySelector("audio").hidden, true);
  assert.equal(shown(2), "finished");
  assert.equal(element.querySelector("audio").hidden, false);
  const recording = await (await fetch(element.querySelector(".download").href)).arrayBuffer();
  assert.equal(recording.byteLength, 44 + 2 * RATE);
  assert.match(element.querySelector(".download").download, /^CosyVoice .*\.wav$/);
});

test("a failure before any sound is a failure, not an end", async () => {
  const job = await begin();
  packet(job, 0, { end: true, failed: true });
  assert.equal(shown(1), "failed");
  assert.equal(button().hidden, true);
});

test("a failure after some sound plays it first, and offers nothing to download", async () => {
  const job = await begin();
  packet(job, 0, pcm(1));
  packet(job, 1, { end: true, failed: true });
  assert.equal(shown(0.1), "playing");
  assert.equal(shown(2), "failed");
  assert.equal(element.querySelector(".download").hidden, true);
});

test("a lost connection is a failure, unless everything is there", async () => {
  await begin();
  player.fail();
  assert.equal(shown(1), "failed");
  const job = await begin();
  packet(job, 0, pcm(1));
  packet(job, 1, { end: true });
  player.fail();
  assert.equal(shown(2), "finished");
});

test("what a stopped run leaves behind does not fail the next one", async () => {
  await begin();
  player.stop();
  await begin();
  assert.equal(player.fail(), false);
  assert.equal(shown(), "waiting");
});

test("a browser that forbids sound is told apart from a pause, and a press on Resume plays", async () => {
  FakeContext.allowed = false;
  const job = await begin();
  assert.equal(shown(), "waiting");
  packet(job, 0, pcm(1));
  assert.equal(shown(), "blocked");
  assert.equal(button().textContent, "resume");
  FakeContext.allowed = true;
  button().click();
  assert.equal(shown(0.1), "playing");
});

test("pause stays a pause, whatever the page's visibility", async () => {
  const job = await begin();
  packet(job, 0, pcm(2));
  assert.equal(shown(0.1), "playing");
  button().click();
  assert.equal(shown(), "paused");
  document.dispatchEvent(new Event("visibilitychange"));
  assert.equal(shown(), "paused");
  button().click();
  assert.equal(shown(0.1), "playing");
  assert.equal(button().textContent, "pause");
});

test("a phone call holds the sound, and it goes on when the page is back", async () => {
  const job = await begin();
  packet(job, 0, pcm(2));
  assert.equal(shown(0.1), "playing");
  context.become("interrupted"); // resume() is refused meanwhile
  await Promise.resolve();
  assert.equal(shown(), "blocked");
  assert.equal(button().textContent, "resume");
  context.become("suspended");
  assert.equal(shown(0.1), "playing");
  context.state = "interrupted";
  document.hidden = true;
  document.dispatchEvent(new Event("visibilitychange"));
  assert.equal(shown(), "blocked");
  document.hidden = false;
  context.state = "suspended";
  document.dispatchEvent(new Event("visibilitychange"));
  assert.equal(shown(0.1), "playing");
});

test("stop is final: what still comes is not played, and nothing resumes", async () => {
  const job = await begin();
  packet(job, 0, pcm(1));
  assert.equal(shown(0.1), "playing");
  player.stop();
  packet(job, 1, pcm(1));
  assert.equal(shown(5), "stopped");
  mock.timers.tick(3000);
  assert.equal(context.state, "suspended");
  const { resumed } = context;
  document.dispatchEvent(new Event("visibilitychange"));
  assert.equal(context.resumed, resumed);
});

test("an iPhone's silent switch does not silence it, and the microphone gets the session back", async () => {
  const job = await begin();
  assert.equal(navigator.audioSession.type, "playback");
  packet(job, 0, pcm(0.5));
  packet(job, 1, { end: true });
  assert.equal(shown(2), "finished");
  mock.timers.tick(3000);
  assert.equal(context.state, "suspended");
  assert.equal(navigator.audioSession.type, "auto");
});

test("unlocked in one click, it may start without another", async () => {
  player.unlock();
  context = FakeContext.latest;
  assert.equal(context.state, "running");
  FakeContext.allowed = false;
  await begin();
  assert.equal(FakeContext.latest, context);
  assert.equal(context.state, "running");
});

test("without an AudioContext the recording is there at the end", async () => {
  delete globalThis.AudioContext;
  player = new Player(element, { rate: RATE, say: (name) => name, worklet: "" });
  const job = await player.start();
  assert.ok(job);
  assert.equal(element.querySelector(".notice").textContent, "no_sound");
  context = { currentTime: 0 };
  packet(job, 0, pcm(1));
  assert.equal(shown(), "waiting");
  packet(job, 1, { end: true });
  assert.equal(shown(), "finished");
  assert.equal(element.querySelector("audio").hidden, false);
});
