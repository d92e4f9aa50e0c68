"""Recordings as people have them: any container, codec, sample rate and number of channels, read with PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from cosy_engine.errors import InvalidAudioError

MAX_BYTES = 50 * 2**20
MAX_SECONDS = 300.0
PROMPT_SECONDS = (1.0, 30.0)

_SAMPLE_RATES = (4_000, 192_000)
_SILENCE = 1e-3
_PROMPT_PEAK = 0.8
_TAIL_SECONDS = 0.2
_TRIM_DB = 60.0
_TRIM_HOP_SECONDS = 0.01375  # windows twice as long: 440 and 220 samples at 16 kHz

# Containers of sound alone. Play lists and other formats that name further files or addresses are not among them.
_CONTAINERS = (
    "wav,w64,mp3,mov,mp4,m4a,3gp,3g2,mj2,flac,ogg,matroska,webm,aac,aiff,caf,amr,au,asf,avi,ac3,eac3,mpeg,mpegts,wv,tta"
)
_ESTIMATED = {"mp3", "aac", "ac3", "eac3", "amr", "mpeg", "mpegts"}  # their length is a guess from the bit rate
_COMPLETE = 0.9  # of the length that the file declares
_FULL_SCALE = {"u1": 2**7, "i2": 2**15, "i4": 2**31, "i8": 2**63}


@dataclass(frozen=True)
class Recording:
    """Mono sound: float32 samples `[n]`, nominally in -1..1, all of them finite."""

    samples: np.ndarray
    sample_rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate


def load_audio(source: str | Path | bytes | BinaryIO) -> Recording:
    """Decode a recording at its own sample rate, its channels averaged. The content tells the format, not the name.

    Decoding stops at `MAX_SECONDS`, and what is larger than `MAX_BYTES` is not read. A few damaged packets, such as
    the end of a cut off file, are left out.

    Raises:
        InvalidAudioError: no such file, not a recording, damaged, too large or too long.
    """
    data = read_recording(source)
    if not data:
        raise InvalidAudioError(
            "The recording is empty: the file has no content.", param="prompt_audio", code="no_sound_in_file"
        )
    try:
        container = av.open(io.BytesIO(data), options={"format_whitelist": _CONTAINERS})
    except (av.FFmpegError, OSError, ValueError):
        raise InvalidAudioError(
            "The file is not a recording that can be read: use wav, mp3, m4a, flac, ogg or webm.",
            param="prompt_audio",
            code="not_a_recording",
        ) from None
    with container:
        if not container.streams.audio:
            raise InvalidAudioError(
                "The file has no sound in it, only pictures or text.", param="prompt_audio", code="no_sound_in_file"
            )
        frames, sample_rate = _decode(container)
    samples = np.concatenate(frames) if frames else np.zeros(0, np.float32)
    if not len(samples):
        raise InvalidAudioError(
            "The recording is empty: it has a header and no sound.", param="prompt_audio", code="no_sound_in_file"
        )
    return Recording(samples, sample_rate)


def check_prompt(recording: Recording) -> Recording:
    """The recording as a voice prompt: silence trimmed at both ends, peak at most 0.8, 0.2 s of silence appended.

    Raises:
        InvalidAudioError: silent, or what is left lasts less than 1 s or more than 30 s.
    """
    samples = _finite(recording.samples)
    rate = recording.sample_rate
    peak = float(np.abs(samples).max(initial=0.0))
    if peak < _SILENCE:
        raise InvalidAudioError(
            f"The recording ({recording.seconds:.2f} s) is silent: record again closer to the microphone.",
            param="prompt_audio",
            code="recording_silent",
        )
    samples = trim_silence(samples, rate)
    seconds = len(samples) / rate
    shortest, longest = PROMPT_SECONDS
    if not shortest <= seconds <= longest:
        raise InvalidAudioError(
            f"The recording is {seconds:.2f} s long without the silence at its ends; "
            f"a voice prompt needs {shortest:g} to {longest:g} s of speech.",
            param="prompt_audio",
            code="recording_length",
            seconds=seconds,
            shortest=shortest,
            longest=longest,
        )
    tail = np.zeros(int(min(_TAIL_SECONDS, longest - seconds) * rate), np.float32)
    return Recording(np.concatenate([samples * min(1.0, _PROMPT_PEAK / peak), tail]), rate)


def trim_silence(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Cut what is 60 dB below the loudest moment off both ends, as `librosa.effects.trim` does.

    The loudness is the root mean square in windows of 27.5 ms, centred every 13.75 ms.
    """
    hop = max(1, round(_TRIM_HOP_SECONDS * sample_rate))
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    centres = np.arange(0, len(samples) + 1, hop)
    mean_square = (energy[np.minimum(centres + hop, len(samples))] - energy[np.maximum(centres - hop, 0)]) / (2 * hop)
    loud = np.flatnonzero(mean_square > mean_square.max() * 10 ** (-_TRIM_DB / 10))
    if not len(loud):
        return samples[:0]
    return samples[loud[0] * hop : (loud[-1] + 1) * hop]


