"""From engine deltas to callers' outputs: what would lose, repeat or mix up text, tokens, reasons or errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.errors import ErrorInfo, InvalidRequest
from shuteye.tasks.base import RequestDelta
from shuteye.tasks.generate.outputs import GenerationJob, OutputProcessor
from shuteye.tasks.generate.requests import SamplingParams, TokenLogprobs
from shuteye.testing import write_tiny_tokenizer
from shuteye.tokenizer import Tokenizer

EOS = 2
BOOM = ErrorInfo("InternalError", "boom")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per byte; ids 0 to 2 are special."""
    path = tmp_path_factory.mktemp("byte-tokenizer")
    write_tiny_tokenizer(path)
    return Tokenizer.from_directory(path)


@pytest.fixture
def processor(tokenizer):
    return OutputProcessor(tokenizer, vocab_size=tokenizer.vocab_size)


def add(processor, request_id="r", output_kind="cumulative", **params):
    job = GenerationJob([1, 2], SamplingParams(**params), output_kind, text="p")
    return processor.add(request_id, job, engine_id=request_id)


def feed(processor, text, request_id="r", **fields):
    """A delta with one text's tokens; what comes of it."""
    ids = tuple(processor._tokenizer.encode(text)) if isinstance(text, str) else tuple(text)
    return processor.process([RequestDelta(request_id, ids, **fields)])


def only(processed):
    assert len(processed.outputs) == 1
    return processed.outputs[0]


class TestFanOut:
    def test_single_completion_keeps_its_id_and_params(self, processor):
        children = add(processor, seed=5)
        assert [(c.request_id, c.params.seed, c.prompt_token_ids) for c in children] == [("r", 5, (1, 2))]

    def test_n_completions_get_ids_and_seeds_of_their_own(self, processor):
        """All n would be the same text."""
        children = add(processor, n=3, seed=5)
        assert [(c.request_id, c.params.n, c.params.seed) for c in children] == [
            ("r/0", 1, 5),
            ("r/1", 1, 6),
            ("r/2", 1, 7),
        ]
        assert [c.params.seed for c in add(processor, "s", n=2)] == [None, None]

    @pytest.mark.parametrize(
        ("first", "second"), [(("r", 1), ("r", 1)), (("r", 2), ("r/1", 1)), (("r/1", 1), ("r", 2))]
    )
    def test_ids_that_would_collide_are_refused(self, processor, first, second):
        """Two callers would receive each other's tokens."""
        add(processor, first[0], n=first[1])
        with pytest.raises(InvalidRequest, match="in use"):
            add(processor, second[0], n=second[1])
        assert only(feed(processor, "a", f"{first[0]}/0" if first[1] > 1 else first[0])).request_id == first[0]

    def test_interleaved_completions_are_grouped_by_request(self, processor):
        """Outputs of one prompt would arrive as several, or under another's index."""
        add(processor, "r", n=2)
        add(processor, "s")
        ids = processor._tokenizer.encode
        processed = processor.process(
            [
                RequestDelta("r/1", tuple(ids("b"))),
                RequestDelta("s", tuple(ids("c")), finish_reason="length"),
                RequestDelta("r/0", tuple(ids("a")), finish_reason="stop"),
            ]
        )
        assert [(o.request_id, [c.text for c in o.outputs], o.finished) for o in processed.outputs] == [
            ("r", ["", "b"], False),
            ("s", ["c"], True),
        ]


