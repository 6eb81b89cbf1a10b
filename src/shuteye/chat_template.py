"""Chat messages to a prompt: one template of a checkpoint, rendered as transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shuteye.errors import InvalidRequest

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What rendering can raise through no fault of ours: the template's own errors, and messages it did not expect."""


def require_template(source: str, *, param: str) -> None:
    """Refuse a text that is no template.

    Raises:
        InvalidRequest: says what is wrong, and on which line; `param` is who gave it.
    """
    try:
        _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequest(
            f"{param} is not a Jinja template: {error.message} (line {error.lineno}).", param=param
        ) from error
    except _TEMPLATE_FAILURES as error:
        raise InvalidRequest(f"{param} is not a Jinja template: {error}.", param=param) from error


class ChatTemplate:
    """One Jinja template of a checkpoint, rendered with transformers' settings in a sandbox."""

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def _template(self) -> jinja2.Template:
        return _environment().from_string(self.source)

    @cached_property
    def _variables(self) -> frozenset[str]:
        try:
            return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(self.source)))
        except jinja2.TemplateError:  # `render` will say so
            return frozenset()

    def reads(self, variable: str) -> bool:
        """Whether the template looks at a variable at all."""
        return variable in self._variables

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt. Text parts are joined for a template that only knows plain text.

        Raises:
            InvalidRequest: the template failed, or is not a template.
        """
        conversation = [_normalized(message) for message in messages]
        try:
            if not self.accepts_parts:
                conversation = [{**message, **_joined_content(message)} for message in conversation]
            return self._template.render({**variables, "messages": conversation})
        except _TEMPLATE_FAILURES as error:
            raise InvalidRequest(
                f"The model's chat template cannot render these messages: {error}", param="messages"
            ) from error

    @cached_property
    def accepts_parts(self) -> bool:
        """Whether the template reads `content` given as a list of parts, found by trying it."""
        probe = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
        try:
            rendered = self._template.render(messages=[probe], tools=None, documents=None, add_generation_prompt=False)
        except _TEMPLATE_FAILURES:
            return False
        return "probe" in rendered and "'type'" not in rendered and '"type"' not in rendered


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no null fields, reasoning under every name that templates read."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING_FIELDS if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _joined_content(message: Mapping[str, Any]) -> dict[str, str]:
    content = message.get("content")
    if not isinstance(content, list):
        return {}
    kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
    if kinds - {"text"}:
        raise ValueError(f"content has parts of type {sorted(map(str, kinds - {'text'}))}, but this model reads text.")
    return {"content": "\n".join(str(part.get("text", "")) for part in content)}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; when serving, its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which prompts must not be
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as in transformers
