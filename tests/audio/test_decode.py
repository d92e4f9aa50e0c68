"""Recordings as users have them, and what they are told when one cannot be used."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from cosy_engine.audio.decode import MAX_BYTES, Recording, check_prompt, load_audio
from cosy_engine.errors import InvalidAudioError
from tests.recordings import encoded, hum


def compressed(container: str, codec: str, seconds: float = 2.0, rate: int = 48_000) -> bytes:
    """A recording as phones (m4a) and browsers (webm) make it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(hum(seconds, rate)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, "mono", rate, frame_size=context.frame_size or 0)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    return buffer.getvalue()


def film() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for _ in range(10):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def pcm(subtype: str, rate: int = 44_100, channels: int = 2) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, hum(2, rate, channels), rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


FORMATS = {
    "8-bit wav": lambda: pcm("PCM_U8"),
    "16-bit wav": lambda: pcm("PCM_16"),
    "24-bit wav": lambda: pcm("PCM_24"),
    "32-bit wav": lambda: pcm("PCM_32"),
    "float wav": lambda: pcm("FLOAT"),
    "double wav": lambda: pcm("DOUBLE"),
    "8 kHz wav": lambda: pcm("PCM_16", 8_000),
    "5-channel wav": lambda: pcm("PCM_16", 48_000, 5),
    "mp3": lambda: encoded(hum(2), kind="MP3"),
    "flac": lambda: encoded(hum(2), kind="FLAC"),
    "ogg": lambda: encoded(hum(2), kind="OGG"),
    "m4a": lambda: compressed("mp4", "aac"),
    "webm": lambda: compressed("webm", "libopus"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_sound(kind: str) -> None:
    recording = load_audio(FORMATS[kind]())
    assert recording.samples.dtype == np.float32 and recording.samples.ndim == 1
    assert recording.seconds == pytest.approx(2, abs=0.1)
    channels = {"5-channel wav": 5}.get(kind, 2 if "wav" in kind else 1)
    loudness = 1 - 0.1 * (channels - 1) / 2  # the average of hum's channels
    expected = np.sqrt(np.square(hum(2, 8_000)).mean()) * loudness
    assert np.sqrt(np.square(recording.samples).mean()) == pytest.approx(expected, rel=0.05)


def test_scale_is_exact() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0, -32768, 16384, -1] * 100, np.int16), 16_000, format="WAV")
    assert load_audio(buffer.getvalue()).samples[:4].tolist() == [0, -1, 0.5, -1 / 32768]


def test_the_content_tells_the_format_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "voice.wav").write_bytes(encoded(hum(2), kind="MP3"))
    assert load_audio(tmp_path / "voice.wav").seconds == pytest.approx(2, abs=0.1)


def test_path_bytes_and_open_file_are_the_same(tmp_path: Path) -> None:
    data = encoded(hum(1))
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    for source in (path, str(path), io.BytesIO(data)):
        assert np.array_equal(load_audio(source).samples, load_audio(data).samples)


def test_a_streamed_wav_with_unknown_length_reads() -> None:
    data = bytearray(encoded(hum(2)))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    assert load_audio(bytes(data)).seconds == 2


def test_samples_that_are_not_numbers_become_silence() -> None:
    samples = hum(2)
    samples[100:200] = np.nan
    samples[300] = np.inf
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV", subtype="FLOAT")
    decoded = load_audio(buffer.getvalue()).samples
    assert np.isfinite(decoded).all() and not decoded[100:200].any()


FLAC = encoded(hum(3), kind="FLAC")
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
HUGE_RATE = b"RIFF" + struct.pack(
    "<I4s4sIHHIIHH4sI", 10_036, b"WAVE", b"fmt ", 16, 1, 1, 700_000, 1_400_000, 2, 16, b"data", 10_000
)