class TestKinds:
    def test_cumulative_repeats_everything(self, processor):
        add(processor)
        assert only(feed(processor, "ab")).outputs[0].text == "ab"
        last = only(feed(processor, "c", finish_reason="length"))
        assert (last.outputs[0].text, last.outputs[0].finish_reason, last.finished) == ("abc", "length", True)
        assert (last.prompt, last.prompt_token_ids) == ("p", (1, 2))
        assert len(last.outputs[0].token_ids) == 3

    def test_delta_carries_only_what_is_new_of_whom_it_is_new(self, processor):
        """Streams would repeat text, or tell a finished completion's end again."""
        add(processor, n=2, output_kind="delta")
        first = only(feed(processor, "ab", "r/1"))
        assert [(c.index, c.text) for c in first.outputs] == [(1, "ab")]
        second = only(feed(processor, "c", "r/1", finish_reason="length"))
        assert [(c.index, c.text, len(c.token_ids), c.finish_reason) for c in second.outputs] == [(1, "c", 1, "length")]
        last = only(feed(processor, "x", "r/0", finish_reason="length"))
        assert ([(c.index, c.text) for c in last.outputs], last.finished) == ([(0, "x")], True)

    def test_delta_tells_an_abort_that_brings_nothing(self, processor):
        """A stream would end without a finish_reason."""
        add(processor, output_kind="delta")
        feed(processor, "a")
        last = only(feed(processor, (), finish_reason="abort"))
        assert [(c.text, c.token_ids, c.finish_reason) for c in last.outputs] == [("", (), "abort")]
        assert last.finished

    def test_final_only_comes_once_when_all_are_finished(self, processor):
        add(processor, n=2, output_kind="final_only")
        assert feed(processor, "a", "r/0", finish_reason="length").outputs == ()
        last = only(feed(processor, "b", "r/1", finish_reason="length"))
        assert [c.text for c in last.outputs] == ["a", "b"]
        assert not processor.has_unfinished

    @given(data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_deltas_join_to_the_cumulative_text(self, tokenizer, data):
        """Streamed and whole answers to the same request would differ."""
        ids = data.draw(st.lists(st.integers(0, 258), min_size=1, max_size=30))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
        stop = data.draw(st.sampled_from([(), "a", ["bc", "\n"]]))
        kinds = ("cumulative", "delta", "final_only")
        processors = {kind: OutputProcessor(tokenizer, vocab_size=tokenizer.vocab_size) for kind in kinds}
        seen = {kind: [] for kind in kinds}
        for kind, processor in processors.items():
            add(processor, output_kind=kind, stop=stop, max_tokens=None)
            for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True):
                seen[kind] += feed(processor, ids[a:b], finish_reason="length" if b == len(ids) else None).outputs
        whole = seen["final_only"][0].outputs[0]
        assert len(seen["final_only"]) == 1
        assert seen["cumulative"][-1].outputs[0] == whole
        assert "".join(o.outputs[0].text for o in seen["delta"] if o.outputs) == whole.text
        assert sum((o.outputs[0].token_ids for o in seen["delta"] if o.outputs), ()) == whole.token_ids
        if whole.stop_reason is None:
            assert whole.text == tokenizer.decode(ids)


class TestStops:
    def test_stop_string_ends_the_request_and_aborts_it_in_the_engine(self, processor):
        """The engine would go on generating text nobody reads."""
        add(processor, stop=["##"])
        processed = feed(processor, "ab#")
        assert (only(processed).outputs[0].text, processed.aborts) == ("ab", ())
        processed = feed(processor, "#cd")
        output = only(processed).outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "##")
        assert len(output.token_ids) == 4
        assert processed.aborts == ("r",)
        assert feed(processor, "late").outputs == ()
        assert feed(processor, (), finish_reason="abort").outputs == ()

    def test_stop_string_in_the_last_token_wins_and_needs_no_abort(self, processor):
        """A text cut at a stop string would claim "length"; an ended request would be aborted."""
        add(processor, stop=["#"])
        processed = feed(processor, "a#", finish_reason="length")
        output = only(processed).outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", "#")
        assert processed.aborts == ()

    def test_stop_string_of_one_completion_leaves_the_others(self, processor):
        add(processor, n=2, stop=["#"])
        assert feed(processor, "a#", "r/0").aborts == ("r/0",)
        output = only(feed(processor, "b", "r/1", finish_reason="length"))
        assert [(c.text, c.finish_reason) for c in output.outputs] == [("a", "stop"), ("b", "length")]

    @pytest.mark.parametrize("skip", [True, False])
    def test_text_of_eos_is_never_shown_but_its_id_is(self, processor, skip):
        """skip_special_tokens=False would end every answer with the eos token's text."""
        add(processor, skip_special_tokens=skip)
        feed(processor, "ab")
        output = only(feed(processor, [EOS], finish_reason="stop")).outputs[0]
        assert (output.text, output.token_ids[-1], output.stop_reason) == ("ab", EOS, None)

    def test_eos_is_shown_when_everything_is_asked_for(self, processor):
        add(processor, skip_special_tokens=False, include_stop_str_in_output=True)
        output = only(feed(processor, [EOS], finish_reason="stop")).outputs[0]
        assert output.text == processor._tokenizer.id_to_token(EOS)

    def test_special_stop_token_is_hidden_and_an_ordinary_one_is_not(self, processor):
        """vLLM: the output contains the stop tokens unless they are special."""
        add(processor, skip_special_tokens=False)
        output = only(feed(processor, [1], finish_reason="stop", stop_token_id=1)).outputs[0]
        assert (output.text, output.token_ids, output.stop_reason) == ("", (1,), 1)
        add(processor)
        (newline,) = processor._tokenizer.encode("\n")
        output = only(feed(processor, [newline], finish_reason="stop", stop_token_id=newline)).outputs[0]
        assert (output.text, output.stop_reason) == ("\n", newline)

    def test_character_cut_by_the_end_is_shown_as_replacement(self, processor):
        """The text would be shorter than what its token ids decode to."""
        add(processor)
        ids = processor._tokenizer.encode("a👩")[:-1]
        assert only(feed(processor, ids)).outputs[0].text == "a"
        assert only(feed(processor, (), finish_reason="abort")).outputs[0].text == "a\ufffd"


