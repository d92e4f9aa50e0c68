// The live player on the page: takes packets from the server, plays them as they come and shows how it goes.

import { PacketOrder, Peaks, PcmDecoder, Resampler, StartBuffer } from "./player_core.js";

const LOST_PACKET_SECONDS = 1; // how long those behind it wait for a packet
const IDLE_SECONDS = 2; // after which the sound device is given back
const PEAK_SECONDS = 0.02;
const COLUMN_PIXELS = 3;

/** Plays in the audio thread. Sinks take samples of the context's rate and report seconds. */
export class WorkletSink {
  #node;

  constructor(context, report) {
    this.#node = new AudioWorkletNode(context, "live-player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#node.port.onmessage = ({ data }) => report(data);
    this.#node.connect(context.destination);
  }

  push(samples) {
    this.#node.port.postMessage(samples, [samples.buffer]);
  }

  end() {
    this.#node.port.postMessage("end");
  }

  stop() {
    this.#node.port.onmessage = null;
    this.#node.port.postMessage("stop");
    this.#node.disconnect();
  }
}

/** Does the same without an audio worklet: a buffer source for each packet, one behind the other. */
export class ScheduledSink {
  #context;
  #report;
  #start = new StartBuffer();
  #sources = new Set();
  #pending = []; // not scheduled yet
  #scheduled = 0; // seconds
  #until = null; // when the last scheduled sound ends
  #heard = null;
  #underruns = 0;
  #ended = false;
  #timer;

  constructor(context, report) {
    this.#context = context;
    this.#report = report;
    this.#timer = setInterval(() => this.#tell(), 100);
  }

  push(samples) {
    if (this.#until !== null && !this.#ahead && !this.#pending.length) {
      this.#underruns++;
      this.#start.grow();
    }
    this.#pending.push(samples);
    this.#schedule();
  }

  end() {
    this.#ended = true;
    this.#schedule();
  }

  stop() {
    clearInterval(this.#timer);
    for (const source of this.#sources) source.stop();
  }

  get #pendingSeconds() {
    return this.#pending.reduce((sum, samples) => sum + samples.length, 0) / this.#context.sampleRate;
  }

  get #ahead() {
    return Math.max(0, (this.#until ?? 0) - this.#context.currentTime);
  }

  #schedule() {
    if (!this.#pending.length) return;
    if (!this.#ahead) {
      if (!this.#ended && this.#pendingSeconds < this.#start.seconds) return;
      this.#until = this.#context.currentTime + 0.02; // so that the first sound is not cut
      this.#heard ??= this.#until;
    }
    for (const samples of this.#pending.splice(0)) {
      const buffer = this.#context.createBuffer(1, samples.length, this.#context.sampleRate);
      buffer.copyToChannel(samples, 0);
      const source = this.#context.createBufferSource();
      source.buffer = buffer;
      source.connect(this.#context.destination);
      source.onended = () => this.#sources.delete(source);
      source.start(this.#until);
      this.#sources.add(source);
      this.#until += buffer.duration;
      this.#scheduled += buffer.duration;
    }
  }

  #tell() {
    const ahead = this.#ahead;
    const done = this.#ended && !ahead && !this.#pending.length;
    if (done) clearInterval(this.#timer);
    this.#report({
      state: done ? "finished" : ahead ? "playing" : "waiting",
      heard: this.#heard,
      underruns: this.#underruns,
      played: Math.max(0, this.#scheduled - ahead),
      buffered: ahead + this.#pendingSeconds,
    });
  }
}

/** What one click on Generate made: its packets on their way to a sink, and what is known of them. */
class Run {
  job = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  clicked = performance.now();
  report = { state: "waiting", heard: null, underruns: 0, played: 0, buffered: 0 };
  firstSound = null; // seconds from the click
  received = 0; // seconds
  peaks;
  #order = new PacketOrder();
  #decoder = new PcmDecoder();
  #resampler;
  #sink;
  #rate;
  #impatience;

  constructor(context, makeSink, rate, changed) {
    this.#rate = rate;
    this.peaks = new Peaks(PEAK_SECONDS * rate);
    this.#resampler = context.sampleRate === rate ? null : new Resampler(rate, context.sampleRate);
    this.#sink = makeSink((report) => {
      this.report = report;
      if (report.heard !== null) this.firstSound ??= this.#secondsSinceClick(context, report.heard);
      changed();
    });
  }

  /** @param packet {sequence, pcm} with base64, or {sequence, end: true} after the last */
  take(packet) {
    clearTimeout(this.#impatience);
    this.#order.accept(packet.sequence, packet).forEach((ready) => this.#play(ready));
    if (this.#order.waiting) {
      this.#impatience = setTimeout(
        () => this.#order.skipLost().forEach((ready) => this.#play(ready)),
        1000 * LOST_PACKET_SECONDS,
      );
    }
  }

  stop() {
    clearTimeout(this.#impatience);
    this.#sink.stop();
    this.report = { ...this.report, state: "stopped", buffered: 0 };
  }

  #play(packet) {
    if (packet.end) {
      if (this.#resampler) this.#push(this.#resampler.finish());
      this.#sink.end();
      return;
    }
    const samples = this.#decoder.decode(Uint8Array.from(atob(packet.pcm), (byte) => byte.charCodeAt(0)));
    this.peaks.push(samples);
    this.received += samples.length / this.#rate;
    this.#push(this.#resampler ? this.#resampler.process(samples) : samples);
  }

  #push(samples) {
    if (samples.length) this.#sink.push(samples);
  }

  #secondsSinceClick(context, moment) {
    const ago = context.currentTime - moment - (context.outputLatency || context.baseLatency || 0);
    return (performance.now() - this.clicked) / 1000 - ago;
  }
}

/** The component: `element` is its HTML, `say(name)` its words, `worklet` the address of player_worklet.js. */
export class Player {
  #element;
  #rate;
  #say;
  #worklet;
  #context = null;
  #hasWorklet = null;
  #run = null;
  #idle;
  #frame = null;

