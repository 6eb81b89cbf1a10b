"""Runs in instructor's own environment: what its users do, across a sleep, and prints it as JSON.

usage: with_instructor.py URL MODEL
"""

import json
import sys
from typing import Literal
from urllib.request import Request, urlopen

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "What is 2+2? Answer with a number."}]
MODES = ("TOOLS", "JSON_SCHEMA")


class Place(BaseModel):
    """What is asked for: whatever a small model says, it ends."""

    kind: Literal["sea", "river"]
    salty: bool


def ask(client, name, **more):
    return client.chat.completions.create(
        model=name, messages=MESSAGES, response_model=Place, temperature=0, max_tokens=200, max_retries=1, **more
    )


def main():
    url, name = sys.argv[1:]
    openai_client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    clients = {mode: instructor.from_openai(openai_client, mode=getattr(instructor.Mode, mode)) for mode in MODES}
    found = {mode: type(ask(client, name)).__name__ for mode, client in clients.items()}
    partial = clients["JSON_SCHEMA"].chat.completions.create_partial(
        model=name, messages=MESSAGES, response_model=Place, temperature=0, max_tokens=200
    )
    found["partial"] = sorted(list(partial)[-1].model_dump())
    urlopen(Request(f"{url}/sleep", method="POST")).read()
    try:
        ask(clients["TOOLS"], name)
    except InstructorRetryException as error:
        found["asleep"] = "sleep mode" in str(error)
    urlopen(Request(f"{url}/wake_up", method="POST")).read()
    found["after"] = type(ask(clients["TOOLS"], name)).__name__
    print(json.dumps(found))


main()
