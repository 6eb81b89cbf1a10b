"""POST /v1/audio/transcriptions: the form, every format, the stream, and what is refused before anything is heard."""

import io
import json

import numpy as np
import pytest
import soundfile
from openai import OpenAI

from shuteye.errors import ModelSleeping
from shuteye.tasks.transcribe.requests import Transcription, TranscriptSegment

PATH = "/v1/audio/transcriptions"
TEXTS = (" One --> two.", " Three.")


def wav(seconds=0.5):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(seconds * 16_000)), 16_000, format="WAV")
    return buffer.getvalue()


def segment(index, text):
    return TranscriptSegment(
        id=index, start=3599.5 * index, end=3599.5 * index + 1.25, text=text, token_ids=(1, 2), seek=100 * index,
        temperature=0.0, avg_logprob=-0.25, compression_ratio=1.5, no_speech_prob=0.125,
    )  # fmt: skip


class Hears:
    """An engine's `transcribe` that says `TEXTS`, a piece at a time, and remembers what it was asked."""

    def __init__(self, breakage=None):
        self.asked = []
        self.breakage = breakage

    async def __call__(self, pcm, params=None, *, prompt=None, request_id=None, output_kind="cumulative"):
        self.asked.append((pcm, params, prompt))
        segments = tuple(segment(index, text) for index, text in enumerate(TEXTS))
        if output_kind == "delta":
            yield Transcription("r", "One", "en", 1.5, (), num_tokens=1, finished=False, num_prompt_tokens=4)
            if self.breakage is not None:
                raise self.breakage
            yield Transcription(
                "r", " --> two. Three.", "en", 1.5, segments, num_tokens=9, finished=True, num_prompt_tokens=4
            )
        else:
            yield Transcription(
                "r", "".join(TEXTS).strip(), "en", 1.5, segments, num_tokens=9, finished=True, num_prompt_tokens=4
            )


@pytest.fixture
def hears():
    return Hears()


@pytest.fixture
def client(make_engine, client_of, hears):
    engine = make_engine(task="transcribe")
    engine.transcribe = hears
    return client_of(engine, max_audio_s=2.0)


def post(client, file=None, **form):
    return client.post(PATH, files={"file": ("a.wav", wav() if file is None else file)}, data=form)


def test_json_and_verbose_json(client):
    """A shape that OpenAI's clients do not read."""
    text, usage = "One --> two. Three.", {"type": "duration", "seconds": 2}
    assert post(client).json() == {"text": text, "usage": usage}
    found = post(client, response_format="verbose_json").json()
    assert {name: found[name] for name in ("task", "language", "duration", "text", "usage")} == {
        "task": "transcribe",
        "language": "en",
        "duration": 1.5,
        "text": text,
        "usage": usage,
    }
    assert found["segments"][1] == {
        "id": 1, "seek": 100, "start": 3599.5, "end": 3600.75, "text": " Three.", "tokens": [1, 2], "temperature": 0.0,
        "avg_logprob": -0.25, "compression_ratio": 1.5, "no_speech_prob": 0.125,
    }  # fmt: skip


def test_text_and_subtitles(client):
    """Times that players do not understand, or an arrow in the text that they take for times."""
    found = {name: post(client, response_format=name) for name in ("text", "srt", "vtt")}
    assert found["text"].text == "One --> two. Three.\n"
    assert found["srt"].text == (
        "1\n00:00:00,000 --> 00:00:01,250\nOne -> two.\n\n2\n00:59:59,500 --> 01:00:00,750\nThree.\n\n"
    )
    assert found["vtt"].text == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nOne -> two.\n\n00:59:59.500 --> 01:00:00.750\nThree.\n\n"
    )
    assert found["vtt"].headers["content-type"] == "text/vtt; charset=utf-8"
    assert found["srt"].headers["content-type"] == "text/plain; charset=utf-8"


