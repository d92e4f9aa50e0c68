import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { ScheduledSink } from "../../../cosy_engine/ui/player.js";

const RATE = 24000;
const SECOND = RATE;

/** A context that plays nothing and remembers what should sound when. */
class SilentContext {
  sampleRate = RATE;
  currentTime = 0;
  sounds = [];

  createBuffer(_channels, length, rate) {
    return { duration: length / rate, copyToChannel() {} };
  }

  createBufferSource() {
    const sound = { stopped: false };
    return {
      connect() {},
      start: (time) => this.sounds.push(Object.assign(sound, { time })),
      stop: () => (sound.stopped = true),
      set buffer(buffer) {
        sound.duration = buffer.duration;
      },
    };
  }
}

let context, sink, report;

beforeEach(() => {
  mock.timers.enable({ apis: ["setInterval"] });
  context = new SilentContext();
  sink = new ScheduledSink(context, (said) => (report = said));
});

afterEach(() => {
  sink.stop();
  mock.timers.reset();
});

const push = (seconds) => sink.push(new Float32Array(seconds * SECOND));
const at = (time) => {
  context.currentTime = time;
  mock.timers.tick(100);
};
const close = (a, b) => assert.ok(Math.abs(a - b) < 1e-6, `${a} is not ${b}`);

test("packets sound one behind the other without a gap", () => {
  for (let i = 0; i < 4; i++) push(0.3);
  assert.equal(context.sounds.length, 4);
  for (let i = 1; i < 4; i++) close(context.sounds[i].time, context.sounds[i - 1].time + 0.3);
  at(0.5);
  assert.equal(report.state, "playing");
  close(report.heard, context.sounds[0].time);
  close(report.played + report.buffered, 1.2);
  assert.equal(report.underruns, 0);
});

test("too little sound waits for more, or for the end", () => {
  push(0.2);
  assert.equal(context.sounds.length, 0);
  at(0.1);
  assert.equal(report.state, "waiting");
  assert.equal(report.heard, null);
  sink.end();
  assert.equal(context.sounds.length, 1);
  at(1);
  assert.equal(report.state, "finished");
  assert.equal(report.underruns, 0);
});

test("after running dry it waits for twice as much and tells of it", () => {
  push(0.25);
  at(1);
  assert.equal(report.state, "waiting");
  push(0.4);
  assert.equal(context.sounds.length, 1);
  push(0.2);
  assert.equal(context.sounds.length, 3);
  assert.ok(context.sounds[1].time >= 1);
  at(1.1);
  assert.equal(report.state, "playing");
  assert.equal(report.underruns, 1);
});

test("stopping silences everything that was to come", () => {
  push(1);
  push(1);
  sink.stop();
  assert.ok(context.sounds.every((sound) => sound.stopped));
});