class TestLogprobs:
    def test_chosen_and_likeliest_by_token_with_their_text(self, processor):
        (a, b) = processor._tokenizer.encode("ab")
        add(processor, logprobs=1)
        at = TokenLogprobs(token_ids=(a, b), logprobs=(-2.0, -0.1), ranks=(5, 1))
        output = only(feed(processor, [a], logprobs=(at,))).outputs[0]
        assert [{k: (v.logprob, v.rank, v.decoded_token) for k, v in d.items()} for d in output.logprobs] == [
            {a: (-2.0, 5, "a"), b: (-0.1, 1, "b")}
        ]

    def test_they_end_with_the_tokens_at_a_stop_string(self, processor):
        """Tokens and logprobs would no longer line up."""
        (a, b) = processor._tokenizer.encode("ab")
        add(processor, logprobs=0, stop="a", output_kind="delta")
        at = tuple(TokenLogprobs((i,), (-1.0,), (1,)) for i in (a, b))
        output = only(feed(processor, [a, b], logprobs=at)).outputs[0]
        assert (len(output.token_ids), len(output.logprobs)) == (1, 1)

    def test_none_were_asked_for(self, processor):
        add(processor)
        assert only(feed(processor, "a")).outputs[0].logprobs is None


class TestErrorsAndAborts:
    def test_error_of_one_completion_fails_the_request_and_aborts_its_siblings(self, processor):
        """The caller would wait for a completion that never comes; siblings would run for nobody."""
        add(processor, n=3)
        feed(processor, "a", "r/2", finish_reason="length")
        ids = tuple(processor._tokenizer.encode("x"))
        processed = processor.process(
            [RequestDelta("r/1", ids), RequestDelta("r/0", error=BOOM), RequestDelta("r/1", ids)]
        )
        assert processed.outputs == ()
        assert processed.errors == (("r", BOOM),)
        assert processed.aborts == ("r/1",)
        assert not processor.has_unfinished

    def test_abort_names_what_still_runs_and_forgets(self, processor):
        add(processor, n=2)
        feed(processor, "a", "r/0", finish_reason="length")
        assert processor.abort("r") == ["r/1"]
        assert processor.abort("r") == []
        assert feed(processor, "b", "r/1").outputs == ()
        add(processor, n=2)  # the id is free again

    def test_cached_tokens_are_those_of_the_first_completion(self, processor):
        """With n > 1 the siblings always hit what the first computes; reporting that would claim a cached prompt."""
        add(processor, n=2)
        feed(processor, "a", "r/0", num_cached_tokens=16)
        output = only(feed(processor, "a", "r/1", num_cached_tokens=32))
        assert output.num_cached_tokens == 16
