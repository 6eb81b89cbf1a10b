"""What the tokens of a window mean, held against transformers' own `_retrieve_segment` on thousands of windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.model_info import WhisperSpec
from shuteye.tasks.transcribe.segments import num_final, split_window

SPEC = WhisperSpec(
    hop_samples=160, window_frames=3000, frames_per_timestamp=2, start_token_id=101, eos_token_id=100,
    no_timestamps_token_id=102, previous_token_id=None, transcribe_token_id=None, languages={}, language_names={},
    max_tokens=448, state_bytes=1,
)  # fmt: skip
FIRST = SPEC.first_timestamp_id

texts = st.lists(st.integers(0, 99), min_size=1, max_size=3)
opening = st.integers(0, 20)
stretches = st.lists(st.tuples(opening, texts, st.integers(21, 40)), max_size=4)


@st.composite
def windows(draw):
    """Tokens as the rules allow them: timestamps in pairs around text, perhaps cut off anywhere."""
    tokens, offset = [], 0
    for begin, text, end in draw(stretches):
        tokens += [FIRST + offset + begin, *text, FIRST + offset + end]
        offset += end
    tail = draw(st.sampled_from(["none", "repeated", "open"]))
    if tokens and tail == "repeated":
        tokens.append(tokens[-1])
    if tail == "open":
        tokens += [FIRST + offset, *draw(texts)]
    return tokens


def by_transformers(tokens, start_frame, num_frames):
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    segments, offset = WhisperGenerationMixin._retrieve_segment(
        seek_sequence=torch.tensor(tokens, dtype=torch.long),
        seek_outputs=[None],
        time_offset=torch.tensor([start_frame], dtype=torch.float64) * 0.02 / 2,
        timestamp_begin=FIRST,
        seek_num_frames=torch.tensor([num_frames]),
        time_precision=0.02,
        time_precision_features=0.01,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 1),
    )
    return [(float(each["start"]), float(each["end"]), tuple(each["tokens"].tolist())) for each in segments], int(
        offset
    )


@settings(max_examples=400, deadline=None)
@given(windows(), st.integers(0, 5000), st.integers(1, 3000))
def test_windows_are_split_as_transformers_splits_them(tokens, start_frame, num_frames):
    """A boundary one token off, a time from the wrong end of a pair, or a next window that begins elsewhere."""
    found, advance = split_window(tokens, spec=SPEC, start_frame=start_frame, num_frames=num_frames)
    expected, offset = by_transformers(tokens, start_frame, num_frames)
    assert advance == offset
    assert [each.token_ids for each in found] == [each[2] for each in expected]
    # a window whose last timestamp says nothing ends where it ends; transformers' float32 may say one timestamp earlier
    last = [token for token in tokens if token >= FIRST][-1:]
    tolerance = 0.0201 if last in ([], [FIRST]) else 1e-6
    for mine, right in zip(found, expected, strict=True):
        assert mine.start == pytest.approx(right[0])
        assert mine.end == pytest.approx(right[1], abs=tolerance)


@settings(max_examples=200, deadline=None)
@given(windows())
def test_what_counts_as_final_is_kept_however_the_window_goes_on(tokens):
    """Text that was streamed, and is then thrown away."""
    for length in range(len(tokens) + 1):
        final = tokens[: num_final(tokens[:length], FIRST)]
        kept, _ = split_window(tokens, spec=SPEC, start_frame=0, num_frames=3000)
        assert [token for each in kept for token in each.token_ids][: len(final)] == final
