"""What callers ask the output to be: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

Knows nothing of grammars beyond their names; whether one can be used is found where it is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shuteye.errors import InvalidRequest
from shuteye.request import StructuredOutputsParams
from shuteye.server.protocol.lists import Many

GUIDED: Mapping[str, str] = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
}  # fmt: skip
"""vLLM's older fields, and what they are called in `structured_outputs`."""


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. It is always held to strictly, whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest(
                "response_format needs json_schema if its type is 'json_schema', and has none otherwise.",
                param="response_format",
            )
        return self

    def structure(self, param: str = "response_format") -> StructuredOutputsParams | None:
        """What the output must be; None for plain text."""
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.json_schema, param=param)
        return StructuredOutputsParams(json_object=True, param=param) if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    wanted_json: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    disable_fallback: bool | None = None  # there is one backend only
    whitespace_pattern: str | None = None
    structural_tag: None = None

    def structure(self) -> StructuredOutputsParams:
        """What the output must be.

        Raises:
            InvalidRequest: nothing, or several things.
        """
        return StructuredOutputsParams(
            json=self.wanted_json,
            json_object=self.json_object,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            disable_any_whitespace=self.disable_any_whitespace is True,
            whitespace_pattern=self.whitespace_pattern,
        )


class StructureFields(BaseModel):
    """The fields that ask for a structure; at most one may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """What the output must be, or None if it is free.

        Raises:
            InvalidRequest: several fields ask for something.
        """
        asked = [name for name in ("structured_outputs", *GUIDED) if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            asked.append("response_format")
        if len(asked) > 1:
            raise InvalidRequest(f"Only one of {' and '.join(asked)} can be used.", param=asked[0])
        if not asked:
            return None
        if asked[0] in GUIDED:
            return self._guided(asked[0])
        if self.structured_outputs is not None:
            return self.structured_outputs.structure()
        assert self.response_format is not None
        return self.response_format.structure()

    def _guided(self, name: str) -> StructuredOutputsParams:
        wanted = {GUIDED[name]: getattr(self, name)}
        return StructuredOutputsParams(**wanted, whitespace_pattern=self.guided_whitespace_pattern, param=name)
