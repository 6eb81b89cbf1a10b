"""GET /docs: the OpenAPI document as one page of HTML, which needs no script and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
code, .path { font-family: ui-monospace, monospace }
summary { cursor: pointer; padding: .3rem 0 } .method { display: inline-block; width: 3.5rem; font-weight: 600 }
.path { margin-right: 1rem } .says { color: #5b6b7b } .key { float: right; color: #5b6b7b; font-size: 85% }
table { border-collapse: collapse; margin: .5rem 0 1rem } td, th { text-align: left; padding: .2rem .8rem .2rem 0 }
td, th { vertical-align: top; border-bottom: 1px solid #e3e8ee; font-size: 90% }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #d5dde5 } td, th { border-color: #303a45 } }
"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Forbids all but the page's own style: what is shown comes from code, yet a page of a server is worth the care."""


def render(document: Mapping[str, Any]) -> str:
    """The page."""
    title = f"{document['info']['title']} {document['info']['version']}"
    operations = "".join(
        _operation(method, path, operation, document)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>Every route; click one for what it takes and answers. For programs, it is in "
        f'<a href="openapi.json">openapi.json</a>.</p>{operations}</body></html>'
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    says = operation.get("description", "")
    key = '<span class="key">needs a key</span>' if operation.get("security") else ""
    return (
        f'<details><summary>{key}<span class="method">{method.upper()}</span><span class="path">{escape(path)}</span>'
        f'<span class="says">{escape(says.partition(chr(10))[0])}</span></summary>'
        f"{_table(('takes', 'in', 'type', ''), _taken(operation, document))}"
        f"{_table(('status', 'when', 'answer'), _answers(operation))}</details>"
    )


def _taken(operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of all that a request may say; of bodies, the fields of the outermost object."""
    for parameter in operation.get("parameters", ()):
        yield (
            parameter["name"],
            parameter["in"],
            _type(parameter["schema"]),
            _notes(parameter["schema"], required=parameter.get("required", False)),
        )
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(content["schema"], document)
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            yield name, kind, _type(field), _notes(field, required=name in required)
        if "properties" not in schema:
            yield "the body", kind, _type(schema), schema.get("description", "")


def _answers(operation: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for status, answer in operation["responses"].items():
        kinds = answer.get("content", {})
        shapes = [f"{kind}: {_type(content['schema'])}" for kind, content in kinds.items() if "schema" in content]
        yield status, answer.get("description", ""), ", ".join(shapes) or ", ".join(kinds)


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    for alternative in schema.get("anyOf", [schema]):
        if "$ref" in alternative:
            found: Mapping[str, Any] = document["components"]["schemas"][_name(alternative["$ref"])]
            return found
    return schema


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _type(schema: Mapping[str, Any]) -> str:
    """What a value may be, in a few words."""
    if "$ref" in schema:
        return _name(schema["$ref"])
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, alternatives)))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _notes(schema: Mapping[str, Any], *, required: bool) -> str:
    default = f"default {schema['default']!r}. " if schema.get("default") is not None else ""
    return f"{'required. ' if required else default}{schema.get('description', '')}"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{names}</tr>{body}</table>" if body else ""


router = APIRouter()


@router.get("/docs", include_in_schema=False, response_model=None)
async def docs(request: Request) -> Response:
    """Every route on one page, which works without a network; GET `/openapi.json` is the same for programs."""
    app: FastAPI = request.app
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return Response(render(app.openapi()), media_type="text/html", headers=headers)
