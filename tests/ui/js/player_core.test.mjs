import assert from "node:assert/strict";
import { describe, test } from "node:test";

import {
  PacketOrder,
  Peaks,
  PcmDecoder,
  Playback,
  Resampler,
  shownState,
  StartBuffer,
  wavHeader,
} from "../../../cosy_engine/ui/player_core.js";

const RATE = 24000;
const BLOCK = 128;

const ramp = (length, from = 1) => Float32Array.from({ length }, (_, i) => from + i);
const join = (parts) => Float32Array.from(parts.flatMap((part) => [...part]));

/** Plays `seconds`; gives what was heard. */
function play(playback, seconds) {
  const heard = [];
  for (let done = 0; done < seconds * RATE; done += BLOCK) {
    const block = new Float32Array(BLOCK).fill(99);
    playback.fill(block);
    heard.push(block);
  }
  return join(heard);
}

describe("16-bit PCM", () => {
  test("becomes samples in -1..1", () => {
    const bytes = new Uint8Array(Int16Array.from([0, 1, -1, 32767, -32768]).buffer);
    assert.deepEqual([...new PcmDecoder().decode(bytes)], [0, 1 / 32768, -1 / 32768, 32767 / 32768, -1]);
  });

  test("may be cut anywhere", () => {
    const samples = Int16Array.from({ length: 50 }, (_, i) => 997 * i - 20000);
    const bytes = new Uint8Array(samples.buffer);
    const whole = new PcmDecoder().decode(bytes);
    const decoder = new PcmDecoder();
    const cuts = [0, 1, 2, 3, 3, 10, 33, 34, 99, 100];
    const parts = cuts.slice(1).map((end, i) => decoder.decode(bytes.slice(cuts[i], end)));
    assert.deepEqual(join(parts), whole);
  });
});

describe("packets", () => {
  const arrive = (numbers) => {
    const order = new PacketOrder();
    return { order, got: numbers.map((number) => order.accept(number, `p${number}`)) };
  };

  test("in order pass at once", () => {
    assert.deepEqual(arrive([0, 1, 2]).got, [["p0"], ["p1"], ["p2"]]);
  });

  test("that come early wait for those before them", () => {
    const { order, got } = arrive([2, 1, 0, 3]);
    assert.deepEqual(got, [[], [], ["p0", "p1", "p2"], ["p3"]]);
    assert.equal(order.waiting, 0);
  });

  test("that come twice are taken once", () => {
    assert.deepEqual(arrive([0, 0, 2, 2, 1, 1, 2]).got.flat(), ["p0", "p1", "p2"]);
  });

  test("that never come can be skipped, and are not taken later", () => {
    const { order } = arrive([0, 4, 3]);
    assert.equal(order.waiting, 2);
    assert.deepEqual(order.skipLost(), ["p3", "p4"]);
    assert.equal(order.waiting, 0);
    assert.deepEqual(order.accept(1, "p1"), []);
    assert.deepEqual(order.accept(5, "p5"), ["p5"]);
  });
});

describe("resampling", () => {
  const tone = (rate, seconds, hertz) =>
    Float32Array.from({ length: rate * seconds }, (_, i) => 0.5 * Math.sin((2 * Math.PI * hertz * i) / rate));

  for (const [from, to] of [
    [24000, 48000],
    [24000, 44100],
    [24000, 16000],
  ]) {
    test(`${from} to ${to} keeps a tone, its length and its place`, () => {
      const resampler = new Resampler(from, to);
      const output = join([resampler.process(tone(from, 0.5, 1000)), resampler.finish()]);
      const expected = tone(to, 0.5, 1000);
      assert.ok(Math.abs(output.length - expected.length) <= 1);
      const inner = { start: 0.02 * to, end: 0.48 * to };
      for (let i = inner.start; i < inner.end; i++) assert.ok(Math.abs(output[i] - expected[i]) < 2e-3);
    });
  }

  test("does not depend on how the input is cut", () => {
    const input = tone(24000, 0.2, 440);
    const whole = new Resampler(24000, 44100);
    const cut = new Resampler(24000, 44100);
    const parts = [0, 1, 5, 700, 701, 4000, input.length];
    const pieces = parts.slice(1).map((end, i) => cut.process(input.slice(parts[i], end)));
    assert.deepEqual(
      join([...pieces, cut.finish()]),
      join([whole.process(input), whole.finish()]),
    );
  });

  test("to a lower rate takes out what that cannot hold", () => {
    const output = new Resampler(24000, 16000).process(tone(24000, 0.5, 11000));
    assert.ok(Math.max(...output.slice(1000, -1000).map(Math.abs)) < 0.01);
  });
});

