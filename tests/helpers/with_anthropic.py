"""Runs in an environment with Anthropic's client: asks a server what its users ask, and prints what came as JSON.

usage: with_anthropic.py generation|tools|refusals|sleep|proxied URL MODEL
"""

import asyncio
import json
import sys

import anthropic

MESSAGES = [{"role": "user", "content": "Where does the river end?"}]
GREEDY = {"temperature": 0}  # newer versions of the client have no argument for it
TOOL = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}},  # a small model does not end a string that it may choose
        "required": ["city"],
        "additionalProperties": False,
    },
}


def client(url, **more):
    return anthropic.Anthropic(base_url=url, api_key="none", **{"max_retries": 0, "timeout": 300} | more)


def generation(url, model):
    asked = {"model": model, "max_tokens": 20, "extra_body": GREEDY, "messages": MESSAGES, "system": "Be brief."}
    messages = client(url).messages
    whole = messages.create(**asked)
    with messages.stream(**asked) as stream:
        words = "".join(stream.text_stream)
        final = stream.get_final_message()

    async def later():
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as found:
            return await found.messages.create(**asked)

    counted = messages.count_tokens(model=model, messages=MESSAGES, system="Be brief.").input_tokens
    used = whole.usage
    return {
        "whole": whole.content[0].text,
        "streamed": words,
        "final": final.content[0].text,
        "async": asyncio.run(later()).content[0].text,
        "stop_reasons": [whole.stop_reason, final.stop_reason],
        "output_tokens": [used.output_tokens, final.usage.output_tokens],
        "input_tokens": [
            counted,
            used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens,
            final.usage.input_tokens + final.usage.cache_creation_input_tokens + final.usage.cache_read_input_tokens,
        ],
    }


def tools(url, model):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked = {"model": model, "max_tokens": 100, "extra_body": GREEDY, "tools": [TOOL], "tool_choice": choice}
    messages = client(url).messages
    turns = [{"role": "user", "content": "What is the weather in Rome?"}]
    whole = messages.create(**asked, messages=turns)
    with messages.stream(**asked, messages=turns) as stream:
        final = stream.get_final_message()
    call = whole.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = messages.create(**asked | {"tool_choice": {"type": "none"}, "max_tokens": 5}, messages=turns)
    return {
        "stop_reason": whole.stop_reason,
        "calls": [[one.name, one.input] for one in whole.content if one.type == "tool_use"],
        "streamed": [[one.name, one.input] for one in final.content if one.type == "tool_use"],
        "after": after.content[0].type,
    }


def refusals(url, model):
    try:
        image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}
        client(url).messages.create(model=model, max_tokens=5, messages=[{"role": "user", "content": [image]}])
    except anthropic.BadRequestError as error:
        return {"status": error.status_code, "type": error.type, "message": error.message}
    return {}


def sleep(url, model):
    try:
        client(url).messages.create(model=model, max_tokens=5, messages=MESSAGES)
    except anthropic.APIStatusError as error:
        found = {"status": error.status_code, "type": error.type, "message": error.message}
        return found | {"retry_after": error.response.headers.get("retry-after")}
    return {}


def proxied(url, model):
    """What comes through somebody else's proxy, which counts and keeps its own way."""
    asked = {"model": model, "max_tokens": 20, "extra_body": GREEDY, "messages": MESSAGES, "system": "Be brief."}
    messages = client(url).messages
    whole = messages.create(**asked)
    with messages.stream(**asked) as stream:
        words = "".join(stream.text_stream)
        final = stream.get_final_message()
    asked |= {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 100}
    called = messages.create(**asked)
    call = next(one for one in called.content if one.type == "tool_use")
    return {
        "whole": whole.content[0].text,
        "streamed": words,
        "stop_reasons": [whole.stop_reason, final.stop_reason],
        "output_tokens": [whole.usage.output_tokens, final.usage.output_tokens],
        "call": [call.name, [*call.input], called.stop_reason],
    }


if __name__ == "__main__":
    scenarios = {one.__name__: one for one in (generation, tools, refusals, sleep, proxied)}
    print(json.dumps(scenarios[sys.argv[1]](*sys.argv[2:])))
