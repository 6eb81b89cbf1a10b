"""Every route of the app: whom it needs, what a right request looks like, and what sleeping changes for it.

Knows nothing of how routes are tested. `test_route_table.py` fails for a route that has no row here.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["protected", "unchanged", "tells", "control"]


@dataclass(frozen=True, slots=True)
class Row:
    """One route.

    Attributes:
        kind: `protected` needs the weights, so the policy decides while asleep; `unchanged` answers as when awake;
            `tells` answers 200 too, but says that the model sleeps; `control` is behind the admin key.
        status: what an `unchanged` route answers.
        shape: whose errors the route answers with.
        path: as it is registered; `url` is where to send a request, if the path has parameters.
        stream_end: what the last event of a stream has.
        task: what the model must be for, if the route is for one task only.
        request: what a request of this route is made of, as the test client takes it.
        streamed: what to send instead to get a stream; None if the route has none.
    """

    kind: Kind
    method: str
    path: str
    request: dict[str, Any] = field(default_factory=dict)
    streamed: dict[str, Any] | None = None
    stream_end: bytes = b"data: [DONE]"
    task: str | None = None
    url: str | None = None
    status: int = 200
    shape: Literal["openai", "anthropic"] = "openai"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} {self.path}"


def _posts(path: str, task: str, **body: Any) -> Row:
    return Row("protected", "POST", path, {"json": body}, task=task)


def _streams(path: str, *, stream_end: bytes = b"data: [DONE]", **body: Any) -> Row:
    streamed = {"json": body | {"stream": True}}
    return Row("protected", "POST", path, {"json": body}, streamed, task="generate", stream_end=stream_end)


def _named(body: dict[str, Any]) -> dict[str, Any]:
    """A request with an id, which is then the same in every answer."""
    return {"json": body, "headers": {"X-Request-Id": "one"}}


def _hears(path: str) -> Row:
    sent = {"files": {"file": ("silence.wav", _silence(), "audio/wav")}}
    return Row("protected", "POST", path, sent, sent | {"data": {"stream": "true"}}, task="transcribe")


def _silence() -> bytes:
    """A tenth of a second of it, as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16000)
        writer.writeframes(bytes(3200))
    return file.getvalue()


HI = [{"role": "user", "content": "hi"}]
PAIR = {"text_1": "a", "text_2": "b"}
RANKED = {"query": "a", "documents": ["b", "c"]}

_MESSAGE = {"messages": HI, "max_tokens": 2}

PROTECTED = (
    Row(
        "protected",
        "POST",
        "/v1/messages",
        {"json": _MESSAGE},
        {"json": _MESSAGE | {"stream": True}},
        stream_end=b"event: message_stop",
        task="generate",
        shape="anthropic",
    ),
    _streams("/v1/chat/completions", messages=HI, max_tokens=2),
    _streams("/v1/completions", prompt="abc", max_tokens=2),
    _streams("/invocations", messages=HI, max_tokens=2),
    _streams("/v1/responses", stream_end=b"response.incomplete", input="hi", max_output_tokens=2),
    _posts("/v1/embeddings", "embed", input="abc"),
    _posts("/pooling", "embed", input="abc"),
    _posts("/v2/embed", "embed", texts=["abc"]),
    _posts("/classify", "classify", input="abc"),
    _posts("/score", "score", **PAIR),
    _posts("/v1/score", "score", **PAIR),
    _posts("/rerank", "score", **RANKED),
    _posts("/v1/rerank", "score", **RANKED),
    _posts("/v2/rerank", "score", **RANKED),
    _hears("/v1/audio/transcriptions"),
    _hears("/v1/audio/translations"),
)

OTHERS = (
    Row("unchanged", "POST", "/tokenize", {"json": {"prompt": "abc"}}),
    Row("unchanged", "POST", "/detokenize", {"json": {"tokens": [64, 65]}}),
    Row("unchanged", "GET", "/tokenizer_info"),
    Row("unchanged", "GET", "/load"),
    Row("unchanged", "GET", "/v1/models"),
    Row("unchanged", "GET", "/v1/models/{name:path}", url="/v1/models/tiny"),
    Row("unchanged", "GET", "/v1/responses/{name}", url="/v1/responses/resp_1", status=404),
    Row("unchanged", "DELETE", "/v1/responses/{name}", url="/v1/responses/resp_1", status=404),
    Row("unchanged", "POST", "/v1/responses/{name}/cancel", url="/v1/responses/resp_1/cancel", status=404),
    Row("unchanged", "POST", "/v1/messages/count_tokens", {"json": {"messages": HI}}),
    Row("unchanged", "POST", "/v1/messages/render", _named(_MESSAGE)),
    Row("unchanged", "POST", "/v1/chat/completions/render", _named({"messages": HI})),
    Row("unchanged", "POST", "/v1/completions/render", _named({"prompt": "abc"})),
    Row("unchanged", "POST", "/v1/responses/render", _named({"input": "hi"})),
    Row("unchanged", "GET", "/health"),
    Row("unchanged", "GET", "/ping"),
    Row("unchanged", "POST", "/ping"),
    Row("unchanged", "GET", "/version"),
    Row("unchanged", "GET", "/openapi.json"),
    Row("unchanged", "GET", "/docs"),
    Row("tells", "GET", "/ready"),
    Row("tells", "GET", "/state"),
    Row("tells", "GET", "/metrics"),
)

CONTROL = (
    Row("control", "POST", "/sleep"),
    Row("control", "POST", "/wake_up"),
    Row("control", "POST", "/unload"),
    Row("control", "GET", "/is_sleeping"),
    Row("control", "POST", "/pause"),
    Row("control", "POST", "/resume"),
    Row("control", "GET", "/is_paused"),
    Row("control", "POST", "/reload_weights"),
    Row("control", "POST", "/reset_prefix_cache"),
    Row("control", "POST", "/update_weights", {"json": {"path": "/no/such.safetensors"}}),
    Row("control", "POST", "/collective_rpc", {"json": {"method": "residual_bytes"}}),
    Row("control", "POST", "/restart_engine"),
    Row("control", "POST", "/abort_requests"),
    Row("control", "GET", "/server_info"),
    Row("control", "POST", "/shutdown"),
    Row("control", "GET", "/get_world_size"),
    Row("control", "POST", "/release_kv_cache_memory"),
)

ROUTES = PROTECTED + OTHERS + CONTROL
