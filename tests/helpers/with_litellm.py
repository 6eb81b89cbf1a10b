"""Runs in litellm's own environment: asks a server what litellm's users ask, and prints what came as JSON.

usage: with_litellm.py generation|refusals|sleep|embedding URL MODEL
"""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm otherwise asks the network for prices

import litellm

litellm.telemetry = False
litellm.num_retries = 0

MESSAGES = [{"role": "user", "content": "Where does the river end?"}]


def chat(url, model, provider, **more):
    return litellm.completion(
        model=f"{provider}/{model}",
        messages=MESSAGES,
        api_base=f"{url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=20,
        max_retries=0,
        **more,
    )


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


async def atext_of(url, model):
    stream = await litellm.acompletion(
        model=f"openai/{model}",
        messages=MESSAGES,
        api_base=f"{url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def of_generation(url, model):
    found = {}
    for provider in ("openai", "hosted_vllm"):
        answer = chat(url, model, provider)
        stream = chat(url, model, provider, stream=True, stream_options={"include_usage": True})
        found[provider] = {
            "whole": answer.choices[0].message.content,
            "streamed": text_of(stream),
            "finish_reason": answer.choices[0].finish_reason,
            "usage": [answer.usage.prompt_tokens, answer.usage.completion_tokens],
        }
    found["async streamed"] = asyncio.run(atext_of(url, model))
    text = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt="Once upon a time",
        api_base=f"{url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=20,
    )
    found["text"] = text.choices[0].text
    return found


def of_refusals(url, model):
    """What litellm makes of a request that is wrong."""
    try:
        chat(url, model, "openai", extra_body={"min_p": 7})
    except litellm.BadRequestError as error:
        return {"status": error.status_code, "message": str(error)}
    return None


def of_embedding(url, model):
    answer = litellm.embedding(
        model=f"openai/{model}", input=["a cat", "a dog"], api_base=f"{url}/v1", api_key="none", encoding_format="float"
    )
    return {"vectors": [one["embedding"] for one in answer.data], "tokens": answer.usage.prompt_tokens}


def of_sleep(url, model):
    """What litellm makes of a model that sleeps."""
    try:
        chat(url, model, "openai")
    except Exception as error:  # noqa: BLE001 - which class it is, is the question
        return {"class": type(error).__name__, "status": getattr(error, "status_code", None), "message": str(error)}
    return None


WHAT = {"generation": of_generation, "refusals": of_refusals, "sleep": of_sleep, "embedding": of_embedding}

if __name__ == "__main__":
    what, server_url, served_model = sys.argv[1:]
    print("\n" + json.dumps(WHAT[what](server_url, served_model)))
