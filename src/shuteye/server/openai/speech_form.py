"""The form of a request with speech: its fields, and what becomes of those that are not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.http.errors import invalid_request
from shuteye.server.http.ignored_fields import ignore
from shuteye.tasks.transcribe.requests import TranscribeParams

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
STREAMABLE = ("json", "text")
ENGLISH = frozenset({"en", "english"})

UNSUPPORTED: Mapping[str, tuple[str, ...]] = {
    "hotwords": (), "include": (), "include_stop_str_in_output": ("false",), "keywords": (), "known_speaker_names": (),
    "known_speaker_references": (), "languages": (), "length_penalty": ("1", "1.0"), "n": ("1",),
    "use_beam_search": ("false",), "watermarking": ("false",),
}  # fmt: skip
"""Fields of OpenAI's API, and of vLLM's, that would change the answer, each with the values that ask for nothing."""

HARMLESS = frozenset({"user", "vllm_xargs"})
"""Fields that change nothing in what is written down."""

_LISTS = frozenset({"timestamp_granularities"})


class SpeechForm(BaseModel):
    """The form's fields; None means that the caller did not say."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    file: UploadFile
    model: str | None = None
    language: str | None = None
    to_language: str | None = None
    prompt: str | None = None
    response_format: ResponseFormat = "json"
    chunking_strategy: str | None = None
    temperature: float = Field(default=0.0, ge=0.0, le=1.0)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    timestamp_granularities: list[Literal["segment", "word"]] | None = None
    stream: bool = False
    stream_include_usage: bool = False
    stream_continuous_usage_stats: bool = False
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("file", mode="before")
    @classmethod
    def _is_a_file(cls, value: object) -> object:
        if isinstance(value, str):
            raise InvalidRequest("file must be an uploaded file (a part with a file name), got text.", param="file")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> SpeechForm:
        self._check_times()
        if self.stream and self.response_format not in STREAMABLE:
            raise InvalidRequest(
                f"stream needs response_format 'json' or 'text', got {self.response_format!r}: the others are known "
                "only at the end.",
                param="response_format",
            )
        for name in ("stream_include_usage", "stream_continuous_usage_stats"):
            if getattr(self, name) and not self.stream:
                raise InvalidRequest("Stream options can only be defined when `stream=True`.", param=name)
        if self.chunking_strategy not in {None, "auto"}:
            raise InvalidRequest(
                f"chunking_strategy must be 'auto', got {self.chunking_strategy!r}: the model itself says where a "
                "window of its audio ends.",
                param="chunking_strategy",
            )
        return self

    def _check_times(self) -> None:
        wanted = self.timestamp_granularities or []
        if "word" in wanted:
            raise InvalidRequest(
                "Timestamps of words are not supported by this server; ask for 'segment'.",
                param="timestamp_granularities[]",
            )
        if wanted and self.response_format != "verbose_json":
            raise InvalidRequest(
                f"timestamp_granularities[] needs response_format 'verbose_json', got {self.response_format!r}.",
                param="timestamp_granularities[]",
            )

    @classmethod
    def of(cls, fields: Mapping[str, list[Any]]) -> SpeechForm:
        """Validate the parts of a form, by name without `[]`; an empty text is as good as none.

        Raises:
            InvalidRequest: a field is not supported, given twice, has a bad value, or is unknown where such fields are
                refused; `param` names it.
        """
        given = {
            name: values
            for name, values in fields.items()
            if values != [""] and name not in HARMLESS and not _asks_for_nothing(name, values)
        }
        for name, values in given.items():
            if len(values) > 1 and name not in _LISTS:
                raise InvalidRequest(f"Field '{name}' is given {len(values)} times.", param=name)
        unknown = [name for name in given if name not in cls.model_fields]
        if unknown and ignore(unknown):
            given = {name: values for name, values in given.items() if name in cls.model_fields}
        try:
            return cls.model_validate({name: each if name in _LISTS else each[0] for name, each in given.items()})
        except ValidationError as error:
            raise invalid_request([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from error

    def params(self, task: Literal["transcribe", "translate"]) -> TranscribeParams:
        """What the engine is asked for; the formats that show times need them.

        Raises:
            InvalidRequest: a value is out of range, or the answer is to be in another language than it can be.
        """
        if self.to_language is not None and (task == "transcribe" or self.to_language.lower() not in ENGLISH):
            raise InvalidRequest(
                "Whisper translates into English alone, and where it is asked to.", param="to_language"
            )
        optional = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        said = {name: getattr(self, name) for name in optional if getattr(self, name) is not None}
        return TranscribeParams(
            language=self.language,
            temperature=self.temperature,
            seed=self.seed,
            timestamps=self.response_format not in STREAMABLE,
            task=task,
            max_tokens=self.max_completion_tokens,
            **said,
        )


def _asks_for_nothing(name: str, values: list[Any]) -> bool:
    if name.startswith("chunking_strategy["):  # an object, as OpenAI's client writes it
        raise InvalidRequest("chunking_strategy must be 'auto', got an object.", param="chunking_strategy")
    if name not in UNSUPPORTED:
        return False
    if all(isinstance(value, str) and value.lower() in UNSUPPORTED[name] for value in values):
        return True
    raise InvalidRequest(f"'{name}' is not supported by this server. Remove it from the request.", param=name)


_SWITCH: Mapping[str, Any] = {"type": "boolean", "default": False}

FORM_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "wav, flac, mp3 or ogg (Vorbis, Opus)."},
        "model": {"type": "string"},
        "language": {"type": "string", "description": "ISO 639-1 code or English name of what is spoken."},
        "to_language": {"type": "string", "description": "Of translations: English."},
        "prompt": {"type": "string", "description": "Taken for the text before the audio."},
        "response_format": {
            "type": "string",
            "enum": ["json", "verbose_json", "text", "srt", "vtt"],
            "default": "json",
        },
        "chunking_strategy": {"type": "string", "enum": ["auto"]},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": -1},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
        "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "timestamp_granularities[]": {"type": "array", "items": {"enum": ["segment"]}},
        "stream": _SWITCH,
        "stream_include_usage": _SWITCH,
        "stream_continuous_usage_stats": _SWITCH,
        "seed": {"type": "integer", "minimum": 0},
    },
}
"""The form in the OpenAPI document."""
