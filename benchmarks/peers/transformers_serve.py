"""`transformers serve` with continuous batching, in an environment that sees the project's torch and transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from peers.base import CONTEXT, MAX_STREAMS, how_to_install, peer_python
from peers.http_engine import HttpEngine

BLOCK_SIZE = 32


class TransformersServe(HttpEngine):
    """The model is loaded by the first request, and again by the first one after `/reset`."""

    sleeps = "POST /reset, which unloads the model"

    def missing(self) -> str | None:
        return None if peer_python("transformers").exists() else how_to_install("transformers")

    def version(self) -> str:
        program = "from importlib.metadata import version as v; print(v('transformers') + ', torch ' + v('torch'))"
        run = subprocess.run([peer_python("transformers"), "-c", program], capture_output=True, text=True, check=True)
        return f"transformers {run.stdout.strip()}"

    def arguments(self) -> list[str]:
        blocks = MAX_STREAMS * CONTEXT // BLOCK_SIZE
        cache = ["--cb-block-size", str(BLOCK_SIZE), "--cb-num-blocks", str(blocks), "--cb-max-batch-tokens", "512"]
        serve = [str(peer_python("transformers")), "-m", "transformers.cli.transformers", "serve"]
        return [*serve, "--continuous-batching", "--device", "cpu", "--dtype", "bfloat16", *cache]

    def command(self) -> str:
        return super().command().replace("python -m transformers.cli.transformers", "transformers")

    @property
    def fields(self) -> Mapping[str, Any]:
        """It refuses fields that OpenAI does not have; a generation config of our own has no token that ends a text."""
        return {"generation_config": json.dumps({"eos_token_id": -1, "do_sample": False})}

    def sleep(self) -> float:
        return self.timed_call("/reset")
