"""Tells a model of tools in plain words where its chat template has none for them.

Knows nothing of templates. The words ask for calls in Hermes' format, which the default reader reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shuteye.server.reading.tool_formats import HERMES_BEGIN, HERMES_END

_INTRODUCTION = (
    "You can call these functions, each described by a JSON object on a line of its own:\n{tools}\n"
    "To call one, write a JSON object with its name and its arguments, like this:\n"
    f'{HERMES_BEGIN}\n{{{{"name": "…", "arguments": {{{{…}}}}}}}}\n{HERMES_END}'
)


def in_plain_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with tools described in its system message, and calls and their results written out as text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    described = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=described)
    if plain and plain[0]["role"] == "system":
        head = plain[0] | {"content": f"{_text(plain[0].get('content'))}\n\n{introduction}"}
        return [head, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = _text(message.get("content"))
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if message.get("tool_calls"):
        calls = [f"{HERMES_BEGIN}\n{_call(call['function'])}\n{HERMES_END}" for call in message["tool_calls"]]
        return {"role": message["role"], "content": "\n".join([*([content] if content else []), *calls])}
    return dict(message)


def _call(function: Mapping[str, Any]) -> str:
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""