def test_a_stream_is_of_openais_events(client):
    """Events of another name, or text that does not add up."""
    response = post(client, stream="true")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert [each["type"] for each in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(each["delta"] for each in events[:-1]) == events[-1]["text"] == "One --> two. Three."


def test_a_stream_that_breaks_says_so(make_engine, client_of):
    """A connection that just ends, or half a transcript that passes for a whole one."""
    engine = make_engine(task="transcribe")
    engine.transcribe = Hears(ModelSleeping())
    response = post(client_of(engine), stream="true")
    assert '"ModelSleepingError"' in response.text
    assert "transcript.text.done" not in response.text


def test_fields_reach_the_engine(client, hears):
    """A field that is read and forgotten."""
    post(
        client,
        language="en",
        prompt="Alice",
        temperature="0.5",
        seed="7",
        response_format="verbose_json",
        chunking_strategy="auto",
        top_p="0.5",
        top_k="3",
        min_p="0.25",
        repetition_penalty="1.5",
        presence_penalty="-1",
        frequency_penalty="0.75",
        max_completion_tokens="7",
        **{"timestamp_granularities[]": "segment"},
    )
    post(client, language="", prompt="")
    (pcm, params, prompt), (_, plain, no_prompt) = hears.asked
    assert len(pcm) == 4 * 8000
    assert (params.language, params.temperature, params.seed, params.timestamps) == ("en", 0.5, 7, True)
    assert (params.top_p, params.top_k, params.min_p, params.max_tokens) == (0.5, 3, 0.25, 7)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, -1.0, 0.75)
    assert (plain.top_p, plain.top_k, plain.min_p, plain.has_penalties) == (None, None, None, False)
    assert prompt == "Alice"
    assert (plain.language, plain.temperature, plain.timestamps, no_prompt) == (None, 0.0, False, None)


@pytest.mark.parametrize(
    ("form", "param", "message"),
    [
        (
            {"timestamp_granularities[]": "word", "response_format": "verbose_json"},
            "timestamp_granularities[]",
            "words",
        ),
        ({"timestamp_granularities[]": "segment"}, "timestamp_granularities[]", "verbose_json"),
        ({"timestamp_granularities[]": "letter"}, "timestamp_granularities[0]", "letter"),
        ({"response_format": "diarized_json"}, "response_format", "diarized_json"),
        ({"response_format": "srt", "stream": "true"}, "response_format", "stream"),
        ({"temperature": "2"}, "temperature", "less than or equal to 1"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"stream": "perhaps"}, "stream", "boolean"),
        ({"chunking_strategy": "never"}, "chunking_strategy", "'auto'"),
        ({"chunking_strategy[type]": "server_vad"}, "chunking_strategy", "object"),
        ({"hotwords": "Alice"}, "hotwords", "not supported"),
        ({"use_beam_search": "true"}, "use_beam_search", "not supported"),
        ({"stream_include_usage": "true"}, "stream_include_usage", "stream=True"),
        ({"max_completion_tokens": "0"}, "max_completion_tokens", "1"),
        ({"repetition_penalty": "0"}, "repetition_penalty", "(0, 10]"),
        ({"to_language": "en"}, "to_language", "English"),
        ({"include[]": "logprobs"}, "include", "not supported"),
        ({"known_speaker_names[]": ["a", "b"]}, "known_speaker_names", "not supported"),
        ({"prompt": ["a", "b"]}, "prompt", "2 times"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, hears, form, param, message):
    """A field that is silently ignored."""
    response = post(client, **form)
    found = response.json()["error"]
    assert (response.status_code, found["param"]) == (400, param)
    assert message in found["message"]
    assert hears.asked == []


def test_unknown_fields_are_named_or_refused(client, make_engine, client_of, hears):
    """Forms that differ from bodies in what becomes of a field that no one knows."""
    assert post(client, colour="red", user="u", vllm_xargs="{}", n="1").headers["x-ignored-fields"] == "colour"
    strict = make_engine(task="transcribe")
    strict.transcribe = hears
    refused = post(client_of(strict, strict_fields=True), colour="red")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "colour")


def events_of(response):
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]


