"""Trains a model for a few steps and writes its weights into a running server, which answers differently afterwards.

Start a server of the same checkpoint in another terminal, then run this:

    shuteye serve ./checkpoint --enable-sleep-mode --dev-mode
    python examples/update_weights.py ./checkpoint

What a trainer in reinforcement learning does is the same, with another loss and more of everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shuteye.client import Client

PROMPT = "The capital of France is"
WANTED = " a sleeping model that dreams of weights."


def main() -> None:
    """Show the answer before and after an update in place, and after one through level 2."""
    arguments = parse_arguments()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    with Client(arguments.url, admin_api_key=arguments.admin_api_key) as client:
        before = show("as it was", arguments.url)

        train(model, tokenizer, steps=arguments.steps)
        report = client.upload_weights(safetensors_of(model))
        print(f"in place: {report.updated} tensors, {report.updated_bytes:,} bytes, {report.seconds:.2f} s")
        after = show("updated", arguments.url)
        assert after != before, "the update changed nothing"

        with memory_lent_by(client):
            train(model, tokenizer, steps=arguments.steps)
            client.wake_up(tags=["weights"])
            client.upload_weights(safetensors_of(model))
        show("updated again", arguments.url)

        client.reload_weights()
        assert show("as it was", arguments.url) == before, "reloading did not bring the checkpoint back"


@contextmanager
def memory_lent_by(client: Client) -> Iterator[None]:
    """Weights and KV cache are gone from here on; whoever is inside must wake the weights and write all of them."""
    slept = client.sleep(level=2, mode="keep")
    print(f"asleep: {slept.freed_bytes:,} bytes given back")
    yield
    client.wake_up(tags=["kv_cache"])


def train(model: torch.nn.Module, tokenizer: AutoTokenizer, *, steps: int) -> None:
    """Make `WANTED` likelier after `PROMPT`."""
    ids = tokenizer(PROMPT + WANTED, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


def safetensors_of(model: torch.nn.Module) -> bytes:
    """All weights under their names in the checkpoint; tied ones once."""
    return safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in model.named_parameters()})


def show(what: str, url: str) -> str:
    """Print, and return, what the server answers greedily."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    print(f"{what:>14}: {PROMPT}{text}")
    return text


def parse_arguments() -> argparse.Namespace:
    """What the caller asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the directory or hub id that the server was started with")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--admin-api-key", default=None, help="not needed in development mode")
    parser.add_argument("--steps", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
