"""Runs in the environment of OpenAI's agents SDK: what its users do, by both of its models, and prints it as JSON.

usage: with_openai_agents.py URL MODEL
"""

import asyncio
import json
import sys
from typing import Literal
from urllib.request import Request, urlopen

import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents.tracing import set_tracing_disabled
from pydantic import BaseModel

set_tracing_disabled(True)
QUESTION = "What is 2+2? Answer with a number."


class Place(BaseModel):
    """What is asked for: whatever a small model says, it ends."""

    kind: Literal["sea", "river"]
    salty: bool


@function_tool
def depth_of(place: Literal["sea", "river"]) -> str:
    """How deep the water is at a place, in metres."""
    return f"deep:{place}"


def agent(model, **more):
    settings = ModelSettings(temperature=0, max_tokens=200, **more.pop("settings", {}))
    return Agent(name="one", model=model, model_settings=settings, **more)


async def streamed(model):
    result = Runner.run_streamed(agent(model), QUESTION)
    events = [event async for event in result.stream_events()]
    return {"text": result.final_output, "events": len(events) > 2}


async def of_model(model):
    forced = agent(
        model, tools=[depth_of], tool_use_behavior="stop_on_first_tool", settings={"tool_choice": "depth_of"}
    )
    structured = Agent(name="two", model=model, output_type=Place, model_settings=ModelSettings(temperature=0))
    return {
        "chat": (await Runner.run(agent(model), QUESTION)).final_output,
        "stream": await streamed(model),
        "tool": (await Runner.run(forced, "How deep is the sea?")).final_output,
        "structured": type((await Runner.run(structured, QUESTION)).final_output).__name__,
    }


async def main():
    url, name = sys.argv[1:]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    kinds = {"chat completions": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}
    models = {kind: made(model=name, openai_client=client) for kind, made in kinds.items()}
    found = {kind: await of_model(model) for kind, model in models.items()}
    urlopen(Request(f"{url}/sleep", method="POST")).read()
    for kind, model in models.items():
        try:
            await Runner.run(agent(model), QUESTION)
        except openai.APIStatusError as error:
            found[kind]["asleep"] = error.status_code
    urlopen(Request(f"{url}/wake_up", method="POST")).read()
    for kind, model in models.items():
        found[kind]["after"] = (await Runner.run(agent(model), QUESTION)).final_output
    print(json.dumps(found))


asyncio.run(main())
