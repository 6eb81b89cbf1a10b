"""Outputs on their way to whoever follows a request: joined while nobody takes them, in order, and bounded."""

import asyncio
import gc

import pytest

from shuteye.errors import EngineDead, RequestAborted
from shuteye.frontend.mailbox import JOINED, Backlog, outputs_of
from shuteye.tasks.generate.outputs import GenerationJob
from shuteye.tasks.generate.requests import CompletionOutput, Logprob, RequestOutput, SamplingParams
from shuteye.tasks.transcribe.outputs import TranscriptionJob
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription


class Deliverer:
    """As much of a frontend as following a request needs."""

    def __init__(self):
        self.deliver = {}
        self.aborted = []

    def submit(self, job, *, request_id, deliver):
        self.deliver[request_id] = deliver
        return request_id

    def abort(self, request_id, *, deliver):
        if self.deliver.get(request_id) == deliver:
            del self.deliver[request_id]
            self.aborted.append(request_id)


def token(number, *, index=0, last=False, logprobs=False):
    """The delta of one token, which is its number."""
    found = ({number: Logprob(-1.0, 1), number + 1: Logprob(-2.0, 2)},) if logprobs else None
    made = CompletionOutput(index, f"{number} ", (number,), "length" if last else None, None, found)
    return RequestOutput("one", None, (1, 2), (made,), last)


DELTAS = GenerationJob("text", SamplingParams(), "delta")


def follow(frontend, request_id="one", *, job=DELTAS, backlog=None):
    return outputs_of(frontend, job, request_id=request_id, backlog=backlog or Backlog())


async def begun(outputs, frontend, first, request_id="one"):
    """`outputs` after its first one was delivered and taken."""
    taking = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    frontend.deliver[request_id](first)
    assert await taking == first


def test_outputs_not_yet_taken_are_joined_in_order():
    """A client that does not read: an object for every token of its answer, without end."""

    async def scenario():
        frontend = Deliverer()
        outputs = follow(frontend)
        await begun(outputs, frontend, token(0, logprobs=True))
        count = 10 * JOINED + 3
        for number in range(1, count):
            frontend.deliver["one"](token(number, index=number % 2, logprobs=True, last=number == count - 1))
        gc.collect()
        alive = sum(type(found) is RequestOutput for found in gc.get_objects())
        taken = [output async for output in outputs]
        assert alive < 2 * JOINED
        assert len(taken) == 11, "a long backlog is not handed over in one piece"
        for index in (0, 1):
            parts = [made for output in taken for made in output.outputs if made.index == index]
            numbers = [number for number in range(1, count) if number % 2 == index]
            assert [one for part in parts for one in part.token_ids] == numbers
            assert "".join(part.text for part in parts) == "".join(f"{number} " for number in numbers)
            assert [next(iter(found)) for part in parts for found in part.logprobs] == numbers
        assert taken[-1].finished
        assert taken[-1].outputs[0].finish_reason == "length"
        assert not any(output.finished for output in taken[:-1])

    asyncio.run(scenario())


def test_of_cumulative_outputs_only_the_newest_is_kept():
    """A slow reader of cumulative outputs who gets every old one first."""

    async def scenario():
        frontend = Deliverer()
        outputs = follow(frontend, job=GenerationJob("text", SamplingParams()))
        await begun(outputs, frontend, token(0))
        for number in range(1, 500):
            frontend.deliver["one"](token(number))
        assert await anext(outputs) == token(499)
        await outputs.aclose()

    asyncio.run(scenario())


def test_transcripts_are_joined():
    """Words that are lost between two looks at a recording's transcript."""

    async def scenario():
        frontend = Deliverer()
        outputs = follow(frontend, job=TranscriptionJob(b"", TranscribeParams(), output_kind="delta"))
        first = Transcription("one", "It ", None, 1.0, (), 1, finished=False)
        await begun(outputs, frontend, first)
        frontend.deliver["one"](Transcription("one", "is ", "en", 1.0, (), 2, finished=False))
        frontend.deliver["one"](Transcription("one", "late.", None, 1.0, (), 3, finished=True))
        joined = await anext(outputs)
        assert (joined.text, joined.language, joined.num_tokens, joined.finished) == ("is late.", "en", 3, True)

    asyncio.run(scenario())


def test_an_error_comes_after_what_was_delivered_before_it():
    """The end of a broken answer before its beginning."""

    async def scenario():
        frontend = Deliverer()
        outputs = follow(frontend)
        await begun(outputs, frontend, token(0))
        frontend.deliver["one"](token(1))
        frontend.deliver["one"](EngineDead("gone"))
        assert await anext(outputs) == token(1)
        with pytest.raises(EngineDead, match="gone"):
            await anext(outputs)

    asyncio.run(scenario())


def test_over_the_limit_everything_of_the_backlog_is_aborted_at_once():
    """Thousands of sequences that go on for a client that reads none of them."""

    async def scenario():
        frontend, backlog = Deliverer(), Backlog(limit=100)
        names = ["one", "two", "three"]
        followed = [follow(frontend, name, backlog=backlog) for name in names]
        for name, outputs in zip(names, followed, strict=True):
            await begun(outputs, frontend, token(0), name)
        for number in range(1, 51):
            frontend.deliver["one"](token(number))
            frontend.deliver["two"](token(number))
        assert frontend.aborted == [], "as many as may wait"
        frontend.deliver["two"](token(51))
        assert sorted(frontend.aborted) == sorted(names)
        for outputs in followed:
            with pytest.raises(RequestAborted, match="100 tokens"):
                await anext(outputs)
        late = follow(frontend, "late", backlog=backlog)
        with pytest.raises(RequestAborted):
            await anext(late)
        assert "late" in frontend.aborted

    asyncio.run(scenario())


def test_what_was_taken_does_not_count():
    """A long answer that is read as it comes, and ends all the same."""

    async def scenario():
        frontend, backlog = Deliverer(), Backlog(limit=10)
        outputs = follow(frontend, backlog=backlog)
        await begun(outputs, frontend, token(0))
        for number in range(1, 100):
            for offset in range(3):
                frontend.deliver["one"](token(3 * number + offset, logprobs=True))
            assert len((await anext(outputs)).outputs[0].token_ids) == 3
        await outputs.aclose()
        assert frontend.aborted == ["one"]

    asyncio.run(scenario())
