// The live player on the page: takes packets from the server, plays them as they come and shows how it goes.

import { PacketOrder, Peaks, PcmDecoder, Resampler, shownState, StartBuffer, wavHeader } from "./player_core.js";

const LOST_PACKET_SECONDS = 1; // how long those behind it wait for a packet
const IDLE_SECONDS = 2; // after which the sound device is given back
const STOPPING_SECONDS = 1;
const LEAD_SECONDS = 0.1; // a source that is told too late when to start runs into the next one
const PEAK_SECONDS = 0.02;
const COLUMN_PIXELS = 3;
const NOTHING_YET = { state: "waiting", heard: null, underruns: 0, played: 0, buffered: 0 };

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
      this.#until = this.#context.currentTime + LEAD_SECONDS;
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

/** Plays nothing, where a browser cannot play what is still being made. */
class SilentSink {
  constructor(_context, report) {
    this.end = () => report({ ...NOTHING_YET, state: "finished" });
  }

  push() {}

  stop() {}
}

/** What one click on Generate made: its packets on their way to a sink, and what is known of them. */
class Run {
  job = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  clicked = performance.now();
  report = NOTHING_YET;
  firstSound = null; // seconds from the click
  received = 0; // seconds
  failed = false;
  recording = null; // the whole of it as a WAV file, once everything is there
  peaks;
  #order = new PacketOrder();
  #decoder = new PcmDecoder();
  #parts = [];
  #resampler;
  #sink;
  #rate;
  #impatience;

