"""The real model, served by its alias as `make serve` does it."""

import httpx2
import openai
import pytest
from shuteye_server import SLEEPING_BODY, Served

from shuteye.client import WakingTransport

PROMPT = "The capital of France is"


@pytest.mark.model
def test_smollm2_knows_its_capitals_before_and_after_a_sleep(smollm2):
    """Anything between the command and the answer that is right for a random model only."""
    flags = ("--enable-sleep-mode", "--num-threads", "1", "--kv-cache-memory", "64MiB", "--max-model-len", "512")
    server = Served("smollm2-135m", *flags, cache_dir=None, SHUTEYE_SERVER_DEV_MODE="1")
    try:
        server.wait_until_ready()
        assert server.get("/state").json()["model"]["dtype"] == "bfloat16"
        http = httpx2.Client(transport=WakingTransport(), timeout=60)
        asked = {"model": "smollm2-135m", "max_tokens": 12, "temperature": 0}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0) as client:
            before = client.completions.create(prompt=PROMPT, **asked).choices[0].text
            assert "Paris" in before
            # another wording may be a near tie, which bfloat16 breaks one way or the other
            chat = [{"role": "user", "content": "Name the capital of France."}]
            said = client.chat.completions.create(messages=chat, **asked).choices[0].message.content
            assert "Paris" in said
            for level in (1, 2):
                report = server.done(f"/sleep?level={level}")
                weights = server.get("/state").json()["model"]["weights_bytes"]
                assert report["freed_bytes"] >= 0.98 * weights
                asleep = server.post("/v1/completions", prompt=PROMPT, **asked)
                assert (asleep.status_code, asleep.content) == (503, SLEEPING_BODY)
                assert client.completions.create(prompt=PROMPT, **asked).choices[0].text == before
                server.done(f"/sleep?level={level}")
                with client.chat.completions.create(messages=chat, stream=True, **asked) as stream:
                    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said
    finally:
        server.stop()
