"""Incremental text with stop strings: what would leak a stop string, lose text, or depend on the tokens' borders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.tasks.generate.detokenizer import Detokenizer
from shuteye.testing import write_tiny_tokenizer
from shuteye.tokenizer import Tokenizer

ALPHABET = "ab👩\u200de\u0301 "


class Pieces:
    """A decode stream whose token i has the text `pieces[i]` (None: nothing complete yet), and a rest at the end."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def step(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.rest


def run(pieces, rest="", **options):
    """Feed all tokens or until a stop string: what each released, and the stop string."""
    detokenizer = Detokenizer(Pieces(pieces, rest), **options)
    released = []
    for token_id in range(len(pieces)):
        released.append(detokenizer.feed(token_id))
        if detokenizer.stop_string is not None:
            break
    released.append(detokenizer.finish())
    return released, detokenizer.stop_string


def first_stop(text, stops):
    """By definition, character by character: where the first match starts and ends."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


def test_text_that_may_become_a_stop_string_is_held_until_it_cannot():
    """A client would see half of the stop string."""
    assert run(["a#", "#", "b", "##", "#", "x"], stop_strings=["###"]) == (["a", "", "##b", "", "", ""], "###")
    assert run(["a#", "#", "b"], stop_strings=["###"]) == (["a", "", "##b", ""], None)


def test_held_text_comes_at_the_end():
    """The last characters of an answer would be lost if they begin a stop string."""
    assert run(["a#"], stop_strings=["##"]) == (["a", "#"], None)


def test_rest_of_the_stream_comes_at_the_end_and_may_complete_a_stop_string():
    """An incomplete character would be dropped."""
    assert run(["a#"], "\ufffd", stop_strings=["##"]) == (["a", "#\ufffd"], None)
    assert run(["a#"], "\ufffd", stop_strings=["#\ufffd"]) == (["a", ""], "#\ufffd")


def test_stop_string_is_included_on_request():
    assert run(["a#", "#b"], stop_strings=["##"], include_stop_string=True) == (["a", "##", ""], "##")


def test_stop_string_within_one_token_cuts_what_follows():
    assert run(["one\n\ntwo"], stop_strings=["\n\n"]) == (["one", ""], "\n\n")


def test_of_several_the_first_to_end_counts_and_then_the_longest():
    """The outcome would depend on the order of `stop`, or on how the text was cut into tokens."""
    assert run(["xabc"], stop_strings=["abc", "b"]) == (["xa", ""], "b")
    assert run(["xab"], stop_strings=["b", "ab"]) == (["x", ""], "ab")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["##", "a", "##"], (["##", "a", "", ""], "##")),  # the first comes too early
        (["#", "#", "#"], (["", "#", "", ""], "##")),  # the match ends after min_tokens, though it begins before
        (["##", "##"], (["##", "##", ""], None)),  # nothing after min_tokens
    ],
)
def test_stop_strings_count_only_after_min_tokens(pieces, expected):
    """min_tokens=2 would be cut short by text."""
    released, stop = run(pieces, stop_strings=["##"], min_tokens=2)
    assert ("".join(released), stop) == ("".join(expected[0]), expected[1])


def test_feeding_after_a_stop_string_is_our_bug():
    detokenizer = Detokenizer(Pieces(["#", "a"]), stop_strings=["#"])
    detokenizer.feed(0)
    with pytest.raises(AssertionError, match="after a stop string"):
        detokenizer.feed(1)


@given(data=st.data(), include=st.booleans())
@settings(max_examples=500, deadline=None)
def test_outcome_does_not_depend_on_how_text_is_split(data, include):
    """Stop strings over any number of tokens, against their definition character by character."""
    text = data.draw(st.text(alphabet="ab", max_size=24) | st.text(alphabet=ALPHABET, max_size=24))
    stops = data.draw(st.lists(st.text(alphabet=ALPHABET[:3], min_size=1, max_size=4), max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] or None for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    released, stop = run(pieces, stop_strings=stops, include_stop_string=include)
    expected = first_stop(text, stops)
    assert stop == (expected[1] if expected else None)
    if expected is None:
        assert "".join(released) == text
    else:
        start, matched = expected
        assert "".join(released) == text[: start + len(matched) * include]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_held_back_text_is_no_more_than_it_must_be(data):
    """Streams would lag behind although no stop string can begin there."""
    text = data.draw(st.text(alphabet="ab", max_size=24))
    stops = data.draw(st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3))
    detokenizer = Detokenizer(Pieces(list(text)), stop_strings=stops)
    shown = ""
    for index in range(len(text)):
        shown += detokenizer.feed(index)
        if detokenizer.stop_string is not None:
            return
        held = text[len(shown) : index + 1]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(text=st.text(alphabet=ALPHABET, max_size=30), stop=st.text(alphabet=ALPHABET, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_real_tokens_of_single_bytes(byte_tokenizer, text, stop):
    """Characters of several tokens, cut by a stop string of several tokens."""
    detokenizer = Detokenizer(byte_tokenizer.decode_stream(), stop_strings=[stop])
    shown = ""
    for token_id in byte_tokenizer.encode(text):
        shown += detokenizer.feed(token_id)
        assert "\ufffd" not in shown
        if detokenizer.stop_string is not None:
            break
    assert shown + detokenizer.finish() == text.split(stop)[0]


def test_long_text_is_not_searched_again():
    """Each token would cost as much as all text before it."""
    detokenizer = Detokenizer(Pieces(["ab "] * 5000), stop_strings=["ab ab ba"])
    longest = 0
    for token_id in range(5000):
        detokenizer.feed(token_id)
        longest = max(longest, len(detokenizer._held))
    assert longest < len("ab ab ba")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte-tokenizer")
    write_tiny_tokenizer(path)
    return Tokenizer.from_directory(path)
