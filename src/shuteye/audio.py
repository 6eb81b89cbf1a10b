"""Audio files → samples as speech models take them: one channel, 16 kHz, float32.

Formats are libsndfile's: wav, flac, mp3, ogg (Vorbis, Opus) and others like them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shuteye.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

Audio = Any
"""A path, the bytes of a file, or an array of samples at `SAMPLE_RATE`: whatever `samples_from` takes."""

SAMPLE_RATE = 16_000
SAMPLE_BYTES = 4

READABLE = "wav, flac, mp3 and ogg (Vorbis or Opus)"
MIN_RATE, MAX_RATE = 1_000, 768_000
"""Rates that audio has; a file that says 2 Hz would become 8,000 times its size."""
_BLOCK_SAMPLES = 1 << 16
"""Read at once, all channels together."""


def decode(file: bytes, *, max_seconds: float | None = None) -> bytes:
    """The samples of an audio file as little-endian float32, channels averaged, resampled with soxr.

    Read block by block, and measured before it is resampled, so that a small file that unpacks to hours is refused
    before it fills the memory.

    Raises:
        InvalidRequest: no audio, broken, empty, or longer than `max_seconds`; `param` is "file".
    """
    if not file:
        raise InvalidRequest("The audio file is empty.", param="file")
    samples = b"".join(samples_of(block) for block in _blocks(file, max_seconds))
    if not samples:
        raise InvalidRequest("The audio file has no samples.", param="file")
    return samples


def samples_from(audio: Audio) -> bytes:
    """The samples of audio in any form that a caller may give: a path, the bytes of a file, or an array at 16 kHz.

    Raises:
        InvalidRequest: there is no such file, or as `decode` and `samples_of`.
    """
    if isinstance(audio, bytes | bytearray | memoryview):
        return decode(bytes(audio))
    if isinstance(audio, str | Path):
        try:
            return decode(Path(audio).read_bytes())
        except OSError as error:
            raise InvalidRequest(f"The audio file cannot be opened: {error}.", param="file") from error
    return samples_of(audio)


def samples_of(samples: Any) -> bytes:
    """An array (or sequence) of numbers at 16 kHz as the bytes that requests carry.

    Raises:
        InvalidRequest: it has more than one dimension, or values that are no numbers.
    """
    import numpy as np

    array = np.asarray(samples, dtype="<f4")
    if array.ndim != 1:
        raise InvalidRequest(f"Samples must have one dimension, got shape {array.shape}.", param="file")
    if not np.isfinite(array).all():
        raise InvalidRequest("The audio has samples that are no numbers (NaN or infinite).", param="file")
    return array.tobytes()


def _blocks(file: bytes, max_seconds: float | None) -> Iterator[np.ndarray[Any, Any]]:
    """Resampled mono blocks.

    Raises:
        InvalidRequest: libsndfile cannot read the file, or not to its end; or there is too much of it.
    """
    import numpy as np
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(file)) as opened:
            rate = _checked_rate(opened.samplerate)
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
            num_frames = 0
            while len(block := opened.read(_BLOCK_SAMPLES // opened.channels, dtype="float32", always_2d=True)):
                num_frames += len(block)
                if max_seconds is not None and num_frames > max_seconds * rate:
                    raise InvalidRequest(
                        f"The audio is longer than the {max_seconds:g} seconds that are taken; send it in parts.",
                        param="file",
                    )
                yield resampler.resample_chunk(np.ascontiguousarray(block.mean(axis=1)))
            yield resampler.resample_chunk(np.empty(0, dtype=np.float32), last=True)
    except soundfile.LibsndfileError as error:
        raise InvalidRequest(
            f"Invalid or corrupted audio data: it cannot be read ({error.error_string}); readable are {READABLE}.",
            param="file",
        ) from error
    except RuntimeError as error:  # soxr's; of rates that it cannot bring together
        raise InvalidRequest(f"The audio file cannot be resampled ({error}).", param="file") from error


def _checked_rate(rate: int) -> int:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidRequest(
            f"The audio file says that it has {rate:,} samples a second; between {MIN_RATE:,} and {MAX_RATE:,} Hz are "
            "taken.",
            param="file",
        )
    return rate
