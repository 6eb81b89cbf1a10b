"""The openai clients against a real server of a real engine: they get what they ask for, also across a sleep."""

import asyncio
import math

import httpx2
import openai
import pytest

from shuteye.client import WakingTransport

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the river end?"}]
PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server):
    with server.openai() as client:
        yield client


@pytest.fixture
def waking_client(server):
    with server.openai(http_client=httpx2.Client(transport=WakingTransport(), timeout=30)) as client:
        yield client


def chat(client, **more):
    return client.chat.completions.create(model=client.models.list().data[0].id, messages=MESSAGES, **more)


def completion(client, prompt=PROMPT, **more):
    return client.completions.create(model=client.models.list().data[0].id, prompt=prompt, **more)


def streamed(make, client, **more):
    """All chunks of a stream that also asks for usage."""
    with make(client, stream=True, stream_options={"include_usage": True}, **more) as stream:
        return list(stream)


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join((choice.delta.content if hasattr(choice, "delta") else choice.text) or "" for choice in choices)


def finish_reasons(chunks):
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


def num_tokens(usage):
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


class TestAnswers:
    @pytest.mark.parametrize("length", [1, 40, 200])
    def test_completion_is_what_transformers_says(self, client, right, length):
        """A wrong token anywhere between the weights and the wire; text lost or doubled between the chunks."""
        whole = completion(client, max_tokens=length, **GREEDY)
        chunks = streamed(completion, client, max_tokens=length, **GREEDY)
        assert whole.choices[0].text == right(PROMPT, length)
        assert text_of(chunks) == right(PROMPT, length)
        assert (whole.choices[0].finish_reason, finish_reasons(chunks)) == ("length", ["length"])
        assert num_tokens(whole.usage) == (len(PROMPT), length, len(PROMPT) + length)
        assert num_tokens(chunks[-1].usage) == num_tokens(whole.usage)
        assert all(chunk.usage is None for chunk in chunks[:-1])

    def test_chat_is_the_completion_of_its_template(self, client, right):
        """A template that is not the checkpoint's, or special tokens taken for text."""
        prompt = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in MESSAGES)
        prompt += "<|im_start|>assistant\n"
        whole = chat(client, max_completion_tokens=50, **GREEDY)
        chunks = streamed(chat, client, max_completion_tokens=50, **GREEDY)
        assert whole.choices[0].message.content == right(prompt, 50)
        assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
        assert text_of(chunks) == right(prompt, 50)
        assert num_tokens(chunks[-1].usage) == num_tokens(whole.usage)
        assert whole.usage.completion_tokens == 50

    def test_several_prompts_in_one_request(self, client, right):
        """Answers that change places."""
        prompts = ["first", "the second one", "3", "and a fourth that is rather longer than the others"]
        whole = completion(client, prompts, max_tokens=20, **GREEDY)
        chunks = streamed(completion, client, prompt=prompts, max_tokens=20, **GREEDY)
        expected = [right(prompt, 20) for prompt in prompts]
        assert [choice.text for choice in whole.choices] == expected
        assert [text_of(chunks, index) for index in range(4)] == expected

    def test_seeded_choices_repeat(self, client):
        """Seeds that are ignored, that make all choices alike, or that depend on streaming."""
        asked = {"n": 2, "temperature": 1.0, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
        whole = completion(client, seed=7, **asked)
        chunks = streamed(completion, client, seed=7, **asked)
        texts = [choice.text for choice in whole.choices]
        assert len(texts) == 2
        assert texts[0] != texts[1]
        assert [text_of(chunks, index) for index in range(2)] == texts
        assert [choice.text for choice in completion(client, seed=8, **asked).choices] != texts
        assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 60

    @pytest.mark.parametrize(("first", "size"), [(5, 1), (20, 6)])
    def test_stop_strings_end_the_text_before_them(self, client, right, first, size):
        """A stop string, or half of one, that reaches the client before it is noticed."""
        text = right(PROMPT, 60)
        stop = text[first : first + size]
        whole = completion(client, max_tokens=60, stop=["never said", stop], **GREEDY)
        chunks = streamed(completion, client, max_tokens=60, stop=["never said", stop], **GREEDY)
        assert whole.choices[0].text == text_of(chunks) == text[: text.index(stop)]
        assert (whole.choices[0].finish_reason, finish_reasons(chunks)) == ("stop", ["stop"])
        assert whole.choices[0].stop_reason == stop

    def test_logprobs(self, client):
        """Log-probabilities of other tokens, in another order, or lost when streamed."""
        asked = {"logprobs": True, "top_logprobs": 4, "max_tokens": 25, **GREEDY}
        whole = chat(client, **asked).choices[0].logprobs.content
        parts = [c.logprobs for chunk in streamed(chat, client, **asked) for c in chunk.choices if c.logprobs]
        assert len(whole) == 25
        for entry in whole:
            likeliest = [top.logprob for top in entry.top_logprobs]
            assert likeliest == sorted(likeliest, reverse=True)
            assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, likeliest[0])  # greedy
            assert 0 < sum(map(math.exp, likeliest)) <= 1 + 1e-6
        again = [entry for part in parts for entry in part.content]
        assert [entry.bytes for entry in again] == [entry.bytes for entry in whole]
        assert [entry.logprob for entry in again] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)
        plain = completion(client, max_tokens=25, logprobs=0, **GREEDY).choices[0]
        assert len(plain.logprobs.token_logprobs) == 25
        assert max(plain.logprobs.token_logprobs) <= 0

    def test_errors_are_openais(self, client, server):
        """Errors that the client takes for others."""
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError) as bad:
            completion(client, temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="512"):
            completion(client, prompt="x" * 600)

    def test_many_at_once(self, server, right):
        """Sequences that disturb one another within a batch."""
        prompts = [f"{'ab' * (index % 7)} prompt {index}" for index in range(24)]

        async def ask_all():
            async with server.async_openai() as client:
                answers = await asyncio.gather(
                    *(
                        client.completions.create(model=server.model, prompt=one, max_tokens=20, **GREEDY)
                        for one in prompts
                    )
                )
            return [answer.choices[0].text for answer in answers]

        assert asyncio.run(ask_all()) == [right(prompt, 20) for prompt in prompts]


class TestAcrossASleep:
    @pytest.mark.parametrize("level", [1, 2])
    @pytest.mark.parametrize(
        ("make", "text"),
        [(completion, lambda one: one.choices[0].text), (chat, lambda one: one.choices[0].message.content)],
    )
    def test_waking_transport(self, server, waking_client, make, text, level):
        """A wake that changes the model, or a client that sees the sleep."""
        before = text(make(waking_client, max_tokens=40, **GREEDY))
        server.done(f"/sleep?level={level}")
        assert text(make(waking_client, max_tokens=40, **GREEDY)) == before
        server.done(f"/sleep?level={level}")
        assert text_of(streamed(make, waking_client, max_tokens=40, **GREEDY)) == before
        assert server.get("/ready").status_code == 200

    def test_without_the_transport_the_client_sees_the_503(self, client, server):
        """A refusal that the openai client does not show as what it is."""
        model = client.models.list().data[0].id
        server.done("/sleep")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as asleep:
                client.completions.create(model=model, prompt="x", stream=stream)
            assert (asleep.value.status_code, asleep.value.type) == (503, "ModelSleepingError")
