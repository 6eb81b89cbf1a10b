"""Runs in langchain's own environment: what its users do, across a sleep, and prints it as JSON.

usage: with_langchain.py URL MODEL
"""

import json
import sys
from typing import Literal
from urllib.request import Request, urlopen

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is 2+2? Answer with a number."


class Place(BaseModel):
    """What is asked for: whatever a small model says, it ends."""

    kind: Literal["sea", "river"]
    salty: bool


@tool
def depth_of(place: Literal["sea", "river"]) -> str:
    """How deep the water is at a place, in metres."""
    return f"deep:{place}"


def of_model(model):
    call = (
        model.bind_tools([depth_of], tool_choice="depth_of", strict=True).invoke("How deep is the sea?").tool_calls[0]
    )
    said = model.invoke(QUESTION)
    found = {
        "chat": said.text,
        "usage": [said.usage_metadata["input_tokens"], said.usage_metadata["output_tokens"]],
        "stream": "".join(chunk.text for chunk in model.stream(QUESTION)),
        "tool": [call["name"], sorted(call["args"])],
    }
    for method in ("json_schema", "function_calling"):
        found[method] = type(model.with_structured_output(Place, method=method).invoke(QUESTION)).__name__
    return found


def main():
    url, name = sys.argv[1:]
    given = {
        "base_url": f"{url}/v1",
        "api_key": "none",
        "model": name,
        "temperature": 0,
        "max_tokens": 200,
        "max_retries": 0,
    }
    models = {"chat completions": ChatOpenAI(**given), "responses": ChatOpenAI(**given, use_responses_api=True)}
    found = {kind: of_model(model) for kind, model in models.items()}
    urlopen(Request(f"{url}/sleep", method="POST")).read()
    for kind, model in models.items():
        try:
            model.invoke(QUESTION)
        except openai.APIStatusError as error:
            found[kind]["asleep"] = error.status_code
    urlopen(Request(f"{url}/wake_up", method="POST")).read()
    for kind, model in models.items():
        found[kind]["after"] = model.invoke(QUESTION).text
    print(json.dumps(found))


main()
