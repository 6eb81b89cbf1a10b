"""Audio files become the samples that speech models take, or a clear refusal."""

import io
import struct

import numpy as np
import pytest
import soundfile

from shuteye.audio import SAMPLE_RATE, decode, samples_from, samples_of
from shuteye.errors import InvalidRequest

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


def tone(seconds=1.0, rate=SAMPLE_RATE, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("float32")


def file_of(samples, rate=SAMPLE_RATE, *, kind="wav"):
    container, subtype = FORMATS[kind]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def heard(file, **options):
    return np.frombuffer(decode(file, **options), dtype="<f4")


def pitch(samples):
    """The loudest frequency, in hertz."""
    return int(np.argmax(np.abs(np.fft.rfft(samples))) * SAMPLE_RATE / len(samples))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_every_format_at_every_rate_is_heard_alike(kind, rate):
    """A rate that is taken for 16 kHz, so that all voices are too high."""
    found = heard(file_of(tone(2.0, rate), rate, kind=kind))
    assert len(found) == pytest.approx(2 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)
    assert pitch(found) == pytest.approx(440, abs=3)
    assert found.std() == pytest.approx(0.5 / np.sqrt(2), abs=0.03)


def test_channels_are_averaged():
    """One channel alone, or both one after the other."""
    left, right = tone(hertz=300), tone(hertz=2000)
    found = heard(file_of(np.stack([left, right], axis=1)))
    assert np.allclose(found, (left + right) / 2, atol=1e-3)


def test_at_16_khz_nothing_is_changed():
    """A resampler that filters what needs no resampling."""
    samples = tone()
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    assert np.array_equal(heard(buffer.getvalue()), samples)


@pytest.mark.parametrize("file", [b"", b"\0" * 1000, b"RIFF", b"<html>", file_of(tone(0.0)), file_of(tone())[:30]])
def test_what_is_no_audio_is_refused(file):
    """An empty transcript, or a 500, for a broken upload."""
    with pytest.raises(InvalidRequest) as refused:
        decode(file)
    assert refused.value.param == "file"


def test_a_recording_that_is_too_long_is_refused_before_it_is_whole():
    """A small file that unpacks to more than the memory."""
    hour = file_of(np.zeros(3600 * 8000, dtype="float32"), 8000, kind="flac")
    assert len(hour) < 100_000
    with pytest.raises(InvalidRequest, match="longer than the 60 seconds"):
        decode(hour, max_seconds=60)


def test_what_llm_takes_for_a_recording(tmp_path):
    """A path that is decoded as if it were a file, or an array that is."""
    samples = tone()
    path = tmp_path / "tone.wav"
    path.write_bytes(file_of(samples))
    assert samples_from(path) == samples_from(str(path)) == samples_from(path.read_bytes())
    assert samples_from(samples) == samples_of(samples.tolist()) == samples.tobytes()
    with pytest.raises(InvalidRequest, match="cannot be opened"):
        samples_from(tmp_path / "none.wav")
    with pytest.raises(InvalidRequest, match="one dimension"):
        samples_from(np.zeros((2, 2)))
    with pytest.raises(InvalidRequest, match="NaN"):
        samples_from(np.array([0.0, np.nan]))


def wav(rate, *, nbytes=64_000, channels=1):
    """A wav file by its header: silence at whatever rate it says."""
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * 2 * channels & 0xFFFFFFFF, 2 * channels, 16)
    body = b"WAVEfmt " + head + b"data" + struct.pack("<I", nbytes) + bytes(nbytes)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("rate", [1, 2, 8, 999, 768_001, 2**31 - 1])
def test_a_rate_that_nobody_records_at_is_refused(rate):
    """A file of 64 KB that declares 8 Hz, and takes gigabytes once it is resampled."""
    with pytest.raises(InvalidRequest, match="Hz") as refused:
        decode(wav(rate))
    assert refused.value.param == "file"


@pytest.mark.parametrize("rate", [1000, 4000, 768_000])
def test_unusual_rates_are_heard(rate):
    """A bound that is too narrow."""
    assert len(heard(wav(rate))) == pytest.approx(32_000 * SAMPLE_RATE / rate, rel=0.01)


def test_what_is_too_long_is_never_resampled(monkeypatch):
    """A length that is looked at only once the memory was taken."""
    monkeypatch.setattr("soxr.ResampleStream.resample_chunk", lambda *_args, **_options: pytest.fail("resampled"))
    with pytest.raises(InvalidRequest, match="longer than the 20 seconds"):
        decode(wav(1000), max_seconds=20)


def test_a_block_has_the_same_size_however_many_channels(monkeypatch):
    """A thousand channels that take a thousand times the memory."""
    sizes = []
    read = soundfile.SoundFile.read

    def noted(self, *args, **options):
        sizes.append((block := read(self, *args, **options)).size)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", noted)
    heard(wav(16_000, channels=255, nbytes=255 * 2 * 4000))
    assert max(sizes) <= 1 << 16
