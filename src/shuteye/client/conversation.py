"""A conversation with a served model: what was said is kept, answers come piece by piece.

Knows nothing of terminals, and wakes nobody: a sleeping model is the caller's to wake.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from shuteye.client.answers import error_from_response, model_names
from shuteye.client.control import DEFAULT_TIMEOUT_S, bearer, server_root, translated
from shuteye.errors import InternalError

Kind = Literal["content", "reasoning"]
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("reasoning", "reasoning"),
    ("reasoning_content", "reasoning"),
    ("content", "content"),
)
"""Keys of a delta, and what each holds; servers write one of the first two."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some characters of an answer."""

    text: str
    kind: Kind = "content"


def served_names(
    base_url: str,
    *,
    api_key: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    transport: httpx2.BaseTransport | None = None,
) -> tuple[str, ...]:
    """The models that a server lists.

    Raises:
        AuthenticationFailed: the key is wrong or missing; `param` is `api_key`.
        ShuteyeError: there is no server, or it is none that serves models.
    """
    url = f"{server_root(base_url)}/v1/models"
    headers = bearer(api_key, name="api_key")
    with translated(base_url), httpx2.Client(headers=headers, timeout=timeout_s, transport=transport) as http:
        response = http.get(url)
    return model_names(url, response.status_code, response.content)


class Conversation:
    """Messages between a user and a model that an OpenAI-compatible server serves; a context manager.

    Args:
        base_url: the server's root; a `/v1` at its end is left out.
        model: its name there (`served_names` lists those).
        system: the message that stands before all others, if any.
        options: further fields of every request, such as `max_tokens`; those that are None are left out.
        timeout_s: how long nothing may come before an answer is given up.
        transport: instead of real connections, for tests.

    Raises:
        InvalidRequest: at construction, a key that no header can carry.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        system: str | None = None,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.model = model
        self.finish_reason: str | None = None
        """Why the last answer ended, as the server said: `stop`, `length`, `abort`, …; None if it did not say."""
        self._base_url = server_root(base_url)
        self._options = {name: value for name, value in (options or {}).items() if value is not None}
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._http = httpx2.Client(headers=bearer(api_key, name="api_key"), timeout=timeout_s, transport=transport)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the next request begins with, oldest first."""
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        return first + self._messages

    def clear(self) -> None:
        """Forget all but the system's message."""
        self._messages.clear()

    def ask(self, text: str) -> Generator[Piece]:
        """The model's answer to `text`, as it comes; closing the generator ends it at the server, too.

        Both are remembered once anything of an answer has come: an answer that breaks off, or that is left early, as
        far as it went. Reasoning is not part of what is remembered.

        Raises:
            ModelSleeping: wake the model and ask again.
            ShuteyeError: what else the server answered.
            ServerUnreachable: nobody answers, or not in time.
        """
        self.finish_reason = None
        question = {"role": "user", "content": text}
        said: list[str] = []
        try:
            for piece in self._streamed([*self.messages, question]):
                if piece.kind == "content":
                    said.append(piece.text)
                yield piece
        finally:
            if said or self.finish_reason is not None:
                self._messages += [question, {"role": "assistant", "content": "".join(said)}]

    def _streamed(self, messages: list[dict[str, str]]) -> Iterator[Piece]:
        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        path = f"{self._base_url}/v1/chat/completions"
        with translated(self._base_url), self._http.stream("POST", path, json=body) as response:
            if not response.is_success:
                raise error_from_response(response.status_code, response.read())
            for line in response.iter_lines():
                yield from self._pieces(line)

    def _pieces(self, line: str) -> Iterator[Piece]:
        """What one line of the stream holds (Server-Sent Events with chunks of OpenAI's shape)."""
        payload = line.removeprefix("data:").strip()
        if payload == line.strip() or payload == "[DONE]":
            return
        try:
            chunk = json.loads(payload)
            if "error" in chunk:
                raise error_from_response(int(chunk["error"].get("code") or 500), payload.encode())
            for choice in chunk.get("choices", ()):
                delta = choice.get("delta") or {}
                for key, kind in _KINDS:
                    if delta.get(key):
                        yield Piece(str(delta[key]), kind)
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InternalError(f"{self._base_url} sent no chunk of a chat completion ({error!r}).") from error

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