def read_recording(source: str | Path | bytes | BinaryIO) -> bytes:
    """The file's content, undecoded.

    Raises:
        InvalidAudioError: it cannot be opened, or is larger than `MAX_BYTES`.
    """
    try:
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        elif isinstance(source, bytes):
            data = source
        else:
            data = source.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidAudioError(f"The recording cannot be opened: {reason}: {source}.", param="prompt_audio") from None
    if len(data) > MAX_BYTES:
        raise InvalidAudioError(
            f"The recording is larger than {MAX_BYTES // 2**20} MB: cut it, or save it as mp3.",
            param="prompt_audio",
            code="recording_too_large",
            megabytes=MAX_BYTES // 2**20,
        )
    return data


def _decode(container: av.container.InputContainer) -> tuple[list[np.ndarray], int]:
    """Mono samples, a piece a frame, and their rate."""
    stream = container.streams.audio[0]
    pieces: list[np.ndarray] = []
    rate = total = bad = 0
    for frame in _frames(container, stream):
        if frame is None:
            bad += 1
            continue
        rate = rate or frame.sample_rate
        if frame.sample_rate != rate or not _SAMPLE_RATES[0] <= rate <= _SAMPLE_RATES[1]:
            raise InvalidAudioError(
                f"The recording's sample rate of {frame.sample_rate} Hz cannot be used: save it at 16 to 48 kHz.",
                param="prompt_audio",
                code="recording_rate",
                rate=frame.sample_rate,
            )
        pieces.append(_mono(frame))
        total += frame.samples
        if total > MAX_SECONDS * rate:
            declared = (container.duration or 0) / av.time_base
            length = f"{declared:.0f} s long" if declared > MAX_SECONDS else f"longer than {MAX_SECONDS:.0f} s"
            raise InvalidAudioError(
                f"The recording is {length}; at most {MAX_SECONDS:.0f} s are read, and a voice prompt needs 1 to 30 s.",
                param="prompt_audio",
                code="recording_too_long",
                seconds=MAX_SECONDS,
            )
    declared = _declared_seconds(container, stream)
    if bad > 1 + len(pieces) // 10 or total < _COMPLETE * declared * rate:
        whole = f" of {declared:.2f} s" if declared else ""
        raise InvalidAudioError(
            f"The recording is damaged: only {total / max(rate, 1):.2f} s{whole} can be decoded.",
            param="prompt_audio",
            code="recording_damaged",
        )
    return pieces, rate


def _declared_seconds(container: av.container.InputContainer, stream: av.AudioStream) -> float:
    """Length that the file says its sound has; 0 if it does not say."""
    if container.format.name in _ESTIMATED:
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame | None]:
    """Decoded frames; None stands for a packet that cannot be decoded, and for the end where reading fails."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, OSError):
            yield None
            return
        try:
            yield from packet.decode()
        except (av.FFmpegError, OSError):
            yield None


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """float32 `[n]` of a frame in any sample format: integers are scaled to -1..1, the channels averaged."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    scale = _FULL_SCALE.get(values.dtype.str[1:])
    if scale is not None:
        offset = scale if values.dtype.kind == "u" else 0
        values = (values.astype(np.float64) - offset) / scale
    return _finite(values).mean(axis=0, dtype=np.float32)


def _finite(values: np.ndarray) -> np.ndarray:
    """float32, with zeros for what is not a finite number."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
