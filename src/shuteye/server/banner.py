"""What a server says of itself on a terminal once its model is loaded: where it is, what it serves, how to ask it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from shuteye.model_info import ModelInfo
from shuteye.server.context import ServerContext

_MIB = 1024**2

_QUESTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "generate": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}),
    "embed": ("/v1/embeddings", {"input": ["Hello"]}),
    "classify": ("/classify", {"input": ["Hello"]}),
    "score": ("/score", {"text_1": "What sleeps?", "text_2": ["A cat.", "A stone."]}),
}
"""By the model's task: a route, and what to ask there."""

_OF_A_BASE_MODEL = ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 64})


def banner(context: ServerContext, seconds: float) -> str:
    """Several lines, of which the last is a command to copy; the load took so many seconds."""
    info, url, name = context.engine.info, context.listening.url, context.model_names[0]
    rows = [
        ("weights", f"{info.weights_are}; {info.weights_bytes / _MIB:,.0f} MiB"),
        ("computes in", info.dtype),
        ("context", f"{info.max_model_len:,} tokens"),
        ("KV cache", _kv_cache(info)),
        ("API", f"{url}/docs"),
        ("try", _command(context)),
    ]
    lines = [f"  {label:<12}{value}" for label, value in rows if value]
    return "\n".join([f"{name} is ready on {url} after {seconds:.1f} s", *lines])


def _kv_cache(info: ModelInfo) -> str:
    if not info.kv_bytes_per_token:
        return ""
    size = f"up to {info.kv_cache_bytes / _MIB:,.0f} MiB, {info.kv_cache_tokens:,} tokens; it takes memory as it fills"
    return size if info.kv_cache_dtype in ("", info.dtype) else f"{info.kv_cache_dtype}, {size}"


def _command(context: ServerContext) -> str:
    """One that works as it is, in a shell that has the key in its environment if there is one."""
    url, name, task = context.listening.url, context.model_names[0], context.engine.info.task
    key = ' -H "Authorization: Bearer $SHUTEYE_API_KEY"' if context.config.api_key is not None else ""
    if task not in _QUESTIONS:
        return f"curl {url}/v1/audio/transcriptions{key} -F model={shlex.quote(name)} -F file=@speech.wav"
    route, question = _QUESTIONS[task]
    if task == "generate" and not context.engine.tokenizer.has_chat_template:
        route, question = _OF_A_BASE_MODEL
    body = shlex.quote(json.dumps({"model": name, **question}, ensure_ascii=False))
    return f"curl {url}{route}{key} -H 'Content-Type: application/json' -d {body}"