  constructor(element, { rate, say, worklet }) {
    this.#element = element;
    this.#rate = rate;
    this.#say = say;
    this.#worklet = worklet;
    element.querySelector(".live").setAttribute("aria-label", say("region"));
    this.#find("canvas").setAttribute("aria-label", say("waveform"));
    for (const counter of ["first", "buffered", "underruns"]) this.#find(`.${counter} dt`).textContent = say(counter);
    this.#find("button").addEventListener("click", () => this.#pauseOrResume());
    new ResizeObserver(() => this.#changed()).observe(this.#find("canvas"));
    if (!globalThis.AudioContext) this.#notice(say("no_sound"));
    else if (!("audioWorklet" in AudioContext.prototype)) this.#notice(say("no_worklet"));
    this.#changed();
  }

  /** Begins anew; call it in the click. @returns the job id that the server's packets must carry */
  async start() {
    this.stop();
    if (!globalThis.AudioContext) return "";
    clearTimeout(this.#idle);
    this.#context ??= this.#makeContext();
    this.#context.resume(); // never settles while the browser forbids sound, so it is not waited for
    this.#hasWorklet ??= this.#loadWorklet();
    const Sink = (await this.#hasWorklet) ? WorkletSink : ScheduledSink;
    this.#run?.stop();
    this.#run = new Run(
      this.#context,
      (report) => new Sink(this.#context, report),
      this.#rate,
      () => this.#changed(),
    );
    this.#changed();
    return this.#run.job;
  }

  /** Takes a value of the component as the server sends it. */
  feed(value) {
    if (!value) return;
    const packet = JSON.parse(value);
    if (packet.job !== this.#run?.job || this.#run.report.state === "stopped") return;
    this.#run.take(packet);
    this.#changed();
  }

  /** Silence at once, whatever is still to come. */
  stop() {
    if (!this.#run || ["finished", "stopped"].includes(this.#run.report.state)) return;
    this.#run.stop();
    this.#changed();
  }

  #makeContext() {
    let context;
    try {
      context = new AudioContext({ sampleRate: this.#rate, latencyHint: "playback" });
    } catch {
      context = new AudioContext({ latencyHint: "playback" });
    }
    context.addEventListener("statechange", () => this.#changed());
    return context;
  }

  async #loadWorklet() {
    if (!this.#context.audioWorklet) return false;
    try {
      await this.#context.audioWorklet.addModule(this.#worklet);
      return true;
    } catch {
      this.#notice(this.#say("no_worklet"));
      return false;
    }
  }

  #pauseOrResume() {
    if (this.#context.state === "running") this.#context.suspend();
    else this.#context.resume();
  }

  #notice(text) {
    this.#find(".notice").textContent = text;
    this.#find(".notice").hidden = false;
  }

  #find(selector) {
    return this.#element.querySelector(selector);
  }

  /** Shows everything anew, once a frame at most. */
  #changed() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#show();
    });
  }

  #show() {
    const say = this.#say;
    const run = this.#run;
    const state = this.#state();
    const busy = ["waiting", "playing", "buffering", "paused"].includes(state);
    const live = this.#find(".live");
    live.dataset.state = state;
    live.dataset.job = run?.job ?? "";
    if (this.#find(".state").textContent !== say(state)) this.#find(".state").textContent = say(state);
    this.#find(".first dd").textContent = run?.firstSound == null ? "–" : `${run.firstSound.toFixed(2)} s`;
    this.#find(".buffered dd").textContent = `${(run?.report.buffered ?? 0).toFixed(1)} s`;
    this.#find(".underruns dd").textContent = run?.report.underruns ?? 0;
    const button = this.#find("button");
    button.disabled = !busy;
    button.textContent = state === "paused" ? say("resume") : say("pause");
    this.#draw();
    clearTimeout(this.#idle);
    if (run && !busy) this.#idle = setTimeout(() => this.#context.suspend(), 1000 * IDLE_SECONDS);
  }

  #state() {
    if (!this.#run) return "idle";
    const { state, heard } = this.#run.report;
    if (state === "finished" || state === "stopped") return state;
    if (this.#context.state !== "running" && this.#run.received) return "paused";
    return state === "waiting" && heard !== null ? "buffering" : state;
  }

  #draw() {
    const canvas = this.#find("canvas");
    const ratio = globalThis.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    if (!this.#run) return;
    const style = getComputedStyle(canvas);
    const painter = canvas.getContext("2d");
    painter.scale(ratio, ratio);
    const columns = this.#run.peaks.columns(Math.floor(width / COLUMN_PIXELS));
    const played = columns.length * Math.min(1, this.#run.report.played / this.#run.received);
    columns.forEach((peak, column) => {
      const tall = Math.max(1, Math.min(1, peak) * height);
      painter.fillStyle = column < played ? style.getPropertyValue("--played") : style.getPropertyValue("--unplayed");
      painter.fillRect(column * COLUMN_PIXELS, (height - tall) / 2, COLUMN_PIXELS - 1, tall);
    });
  }
}
