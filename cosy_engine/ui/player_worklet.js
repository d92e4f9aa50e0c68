// The audio thread's part: plays what the page posts and tells how it goes.

import { Playback } from "./player_core.js";

const REPORT_SECONDS = 0.1;

class LivePlayer extends AudioWorkletProcessor {
  #playback = new Playback(sampleRate);
  #stopped = false;
  #heard = null; // when the first sample was played
  #told = { state: null, time: 0 };

  constructor() {
    super();
    this.port.onmessage = ({ data }) => {
      if (data === "stop") this.#stopped = true;
      else if (data === "end") this.#playback.end();
      else this.#playback.push(data);
    };
  }

  process(_inputs, [[output]]) {
    if (this.#stopped) return false;
    this.#playback.fill(output);
    const { state, played, buffered, underruns } = this.#playback;
    if (played && this.#heard === null) this.#heard = currentTime;
    if (state !== this.#told.state || currentTime - this.#told.time >= REPORT_SECONDS) {
      this.#told = { state, time: currentTime };
      const heard = this.#heard;
      this.port.postMessage({
        state,
        heard,
        underruns,
        played: played / sampleRate,
        buffered: buffered / sampleRate,
      });
    }
    return state !== "finished";
  }
}

registerProcessor("live-player", LivePlayer);