BROKEN = {
    "nothing": (b"", "empty"),
    "only a header": (encoded(hum(1))[:44], "empty"),
    "cut in the header": (encoded(hum(1))[:20], "not a recording"),
    "text": (b"Dear reader,\n" * 1000, "not a recording"),
    "noise": (np.random.default_rng(0).bytes(50_000), "not a recording"),
    "play list": (PLAYLIST, "not a recording"),
    "list of files": (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a recording"),
    "half a flac": (FLAC[: len(FLAC) // 2], r"only 1\.\d+ s of 3\.00 s"),
    "flac with a hole": (FLAC[:5000] + b"\x55" * (len(FLAC) - 10_000) + FLAC[-5000:], "damaged"),
    "half an m4a": (compressed("mp4", "aac")[:8000], "not a recording"),
    "film without sound": (film(), "no sound"),
    "impossible sample rate": (HUGE_RATE + b"\x01\x02" * 5_000, "700000 Hz"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_used_is_refused_in_one_sentence(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, message = BROKEN[kind]
    with pytest.raises(InvalidAudioError, match=message) as caught:
        load_audio(data)
    assert caught.value.param == "prompt_audio" and "\n" not in caught.value.message
    assert caught.value.__cause__ is None  # no traceback of the decoder
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["missing.wav", ".", "a\0b.wav", "http://127.0.0.1:9/a.wav"])
def test_what_cannot_be_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAudioError, match="cannot be opened"):
        load_audio(name if "/" in name else tmp_path / name)


def test_a_damaged_file_never_ends_in_anything_but_a_recording_or_a_clear_error() -> None:
    numbers = np.random.default_rng(0)
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        intact = encoded(hum(1.2), kind=kind)
        for _ in range(25):
            data = np.frombuffer(intact, np.uint8).copy()
            where = numbers.integers(0, len(data) if numbers.random() < 0.5 else 200, 20)
            data[where] = numbers.integers(0, 256, 20)
            try:
                assert np.isfinite(load_audio(data.tobytes()).samples).all()
            except InvalidAudioError:
                continue


def test_an_hour_is_refused_with_its_length_without_decoding_all_of_it() -> None:
    with pytest.raises(InvalidAudioError, match="3600 s long"):
        load_audio(encoded(np.zeros(3600 * 8_000, np.float32), 8_000, "FLAC"))


def test_a_file_too_large_is_not_read_to_its_end() -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= MAX_BYTES + 1
            return bytes(size)

    with pytest.raises(InvalidAudioError, match="larger than 50 MB"):
        load_audio(Endless())


def test_a_prompt_loses_the_silence_at_its_ends() -> None:
    silence = np.zeros(16_000, np.float32)
    prompt = check_prompt(Recording(np.concatenate([silence, hum(2), silence]), 16_000))
    assert prompt.seconds == pytest.approx(2.2, abs=0.05)  # 0.2 s of silence stay at its end
    assert not prompt.samples[-3_200:].any()
    assert check_prompt(prompt).seconds == pytest.approx(prompt.seconds, abs=0.05)


def test_a_loud_prompt_is_made_quieter_and_a_quiet_one_stays() -> None:
    assert np.abs(check_prompt(Recording(hum(2) * 50, 16_000)).samples).max() == pytest.approx(0.8)
    quiet = hum(2) * 0.1
    assert np.abs(check_prompt(Recording(quiet, 16_000)).samples).max() == np.abs(quiet).max()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (hum(0.3), r"0\.30 s"),
        (hum(45), r"45\.00 s"),
        (np.concatenate([np.zeros(32_000, np.float32), hum(0.5)]), r"0\.5\d? s"),
        (np.zeros(48_000, np.float32), r"\(3\.00 s\) is silent"),
        (np.full(48_000, np.nan, np.float32), "silent"),
        (np.zeros(0, np.float32), "silent"),
    ],
)
def test_prompts_of_the_wrong_length_are_refused_with_the_length_found(samples: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidAudioError, match=message):
        check_prompt(Recording(samples, 16_000))


def test_thirty_seconds_are_still_good() -> None:
    assert check_prompt(Recording(hum(30), 16_000)).seconds == 30
