"""Runs in pydantic-ai's own environment: what its users do, across a sleep, and prints it as JSON.

usage: with_pydantic_ai.py URL MODEL
"""

import asyncio
import json
import sys
from typing import Literal
from urllib.request import Request, urlopen

import openai
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is 2+2? Answer with a number."
SHORT = {"temperature": 0.0, "max_tokens": 20}


class Place(BaseModel):
    """What is asked for: whatever a small model says, it ends."""

    kind: Literal["sea", "river"]
    salty: bool


async def streamed(agent):
    async with agent.run_stream(QUESTION, model_settings=SHORT) as result:
        return "".join([piece async for piece in result.stream_text(delta=True)])


async def of_model(model):
    plain = Agent(model)
    found = {"chat": (await plain.run(QUESTION, model_settings=SHORT)).output, "stream": await streamed(plain)}
    for kind in (ToolOutput, NativeOutput):
        agent = Agent(model, output_type=kind(Place))
        result = await agent.run(QUESTION, model_settings={"temperature": 0.0, "max_tokens": 200})
        found[kind.__name__] = type(result.output).__name__
    return found


async def main():
    url, name = sys.argv[1:]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    provider = OpenAIProvider(openai_client=client)
    kinds = {"chat completions": OpenAIChatModel, "responses": OpenAIResponsesModel}
    models = {kind: made(name, provider=provider) for kind, made in kinds.items()}
    found = {kind: await of_model(model) for kind, model in models.items()}
    urlopen(Request(f"{url}/sleep", method="POST")).read()
    for kind, model in models.items():
        try:
            await Agent(model).run(QUESTION, model_settings=SHORT)
        except ModelHTTPError as error:
            found[kind]["asleep"] = error.status_code
    urlopen(Request(f"{url}/wake_up", method="POST")).read()
    for kind, model in models.items():
        found[kind]["after"] = (await Agent(model).run(QUESTION, model_settings=SHORT)).output
    print(json.dumps(found))


asyncio.run(main())