describe("playback", () => {
  test("starts at a quarter of a second of sound, not before", () => {
    const playback = new Playback(RATE);
    playback.push(ramp(0.24 * RATE));
    assert.ok(play(playback, 1).every((sample) => sample === 0));
    assert.equal(playback.state, "waiting");
    assert.equal(playback.underruns, 0);
    playback.push(ramp(0.02 * RATE));
    assert.equal(play(playback, 0.01)[0], 1);
    assert.equal(playback.state, "playing");
  });

  test("starts at the end of the stream however little there is", () => {
    const playback = new Playback(RATE);
    playback.push(ramp(10));
    playback.end();
    assert.deepEqual([...play(playback, 0.01).slice(0, 11)], [...ramp(10), 0]);
    assert.equal(playback.state, "finished");
    assert.equal(playback.played, 10);
  });

  test("gives every sample once and in order, whatever the packets' lengths", () => {
    const playback = new Playback(RATE);
    const lengths = [7000, 1, 127, 128, 129, 0, 5000];
    let next = 1;
    for (const length of lengths) {
      playback.push(ramp(length, next));
      next += length;
    }
    playback.end();
    const heard = play(playback, 1);
    assert.deepEqual(heard.slice(0, next - 1), ramp(next - 1));
    assert.ok(heard.slice(next - 1).every((sample) => sample === 0));
    assert.equal(playback.underruns, 0);
    assert.equal(playback.buffered, 0);
  });

  test("waits longer after each time it ran dry, a second and a half at most", () => {
    const playback = new Playback(RATE);
    playback.push(ramp(0.25 * RATE));
    play(playback, 0.5);
    for (const [time, needed] of [0.5, 1, 1.5, 1.5].entries()) {
      assert.equal(playback.state, "waiting");
      assert.equal(playback.underruns, time);
      playback.push(ramp((needed - 0.01) * RATE));
      assert.ok(play(playback, 0.1).every((sample) => sample === 0));
      playback.push(ramp(0.02 * RATE));
      assert.equal(play(playback, 0.01)[0], 1);
      assert.equal(playback.state, "playing");
      assert.equal(playback.underruns, time + 1);
      play(playback, 2);
    }
  });

  test("does not call the end of the stream an interruption, even when the word of it is late", () => {
    const playback = new Playback(RATE);
    playback.push(ramp(RATE));
    play(playback, 1.5);
    assert.equal(playback.state, "waiting");
    playback.end();
    play(playback, 0.01);
    assert.equal(playback.state, "finished");
    assert.equal(playback.underruns, 0);
  });
});

test("the start buffer grows to its limit", () => {
  const buffer = new StartBuffer();
  const seconds = [buffer.seconds];
  for (let i = 0; i < 4; i++) {
    buffer.grow();
    seconds.push(buffer.seconds);
  }
  assert.deepEqual(seconds, [0.25, 0.5, 1, 1.5, 1.5]);
});

describe("peaks", () => {
  test("are the loudest of each stretch, whatever the packets", () => {
    const peaks = new Peaks(4);
    for (const packet of [[0.1, -0.5], [0.2, 0.3, -0.25], [], [0.75, 0]]) peaks.push(Float32Array.from(packet));
    assert.deepEqual(peaks.values, [0.5, 0.75].map(Math.fround));
  });

  test("fit into the columns there are, and none is lost", () => {
    const peaks = new Peaks(1);
    peaks.push(Float32Array.from({ length: 1000 }, (_, i) => (i === 617 ? 1 : 0.25)));
    for (const columns of [1, 3, 7, 113, 999, 1000]) {
      const shown = peaks.columns(columns);
      assert.equal(shown.length, columns);
      assert.equal(shown.filter((value) => value === 1).length, 1);
    }
    assert.equal(peaks.columns(5000).length, 1000);
    assert.deepEqual(new Peaks(1).columns(10), []);
  });
});

test("a WAV file begins with its format and length", () => {
  const header = Buffer.from(wavHeader(1000, RATE));
  assert.equal(header.length, 44);
  assert.equal(header.toString("latin1", 0, 4) + header.toString("latin1", 8, 16), "RIFFWAVEfmt ");
  assert.equal(header.readUInt32LE(4), 1036);
  assert.deepEqual([20, 22, 32, 34].map((offset) => header.readUInt16LE(offset)), [1, 1, 2, 16]);
  assert.deepEqual([24, 28, 40].map((offset) => header.readUInt32LE(offset)), [RATE, 2 * RATE, 1000]);
});

describe("what the listener is told", () => {
  const run = { state: "playing", heard: 1, received: 2, failed: false };
  const cases = [
    ["idle", null, "running", false],
    ["waiting", { ...run, state: "waiting", heard: null, received: 0 }, "suspended", false],
    ["playing", run, "running", false],
    ["buffering", { ...run, state: "waiting" }, "running", false],
    ["paused", run, "suspended", true],
    ["blocked", run, "suspended", false],
    ["blocked", run, "interrupted", false],
    ["finished", { ...run, state: "finished" }, "suspended", false],
    ["failed", { ...run, state: "finished", failed: true }, "running", false],
    ["failed", { ...run, state: "waiting", heard: null, received: 0, failed: true }, "interrupted", false],
    ["stopped", { ...run, state: "stopped", failed: true }, "interrupted", false],
  ];
  for (const [expected, report, context, paused] of cases) {
    test(`${expected} when the context is ${context}: ${JSON.stringify(report)}`, () => {
      assert.equal(shownState(report, context, paused), expected);
    });
  }
});
