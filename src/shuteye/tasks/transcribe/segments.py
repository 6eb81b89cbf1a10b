"""What the tokens of one window of speech mean: which stretches were spoken, and where the next window begins.

The rules are those of transformers' long-form `generate`, after section 3.8 of the Whisper paper
(https://cdn.openai.com/papers/whisper.pdf). No torch.

    <|0.00|> text <|2.40|> <|2.40|> text <|5.00|> <|5.00|> te
             final        |pair              |pair    cut off: transcribed again, from 5.00 on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shuteye.model_info import WhisperSpec

FRAMES_PER_SECOND = 100
SECONDS_PER_TIMESTAMP = 0.02


@dataclass(frozen=True, slots=True)
class Stretch:
    """Speech between two points of time, in seconds of the audio. `token_ids` include the timestamps around it."""

    start: float
    end: float
    token_ids: tuple[int, ...]


def num_final(token_ids: Sequence[int], first_timestamp_id: int) -> int:
    """How many tokens from the start will be kept, whatever follows: up to the last pair of timestamps."""
    for end in range(len(token_ids), 1, -1):
        if token_ids[end - 2] >= first_timestamp_id and token_ids[end - 1] >= first_timestamp_id:
            return end - 1
    return 0


def split_window(
    token_ids: Sequence[int], *, spec: WhisperSpec, start_frame: int, num_frames: int
) -> tuple[tuple[Stretch, ...], int]:
    """The stretches that are kept of a finished window, and how many frames on the next window begins.

    Args:
        token_ids: what was sampled, without the end token.
        start_frame, num_frames: the window.
    """
    is_timestamp = [token >= spec.first_timestamp_id for token in token_ids]
    ends = [i + 1 for i in range(len(token_ids) - 1) if is_timestamp[i] and is_timestamp[i + 1]]
    if not ends:
        return (_whole(token_ids, spec, start_frame, num_frames),), num_frames
    closes_alone = is_timestamp[-2:] == [False, True]  # no speech after the last timestamp
    if closes_alone:
        ends.append(len(token_ids))
    else:
        ends[-1] += 1  # as transformers: the pair stays whole at the end of what is kept
    stretches = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        closing = end - 2 if end == ends[-1] and not closes_alone else end - 1
        stretches.append(
            Stretch(
                start=_seconds(token_ids[begin], spec, start_frame),
                end=_seconds(token_ids[closing], spec, start_frame),
                token_ids=tuple(token_ids[begin:end]),
            )
        )
    if closes_alone:
        return tuple(stretches), num_frames
    last = token_ids[ends[-1] - 2] - spec.first_timestamp_id
    return tuple(stretches), last * spec.frames_per_timestamp


def _whole(token_ids: Sequence[int], spec: WhisperSpec, start_frame: int, num_frames: int) -> Stretch:
    """All that was sampled, up to its last timestamp if it has one that says something."""
    timestamps = [token for token in token_ids if token >= spec.first_timestamp_id]
    length = num_frames // spec.frames_per_timestamp * SECONDS_PER_TIMESTAMP
    if timestamps and timestamps[-1] != spec.first_timestamp_id:
        length = (timestamps[-1] - spec.first_timestamp_id) * SECONDS_PER_TIMESTAMP
    start = start_frame / FRAMES_PER_SECOND
    return Stretch(start, start + length, tuple(token_ids))


def _seconds(timestamp: int, spec: WhisperSpec, start_frame: int) -> float:
    return start_frame / FRAMES_PER_SECOND + (timestamp - spec.first_timestamp_id) * SECONDS_PER_TIMESTAMP
