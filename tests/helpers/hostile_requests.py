"""Requests made of an app's own OpenAPI document, each with one field that holds what no client of good will sends.

A new route, or a new field of one, is covered by being in the document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

DEEP = 100_000
MARK = "@@hostile@@"
CHAIN = json.dumps(
    {"$defs": {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(999)}, "$ref": "#/$defs/d0"}
)

VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "one and a half": "1.5",
    "2^31": str(2**31),
    "2^63 - 1": str(2**63 - 1),
    "2^63": str(2**63),
    "2^64": str(2**64),
    "-2^63": str(-(2**63)),
    "400 digits": "9" * 400,
    "5,000 digits": "9" * 5000,
    "beyond floats": "1e999",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "empty text": '""',
    "blank": '" "',
    "surrogate": '"\\ud800"',
    "surrogate in words": '"a \\udfff b"',
    "NUL": '"\\u0000"',
    "text of 100 kB": f'"{"ab " * 33_000}"',
    "a word of 100 kB": f'"{"x" * 100_000}"',
    "deep text": json.dumps("[" * DEEP),
    "open text": json.dumps('{"a":' * 900),
    "parentheses": json.dumps("(" * 60_000),
    "repetition": '"(a{1000}){1000}"',
    "rule": json.dumps('start: "a"'),
    "chain": json.dumps(CHAIN),
    "chain object": CHAIN,
    "empty list": "[]",
    "list of null": "[null]",
    "list of empty text": '[""]',
    "list of surrogate": '["\\ud800"]',
    "list of -1": "[-1]",
    "list of 2^63": f"[{2**63}]",
    "list of lists": "[[[[]]]]",
    "list of objects": '[{}, {"type": "text"}]',
    "100,000 ones": json.dumps([1] * 100_000),
    "100,000 texts": json.dumps(["a"] * 100_000),
    "100,000 objects": json.dumps([{}] * 100_000),
    "empty object": "{}",
    "self": '{"self": 1, "messages": 2, "cls": 3}',
    "schema": '{"type": "object"}',
    "odd schema": '{"type": "\\ud800"}',
    "reference": '{"$ref": "#"}',
    "infinite bound": '{"type": "number", "maximum": 1e999}',
    "same key": '{"a": 1, "a": 2}',
    "100 deep": "[" * 100 + "]" * 100,
    "500 deep": '{"a":' * 500 + "1" + "}" * 500,
    "too deep": "[" * DEEP,
}
"""What a field holds, as it stands in the JSON; some of it is no JSON."""

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" ",
    "NUL": b"\0",
    "no UTF-8": b"\xff\xfe",
    "surrogate": b"\xed\xa0\x80",
    "long": b"a" * 200_000,
    "number": b"1e999",
    "NaN": b"nan",
    "digits": b"9" * 5000,
    "newline": b"\r\n\r\n",
    "json": b'{"a": 1}',
    "word": b"word",
}
"""What a field of a form holds, or a parameter of a query or a path."""

SENSIBLE: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/score": {"text_1": "a", "text_2": ["b", "c"]},
    "/v1/score": {"text_1": "a", "text_2": ["b", "c"]},
    "/tokenize": {"prompt": "a"},
}
"""Bodies of routes whose schema does not say enough to make one that is served, and soon."""

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Request:
    """One request; `what` says which field holds what. A body is made when it is sent: all together are gigabytes."""

    method: str
    path: str
    what: str
    make_body: Callable[[], bytes] = bytes
    content_type: str = ""

    @property
    def body(self) -> bytes:
        return self.make_body()


def requests_of(document: dict[str, Any]) -> Iterator[list[Request]]:
    """For each field of each route, all requests with something hostile in it."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _requests(document, method.upper(), path, operation)


