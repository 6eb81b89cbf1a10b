"""The real whisper-tiny.en, served by its alias, and asked by OpenAI's own client."""

import io
import threading
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile
from shuteye_server import SLEEPING_BODY, Served, wait_for

from shuteye.audio import SAMPLE_RATE, decode

SPEECH = (Path(__file__).parent.parent / "data" / "speech.ogg").read_bytes()
WORDS = "We went to the market and bought apples, bread and cheese."
MODEL = "whisper-tiny.en"

pytestmark = [pytest.mark.model, pytest.mark.slow]


def in_format(container):
    samples = np.frombuffer(decode(SPEECH), dtype="<f4")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format=container)
    return buffer.getvalue()


def longer_than_a_window():
    samples = np.tile(np.frombuffer(decode(SPEECH), dtype="<f4"), 3)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(whisper):
    flags = ("--enable-sleep-mode", "--num-threads", "1")
    server = Served(MODEL, *flags, cache_dir=None, SHUTEYE_SERVER_DEV_MODE="1")
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.done("/wake_up")


def transcribe(client, file=SPEECH, **more):
    return client.audio.transcriptions.create(model=MODEL, file=("speech", file), temperature=0, **more)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
def test_every_format_says_the_same_words(client, container):
    """A decoder that is right for one format only."""
    assert WORDS in transcribe(client, in_format(container)).text


def test_a_stream_says_what_the_whole_answer_says(client):
    """Text that is lost or repeated between events."""
    whole = transcribe(client).text
    events = list(transcribe(client, stream=True))
    assert len(events) > 10
    assert "".join(each.delta for each in events[:-1]) == events[-1].text == whole


def test_asleep_it_is_refused_and_awake_it_says_the_same(server, client):
    """Bytes of another model after a wake, or a stream that begins before its refusal."""
    before = transcribe(client, response_format="verbose_json")
    for level in (1, 2):
        report = server.done(f"/sleep?level={level}")
        assert report["freed_bytes"] >= 0.98 * server.get("/state").json()["model"]["weights_bytes"]
        for form in ({}, {"stream": "true"}):
            refused = server.http.post("/v1/audio/transcriptions", files={"file": ("a", SPEECH)}, data=form)
            assert (refused.status_code, refused.content) == (503, SLEEPING_BODY)
        server.done("/wake_up")
        assert transcribe(client, response_format="verbose_json") == before


def test_a_sleep_in_the_middle_keeps_or_ends_a_long_transcription(server, client):
    """A transcription that hangs over a sleep, loses its window, or passes half of itself for the whole."""
    file = longer_than_a_window()
    expected = transcribe(client, file).text
    assert expected.count(WORDS[:20]) == 3
    for mode in ("keep", "abort"):
        texts, errors = [], []

        def listen(texts=texts, errors=errors):
            try:
                for each in transcribe(client, file, stream=True):
                    texts.append(each.delta if each.type == "transcript.text.delta" else f"={each.text}")
            except openai.APIError as error:
                errors.append(error)

        listener = threading.Thread(target=listen)
        listener.start()
        wait_for(lambda texts=texts: texts, "the first words")
        server.done(f"/sleep?mode={mode}")
        server.done("/wake_up")
        listener.join(timeout=60)
        assert not listener.is_alive()
        if mode == "keep":
            assert (texts[-1], errors) == (f"={expected}", [])
            assert "".join(texts[:-1]) == expected
        else:
            assert len(errors) == 1
            assert not texts[-1].startswith("=")