  /** @param context null where there is none; `rate` is that of the packets */
  constructor(context, Sink, rate, changed) {
    this.#rate = rate;
    this.peaks = new Peaks(PEAK_SECONDS * rate);
    const playedAt = context?.sampleRate ?? rate;
    this.#resampler = playedAt === rate ? null : new Resampler(rate, playedAt);
    this.#sink = new Sink(context, (report) => {
      this.report = report;
      if (report.heard !== null) this.firstSound ??= this.#secondsSinceClick(context, report.heard);
      changed();
    });
  }

  get over() {
    return ["finished", "stopped"].includes(this.report.state);
  }

  /** @param packet {sequence, pcm} with base64; after the last {sequence, end: true}, with `failed` if it broke off */
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

  /** Nothing more will come; what is there is played. */
  fail() {
    clearTimeout(this.#impatience);
    this.failed = true;
    this.#sink.end();
  }

  stop() {
    clearTimeout(this.#impatience);
    this.#sink.stop();
    this.report = { ...this.report, state: "stopped", buffered: 0 };
  }

  #play(packet) {
    if (packet.end) {
      if (this.#resampler) this.#push(this.#resampler.finish());
      if (packet.failed) this.fail();
      else this.#finish();
      return;
    }
    const bytes = Uint8Array.from(atob(packet.pcm), (byte) => byte.charCodeAt(0));
    const samples = this.#decoder.decode(bytes);
    this.#parts.push(bytes);
    this.peaks.push(samples);
    this.received += samples.length / this.#rate;
    this.#push(this.#resampler ? this.#resampler.process(samples) : samples);
  }

  #finish() {
    const bytes = this.#parts.reduce((sum, part) => sum + part.length, 0);
    this.recording = new Blob([wavHeader(bytes, this.#rate), ...this.#parts.splice(0)], { type: "audio/wav" });
    this.#sink.end();
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
  #paused = false; // by the listener
  #stopped = -Infinity; // when
  #address = null; // of the finished recording
  #idle;
  #frame = null;

  constructor(element, { rate, say, worklet }) {
    this.#element = element;
    this.#rate = rate;
    this.#say = say;
    this.#worklet = worklet;
    element.querySelector(".live").setAttribute("aria-label", say("region"));
    this.#find("canvas").setAttribute("aria-label", say("waveform"));
    this.#find("audio").setAttribute("aria-label", say("whole"));
    this.#find(".download").textContent = say("download");
    for (const counter of ["first", "buffered", "underruns"]) this.#find(`.${counter} dt`).textContent = say(counter);
    this.#find("button").addEventListener("click", () => this.#pauseOrResume());
    this.#find("audio").addEventListener("play", () => this.stop());
    this.#find("audio").addEventListener("timeupdate", () => this.#changed());
    this.#find("canvas").addEventListener("click", (click) => this.#seek(click));
    new ResizeObserver(() => this.#changed()).observe(this.#find("canvas"));
    document.addEventListener("visibilitychange", () => this.#wake());
    if (!globalThis.AudioContext) this.#notice(say("no_sound"));
    else if (!("audioWorklet" in AudioContext.prototype)) this.#notice(say("no_worklet"));
    this.#changed();
  }

  /** Call it in a click or a key press, where browsers allow sound; a run may then start a moment later. */
  unlock() {
    if (!globalThis.AudioContext) return;
    clearTimeout(this.#idle);
    if (navigator.audioSession) navigator.audioSession.type = "playback"; // iPhones: also when set to silent
    this.#context ??= this.#makeContext();
    this.#resume();
    this.#changed();
  }

  /** Begins anew; call it in the click. @returns the job id that the server's packets must carry */
  async start() {
    if (!this.#run?.over) this.#run?.stop();
    this.unlock();
    this.#paused = false;
    this.#hasWorklet ??= this.#loadWorklet();
    const Sink = (await this.#hasWorklet) ? WorkletSink : this.#context ? ScheduledSink : SilentSink;
    if (!this.#run?.over) this.#run?.stop(); // that of another click
    this.#showRecording(null);
    this.#run = new Run(this.#context, Sink, this.#rate, () => this.#changed());
    this.#changed();
    return this.#run.job;
  }

  /** Takes a value of the component as the server sends it. */
  feed(value) {
    if (!value) return;
    const packet = JSON.parse(value);
    if (packet.job !== this.#run?.job || this.#run.over) return;
    const begins = !this.#run.received;
    this.#run.take(packet);
    if (begins && this.#run.received) this.#element.scrollIntoView({ block: "nearest", behavior: "smooth" });
    this.#changed();
  }

  /** The server will send nothing more. @returns whether that is a fault: it does the same soon after a stop */
  fail() {
    if (!this.#run || this.#run.over || this.#run.recording) return false;
    if (performance.now() - this.#stopped < 1000 * STOPPING_SECONDS) return false;
    this.#run.fail();
    this.#changed();
    return true;
  }

  /** Silence at once, whatever is still to come. */
  stop() {
    this.#stopped = performance.now();
    if (!this.#run || this.#run.over) return;
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
    context.addEventListener("statechange", () => this.#wake());
    return context;
  }

  async #loadWorklet() {
    if (!this.#context?.audioWorklet) return false;
    try {
      await this.#context.audioWorklet.addModule(this.#worklet);
      return true;
    } catch {
      this.#notice(this.#say("no_worklet"));
      return false;
    }
  }

  #pauseOrResume() {
    this.#paused = this.#context.state === "running";
    if (this.#paused) this.#suspend();
    else this.#resume();
  }

  #suspend() {
    this.#context.suspend().catch(() => {}); // fails in a call, where there is silence anyhow
  }

  /** Never settles while the browser forbids sound, and fails in a call: nobody waits for it. */
  #resume() {
    this.#context.resume().catch(() => {});
  }

  /** Goes on after a phone call or another app has taken the sound away. */
  #wake() {
    if (this.#busy && !this.#paused && !document.hidden && this.#context?.state !== "running") this.#resume();
    this.#changed();
  }

  #showRecording(recording) {
    const audio = this.#find("audio");
    audio.pause();
    if (this.#address) URL.revokeObjectURL(this.#address);
    this.#address = recording && URL.createObjectURL(recording);
    if (!recording) {
      audio.removeAttribute("src");
      return;
    }
    audio.src = this.#address;
    this.#find(".download").href = this.#address;
    const now = new Date(Date.now() - 60_000 * new Date().getTimezoneOffset()).toISOString();
    this.#find(".download").download = `CosyVoice ${now.slice(0, 19).replace("T", " ").replaceAll(":", ".")}.wav`;
  }

  #seek(click) {
    const audio = this.#find("audio");
    if (audio.hidden || !audio.duration) return;
    audio.currentTime = (click.offsetX / click.currentTarget.clientWidth) * audio.duration;
    audio.play().catch(() => {}); // fails when a new run takes it away
  }

  #notice(text) {
    this.#find(".notice").textContent = text;
    this.#find(".notice").hidden = false;
  }

  #find(selector) {
    return this.#element.querySelector(selector);
  }

  get #state() {
    const run = this.#run && { ...this.#run.report, received: this.#run.received, failed: this.#run.failed };
    return shownState(run, this.#context?.state ?? "running", this.#paused);
  }

  get #busy() {
    return ["waiting", "playing", "buffering", "paused", "blocked"].includes(this.#state);
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
    if (run?.recording && !this.#address) this.#showRecording(run.recording);
    const state = this.#state;
    const busy = this.#busy;
    const live = this.#find(".live");
    live.dataset.state = state;
    live.dataset.job = run?.job ?? "";
    live.toggleAttribute("data-empty", !run?.received);
    if (this.#find(".state").textContent !== say(state)) this.#find(".state").textContent = say(state);
    this.#find(".first dd").textContent = run?.firstSound == null ? "–" : `${run.firstSound.toFixed(2)} s`;
    this.#find(".buffered dd").textContent = `${(run?.report.buffered ?? 0).toFixed(1)} s`;
    this.#find(".underruns dd").textContent = run?.report.underruns ?? 0;
    this.#find("button").hidden = !busy;
    this.#find("button").textContent = ["paused", "blocked"].includes(state) ? say("resume") : say("pause");
    this.#find("audio").hidden = busy || !this.#address;
    this.#find(".download").hidden = !this.#address;
    this.#draw();
    clearTimeout(this.#idle);
    if (!busy && this.#context?.state === "running") this.#idle = setTimeout(() => this.#rest(), 1000 * IDLE_SECONDS);
  }

  #rest() {
    this.#suspend();
    if (navigator.audioSession) navigator.audioSession.type = "auto";
  }

  #draw() {
    const canvas = this.#find("canvas");
    const ratio = globalThis.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const style = getComputedStyle(canvas);
    const painter = canvas.getContext("2d");
    painter.scale(ratio, ratio);
    if (!this.#run?.received) {
      painter.fillStyle = style.getPropertyValue("--unplayed");
      painter.fillRect(0, height / 2, width, 1);
      return;
    }
    const columns = this.#run.peaks.columns(Math.floor(width / COLUMN_PIXELS));
    const step = this.#run.recording ? width / columns.length : COLUMN_PIXELS;
    const audio = this.#find("audio");
    const heard = audio.currentTime || this.#run.report.played;
    const played = columns.length * Math.min(1, heard / this.#run.received);
    columns.forEach((peak, column) => {
      const tall = Math.max(1, Math.min(1, peak) * height);
      painter.fillStyle = column < played ? style.getPropertyValue("--played") : style.getPropertyValue("--unplayed");
      painter.fillRect(column * step, (height - tall) / 2, step - 1, tall);
    });
  }
}