def _requests(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> Iterator[list[Request]]:
    for parameter in operation.get("parameters", ()):
        yield [_with_parameter(method, path, parameter, name) for name in TEXTS]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        blank = Request(method, path, "", content_type=kind)
        if kind == "application/json":
            base = _sample(document, schema) | SENSIBLE.get(path, {})
            streams = [base | {"stream": True}] if "stream" in _resolved(document, schema).get("properties", {}) else []
            for field in [(), *_fields(document, schema)]:
                yield [_with_value(blank, one, field, name) for name in VALUES for one in (base, *streams)]
        elif kind == "multipart/form-data":
            for field in _resolved(document, schema)["properties"]:
                yield [_with_form(blank, field, text) for text in TEXTS]
        else:
            yield [
                replace(blank, what=f"body: {name}", make_body=lambda text=text: text) for name, text in TEXTS.items()
            ]


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _alternatives(document: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    schema = _resolved(document, schema)
    return [_resolved(document, one) for one in schema.get("anyOf") or schema.get("oneOf") or [schema]]


def _sample(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """Something that fits, as small as can be."""
    schema = next(one for one in _alternatives(document, schema) if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: _sample(document, properties[name]) for name in schema.get("required", ())}
        case "array":
            return [_sample(document, schema["items"])] if schema.get("items") else []
    return {"string": "a", "integer": 1, "number": 1.0, "boolean": False}.get(schema.get("type", ""), {})


def _fields(document: dict[str, Any], schema: dict[str, Any], above: Path = ()) -> Iterator[Path]:
    """Every field, those within objects and lists, too."""
    if len(above) > 6:
        return
    for one in _alternatives(document, schema):
        for name, inner in one.get("properties", {}).items():
            yield (*above, name)
            yield from _fields(document, inner, (*above, name))
        if isinstance(one.get("additionalProperties"), dict):
            yield (*above, "some name")
        if one.get("type") == "array" and one.get("items"):
            yield (*above, 0)
            yield from _fields(document, one["items"], (*above, 0))


def _with_value(blank: Request, base: Any, field: Path, name: str) -> Request:
    where = ".".join(map(str, field)) or "body"

    def body() -> bytes:
        return json.dumps(_put(base, field, MARK)).replace(json.dumps(MARK), VALUES[name]).encode()

    return replace(blank, what=f"{where}: {name}", make_body=body)


def _put(into: Any, field: Path, value: Any) -> Any:
    """A copy of `into` with the value there; what is missing on the way is made, with the type of what it is in."""
    if not field:
        return value
    first, *rest = field
    if isinstance(first, int):
        inner = into[0] if isinstance(into, list) and into else {}
        return [_put(inner, tuple(rest), value)]
    given = into if isinstance(into, dict) else {}
    return {**given, first: _put(given.get(first), tuple(rest), value)}


def _with_parameter(method: str, path: str, parameter: dict[str, Any], name: str) -> Request:
    value = quote(TEXTS[name][:3000], safe="")
    if parameter["in"] == "path":
        path = path.replace(f"{{{parameter['name']}}}", value)
    else:
        path = f"{path}?{parameter['name']}={value}"
    return Request(method, path, f"{parameter['name']}: {name}")


def _with_form(blank: Request, field: str, name: str) -> Request:
    parts = {"file": (b"RIFF" if field != "file" else TEXTS[name]), **({field: TEXTS[name]} if field != "file" else {})}
    body = b""
    for part, content in parts.items():
        file = b'; filename="f.wav"' if part == "file" else b""
        head = b'--x\r\nContent-Disposition: form-data; name="' + part.encode() + b'"' + file
        body += head + b"\r\n\r\n" + content + b"\r\n"
    content_type = "multipart/form-data; boundary=x"
    return replace(blank, what=f"{field}: {name}", make_body=lambda: body + b"--x--\r\n", content_type=content_type)


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
RAW: dict[str, bytes] = {
    "made-up method": b"MADEUP /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "long method": b"M" * 9000 + b" /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "path without a slash": b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
    "path that is no UTF-8": b"GET /%ff%fe/%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "long path": b"GET /" + b"p" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "wrong length": POST + b"Content-Length: nine\r\n\r\n",
    "huge length": POST + b"Content-Length: 99999999999\r\n\r\n{}",
    "length twice": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "bad chunks": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "odd content type": POST + b"Content-Type: \xff;;=\r\nContent-Length: 2\r\n\r\n{}",
    "no content type": POST + b"Content-Length: 2\r\n\r\n\xff\xfe",
    "form for JSON": POST + b"Content-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\n{}",
    "odd key": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    "odd request id": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
}
"""What goes over the socket as it stands."""