def test_a_stream_is_of_vllm_s_chunks_as_well(client, make_engine, client_of, hears):
    """A client of vLLM's that finds no choices, or no counts where it asked for them."""
    plain = events_of(post(client, stream="true"))
    assert "".join(each["choices"][0]["delta"]["content"] for each in plain) == "One --> two. Three."
    assert [each["choices"][0]["finish_reason"] for each in plain] == [None, None, "stop"]
    assert not any("usage" in each for each in plain[:-1])
    counted = events_of(post(client, stream="true", stream_include_usage="true", stream_continuous_usage_stats="true"))
    *deltas, last = counted
    assert [each["usage"]["completion_tokens"] for each in deltas] == [1, 9]
    tokens = {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}
    assert (last["choices"], last["usage"]) == ([], {"type": "duration", "seconds": 2} | tokens)
    for asked in ({"stream_include_usage": "true"}, {"stream_continuous_usage_stats": "true"}):
        *deltas, last = events_of(post(client, stream="true", **asked))
        assert not any("usage" in each for each in deltas)
        assert ("total_tokens" in last["usage"]) == ("stream_include_usage" in asked)
    forced = make_engine(task="transcribe")
    forced.transcribe = hears
    *deltas, last = events_of(post(client_of(forced, enable_force_include_usage=True), stream="true"))
    assert not any("usage" in each for each in deltas)
    assert last["usage"]["total_tokens"] == 13


def test_translations_are_asked_for_as_such(client, hears):
    """A transcript in the place of a translation, or one that names the language it was spoken in."""
    files = {"file": ("a.wav", wav())}
    asked = {"response_format": "verbose_json", "language": "de", "to_language": "en"}
    found = client.post("/v1/audio/translations", files=files, data=asked).json()
    assert (found["task"], found["language"], found["text"]) == ("translate", "en", "One --> two. Three.")
    (_, params, _), *_ = hears.asked
    assert (params.task, params.language) == ("translate", "de")
    refused = client.post("/v1/audio/translations", files=files, data={"to_language": "fr"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "to_language")


def test_requests_without_a_readable_file_are_refused(client, hears):
    """A 500, or a 422, for what a caller can mend."""
    cases = {
        "Field 'file' is required": client.post(PATH, files={"other": ("a.wav", wav())}, data={}),
        "must be an uploaded file": client.post(PATH, data={"file": "text", "model": "tiny"}, files={"x": b""}),
        "must be multipart/form-data": client.post(PATH, json={"file": "x"}),
        "cannot be read": post(client, b"no audio at all"),
        "longer than the 2 seconds": post(client, wav(3)),
        "has no samples": post(client, wav(0)),
        "is empty": post(client, b""),
    }
    for message, response in cases.items():
        assert response.status_code == 400, message
        if "file" not in message:
            assert message in response.json()["error"]["message"]
    assert client.post(PATH, content=b"--x", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert post(client, model="other").status_code == 404
    assert hears.asked == []


def test_a_file_beyond_the_limit_is_413(make_engine, client_of):
    """An upload that fills the memory."""
    client = client_of(make_engine(task="transcribe"), max_body_bytes=10_000)
    assert post(client).status_code == 413


def test_the_openai_client_reads_every_format(make_engine, live, hears):
    """Answers that only look like OpenAI's."""
    engine = make_engine(task="transcribe")
    engine.transcribe = hears
    with OpenAI(base_url=f"{live(engine).url}/v1", api_key="-") as openai:
        create = openai.audio.transcriptions.create
        given = {"model": "tiny", "file": ("a.wav", wav())}
        assert create(**given).text == "One --> two. Three."
        verbose = create(**given, response_format="verbose_json", timestamp_granularities=["segment"])
        assert [each.text for each in verbose.segments] == list(TEXTS)
        assert create(**given, response_format="srt").startswith("1\n00:00:00,000")
        events = list(create(**given, stream=True))
        assert [type(each).__name__ for each in events] == ["TranscriptionTextDeltaEvent"] * 2 + [
            "TranscriptionTextDoneEvent"
        ]


def test_recordings_in_flight_are_bounded_together(make_engine, client_of):
    """A few small files that unpack to an hour each, and fill the memory while they wait."""
    client = client_of(make_engine(task="transcribe"), max_waiting_audio_s=2.0)
    audio = client.app.state.contexts.default.audio
    with audio.holding(1.0, limit_s=2.0):
        refused = post(client, wav(1.5))
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "QueueFullError"
        assert "retry-after" in refused.headers
        assert post(client, wav(0.5)).status_code == 200
    assert post(client, wav(3.0)).status_code == 200, "alone, a long one is taken"
    assert audio.seconds == 0
