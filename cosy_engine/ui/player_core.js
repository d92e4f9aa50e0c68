// Sound that arrives in packets: decoding, order, rate, and when to play. Nothing here needs a page.

const TAPS = 16; // zero crossings on each side of the resampling filter

/** 16-bit little-endian PCM to samples in -1..1; half a sample at the end of a packet waits for its other half. */
export class PcmDecoder {
  #half = new Uint8Array(0);

  /** @param {Uint8Array} packet @returns {Float32Array} */
  decode(packet) {
    const bytes = new Uint8Array(this.#half.length + packet.length);
    bytes.set(this.#half);
    bytes.set(packet, this.#half.length);
    const samples = new Float32Array(bytes.length >> 1);
    const view = new DataView(bytes.buffer);
    for (let i = 0; i < samples.length; i++) samples[i] = view.getInt16(2 * i, true) / 32768;
    this.#half = bytes.slice(2 * samples.length);
    return samples;
  }
}

/** Gives packets back in the order of their numbers 0, 1, 2...; what comes twice is dropped, what comes early waits. */
export class PacketOrder {
  #next = 0;
  #early = new Map();

  /** Packets that wait for one before them. */
  get waiting() {
    return this.#early.size;
  }

  /** @returns the packets whose turn it is now */
  accept(sequence, packet) {
    if (sequence >= this.#next) this.#early.set(sequence, packet);
    const ready = [];
    while (this.#early.has(this.#next)) {
      ready.push(this.#early.get(this.#next));
      this.#early.delete(this.#next++);
    }
    return ready;
  }

  /** @returns all packets that wait; those before them count as lost */
  skipLost() {
    const ready = [...this.#early].sort(([a], [b]) => a - b);
    this.#early.clear();
    if (ready.length) this.#next = ready.at(-1)[0] + 1;
    return ready.map(([, packet]) => packet);
  }
}

/** Another sample rate, by a windowed sinc; the output does not depend on how the input is cut. */
export class Resampler {
  #step;
  #half;
  #filters;
  #input;
  #phase = 0;

  constructor(from, to) {
    const divisor = greatestCommonDivisor(from, to);
    const phases = to / divisor;
    const cutoff = Math.min(1, to / from);
    this.#step = from / divisor;
    this.#half = Math.ceil(TAPS / cutoff);
    this.#filters = Array.from({ length: phases }, (_, phase) =>
      Float32Array.from({ length: 2 * this.#half }, (_, tap) => {
        const distance = tap - this.#half + 1 - phase / phases;
        return cutoff * sinc(cutoff * distance) * hann(distance / this.#half);
      }),
    );
    this.#input = new Float32Array(this.#half - 1);
  }

  /** @param {Float32Array} samples @returns {Float32Array} */
  process(samples) {
    const input = new Float32Array(this.#input.length + samples.length);
    input.set(this.#input);
    input.set(samples, this.#input.length);
    const output = [];
    let start = 0;
    while (start + 2 * this.#half <= input.length) {
      const filter = this.#filters[this.#phase];
      let sum = 0;
      for (let tap = 0; tap < filter.length; tap++) sum += filter[tap] * input[start + tap];
      output.push(sum);
      this.#phase += this.#step;
      start += Math.floor(this.#phase / this.#filters.length);
      this.#phase %= this.#filters.length;
    }
    this.#input = input.slice(start);
    return Float32Array.from(output);
  }

  /** @returns {Float32Array} what the filter still holds */
  finish() {
    return this.process(new Float32Array(this.#half));
  }
}

/** Seconds of sound to have before playing: a blink at first, more after each time that they were too few. */
export class StartBuffer {
  seconds = 0.25;

  grow() {
    this.seconds = Math.min(2 * this.seconds, 1.5);
  }
}

/** Samples on their way to the loudspeaker: waits for a start buffer, plays, and waits longer after running dry. */
export class Playback {
  state = "waiting"; // waiting, playing, finished
  played = 0;
  buffered = 0;
  underruns = 0;
  #rate;
  #start = new StartBuffer();
  #chunks = [];
  #offset = 0; // in the first chunk
  #ended = false;
  #dry = false;

  constructor(rate) {
    this.#rate = rate;
  }

  push(samples) {
    if (!samples.length) return;
    if (this.#dry) {
      this.#dry = false;
      this.underruns++;
      this.#start.grow();
    }
    this.#chunks.push(samples);
    this.buffered += samples.length;
  }

  end() {
    this.#ended = true;
  }

  /** Writes the next samples over all of `output`; silence where there are none. */
  fill(output) {
    if (this.state === "waiting" && (this.#ended || this.buffered >= this.#start.seconds * this.#rate)) {
      this.state = "playing";
    }
    let written = 0;
    while (this.state === "playing" && written < output.length && this.#chunks.length) {
      const part = this.#chunks[0].subarray(this.#offset, this.#offset + output.length - written);
      output.set(part, written);
      written += part.length;
      this.#offset += part.length;
      if (this.#offset === this.#chunks[0].length) {
        this.#chunks.shift();
        this.#offset = 0;
      }
    }
    output.fill(0, written);
    this.played += written;
    this.buffered -= written;
    if (this.state === "playing" && !this.buffered) {
      this.state = this.#ended ? "finished" : "waiting";
      this.#dry = !this.#ended;
    }
  }
}

/** The loudest sample of each stretch of sound, for drawing it. */
export class Peaks {
  values = [];
  #stretch;
  #count = 0;

  /** @param {number} stretch samples in one value */
  constructor(stretch) {
    this.#stretch = stretch;
  }

  push(samples) {
    for (const sample of samples) {
      if (this.#count++ % this.#stretch === 0) this.values.push(0);
      const last = this.values.length - 1;
      this.values[last] = Math.max(this.values[last], Math.abs(sample));
    }
  }

  /** @returns {number[]} at most `columns` values over all of the sound */
  columns(columns) {
    const count = Math.min(columns, this.values.length);
    const start = (column) => Math.floor((column * this.values.length) / count);
    return Array.from({ length: count }, (_, column) =>
      Math.max(...this.values.slice(start(column), start(column + 1))),
    );
  }
}

/** What goes before so many bytes of 16-bit mono PCM in a WAV file. @returns {Uint8Array} */
export function wavHeader(bytes, rate) {
  const view = new DataView(new ArrayBuffer(44));
  const name = (offset, text) => [...text].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  name(0, "RIFF");
  view.setUint32(4, 36 + bytes, true);
  name(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); // bytes a second
  view.setUint16(32, 2, true); // bytes a sample
  view.setUint16(34, 16, true); // bits a sample
  name(36, "data");
  view.setUint32(40, bytes, true);
  return new Uint8Array(view.buffer);
}

/**
 * What the listener is told of a run: idle, waiting, playing, buffering, paused, blocked, finished, stopped or failed.
 *
 * @param run null, or what its sink reports (`state`, `heard`), the seconds `received`, and whether the server `failed`
 * @param contextState of the AudioContext: running, suspended, closed, or (Safari: a call, another app) interrupted
 * @param paused whether the listener wants silence
 */
export function shownState(run, contextState, paused) {
  if (!run) return "idle";
  const { state, heard, received, failed } = run;
  if (state === "stopped") return state;
  if (failed && (state === "finished" || !received)) return "failed";
  if (state === "finished") return state;
  if (received && contextState !== "running") return paused ? "paused" : "blocked";
  return state === "waiting" && heard !== null ? "buffering" : state;
}

function greatestCommonDivisor(a, b) {
  return b ? greatestCommonDivisor(b, a % b) : a;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function hann(x) {
  return Math.abs(x) < 1 ? 0.5 + 0.5 * Math.cos(Math.PI * x) : 0;
}
