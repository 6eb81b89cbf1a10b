"""Text to token ids and back, and chat messages to a prompt, from the files of a checkpoint.

Knows nothing of models, requests or HTTP; needs neither torch nor transformers, so that the API process does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shuteye.errors import InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    import tokenizers

    from shuteye.chat_template import ChatTemplate

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that chat templates may name (transformers' SPECIAL_TOKENS_ATTRIBUTES)."""

REPLACEMENT = "\ufffd"
LONG_TEXT = 8192
"""Characters beyond which encoding takes longer than others should wait: it then releases the GIL."""


class Tokenizer:
    """A checkpoint's tokenizer and its chat template.

    Args:
        backend: the tokenizer proper; its truncation and padding are switched off.
        special_tokens: the named special tokens, by SPECIAL_TOKEN_NAMES.
        chat_templates: Jinja sources by name; "default", and "tool_use" for when tools are given.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})  # sources
        self._templates: dict[str, ChatTemplate] = {}
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_directory(cls, path: str | Path, *, chat_template: str | None = None) -> Tokenizer:
        """Load tokenizer.json, and tokenizer_config.json and chat templates where they exist.

        Args:
            chat_template: the source of one template that takes the place of all of the checkpoint's.

        Raises:
            InvalidRequest: `chat_template` is no template.
            UnsupportedModel: there is no tokenizer.json, or a file cannot be understood.
        """
        import tokenizers  # whoever only counts tokens, such as an engine, never needs it

        directory = Path(path)
        source = directory / "tokenizer.json"
        if not source.is_file():
            raise UnsupportedModel(
                f"{directory} has no tokenizer.json. Save the tokenizer there with transformers' save_pretrained.",
                param="model",
            )
        config = _read_config(directory / "tokenizer_config.json")
        try:
            # tokenizers raises bare Exception for whatever it cannot parse
            backend = tokenizers.Tokenizer.from_file(str(source))
        except Exception as error:
            raise UnsupportedModel(f"{source} is not a tokenizer: {error}.", param="model") from error
        templates = _read_chat_templates(directory, config) if chat_template is None else _only_template(chat_template)
        return cls(backend, special_tokens=_special_tokens(config), chat_templates=templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. For a rendered chat pass `add_special_tokens=False`: its template wrote them.

        Raises:
            InvalidRequest: the text has a lone surrogate (JSON can carry one), which is no character.
        """
        try:
            ids: list[int] = self._encoding(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise InvalidRequest(
                f"The prompt cannot be tokenized, as it is not valid Unicode: {error}.", param="prompt"
            ) from error
        return ids

    def _encoding(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        if len(text) <= LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        # of tokenizers' methods, only those for batches release the GIL; their threads are not worth it for short texts
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]

    def encode_pair(
        self,
        text: str,
        pair: str | None = None,
        *,
        max_length: int | None = None,
        max_lengths: Sequence[int] = (0, 0),
        cut: Literal["left", "right"] = "right",
        add_special_tokens: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a text or of a pair of texts, and for each id which text it belongs to (0 or 1).

        Args:
            max_length: cut the texts so that all ids, special ones included, are at most so many; of a pair the longer
                text is cut first (what transformers calls "longest_first").
            max_lengths: cut the text, and the other of a pair, to so many ids before that; 0 leaves them as they are.
            cut: which end of a text is cut off.

        Raises:
            InvalidRequest: as `encode`; or not even the special tokens fit.
        """
        texts = [text] if pair is None else [text, pair]
        try:
            encoded = [self._encoding(each, add_special_tokens=False) for each in texts]
        except TypeError as error:
            raise InvalidRequest(
                f"The text cannot be tokenized, as it is not valid Unicode: {error}.", param="input"
            ) from error
        for each, limit in zip(encoded, max_lengths, strict=False):
            if limit:
                each.truncate(limit, direction=cut)
        if max_length is not None:
            num_special = self._backend.num_special_tokens_to_add(pair is not None) if add_special_tokens else 0
            if max_length <= num_special:
                raise InvalidRequest(
                    f"Texts cannot be cut to {max_length} tokens: {num_special} special tokens are added to them.",
                    param="truncate_prompt_tokens",
                )
            lengths = _longest_first([len(each.ids) for each in encoded], max_length - num_special)
            for each, length in zip(encoded, lengths, strict=True):
                each.truncate(length, direction=cut)
        second = encoded[1] if pair is not None else None
        whole = self._backend.post_process(encoded[0], second, add_special_tokens)
        return whole.ids, whole.type_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, ids not in the vocabulary nothing.

        Raises:
            InvalidRequest: an id is negative or beyond 32 bits.
        """
        try:
            text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise InvalidRequest(
                f"Token ids must be between 0 and {self.vocab_size - 1}: {error}.", param="tokens"
            ) from error
        return text

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder for tokens that arrive one by one."""
        return DecodeStream(self, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token contributes to a text, special or not; part of a character is U+FFFD."""
        text = self.decode([token_id], skip_special_tokens=False)
        # A SentencePiece decoder strips the space from the first token of a text
        opens_word = (self.id_to_token(token_id) or "").startswith("\u2581") and not text.startswith(" ")
        return f" {text}" if opens_word else text

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, or None if there is no such id."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling, or None if there is no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def is_special(self, token_id: int) -> bool:
        """True for tokens that `skip_special_tokens` skips."""
        return token_id in self._special_ids

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may be padded beyond it."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, if the checkpoint names one."""
        return self._special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a sequence, if the checkpoint names one."""
        return self._special_tokens.get("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills up what is too short, if the checkpoint names one."""
        token = self._special_tokens.get("pad_token")
        return None if token is None else self.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """True if `apply_chat_template` can work."""
        return bool(self._chat_templates)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """The prompt that the checkpoint's template makes of a conversation, as transformers would render it.

        `template_kwargs` (`tools`, `documents`, whatever the template reads) are visible to the template. Encode the
        result with `add_special_tokens=False`.

        Raises:
            InvalidRequest: no template, messages that are not a conversation, or an error in the template.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise InvalidRequest("messages must be a non-empty list of objects with a role.", param="messages")
        template = self._choose_template(with_tools=template_kwargs.get("tools") is not None)
        variables = {"tools": None, "documents": None, **self._special_tokens, **template_kwargs}
        return template.render(messages, {**variables, "add_generation_prompt": add_generation_prompt})

    def template_source(self, *, with_tools: bool = False) -> str:
        """The text of the template that would be used; empty if there is none."""
        names = ("tool_use", "default") if with_tools else ("default",)
        return next((self._chat_templates[name] for name in names if name in self._chat_templates), "")

    def template_reads(self, variable: str, *, with_tools: bool = False) -> bool:
        """Whether the template that would be used looks at a variable at all."""
        return self.has_chat_template and self._choose_template(with_tools=with_tools).reads(variable)

    def _compiled(self, name: str) -> ChatTemplate:
        from shuteye.chat_template import ChatTemplate  # jinja: servers of no chats never need it

        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._chat_templates[name])
        return self._templates[name]

    def _choose_template(self, *, with_tools: bool) -> ChatTemplate:
        names = ("tool_use", "default") if with_tools else ("default",)
        for name in names:
            if name in self._chat_templates:
                return self._compiled(name)
        known = sorted(self._chat_templates) or "none"
        raise InvalidRequest(
            f"This model has no default chat template (it has: {known}). Use the completions route with a prompt.",
            param="messages",
        )


def _longest_first(lengths: Sequence[int], limit: int) -> list[int]:
    """What one or two texts are cut to: the longer one first, then both alike."""
    if sum(lengths) <= limit:
        return list(lengths)
    if len(lengths) == 1:
        return [limit]
    short = min(*lengths, limit // 2)
    return [short, limit - short] if lengths[0] <= lengths[1] else [limit - short, short]


class DecodeStream:
    """Decodes tokens one by one; what it returned, joined, is the text of all tokens, and no character is split.

    The method of `tokenizers.decoders.DecodeStream`, kept in Python for `flush`, and because that one raises when a
    byte-fallback decoder changes its mind about bytes already shown; here only what follows is affected.

        tokens   [... shown ...) [_window) [_pending)
                                  shown     held back: their text ends inside a character, or they have none yet

    Text is decoded from `_window` on, since a token's text may depend on the tokens before it (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._pending: list[int] = []
        self._window_text = ""

    def step(self, token_id: int) -> str | None:
        """Text completed by this token, or None if it completes none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return None
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return None
        self._advance()
        return text

    def flush(self) -> str:
        """What decoding everything at once would still add: an incomplete character as U+FFFD. Ends the stream."""
        text = self._new_text() if self._pending else ""
        self._advance()
        return text

    def _new_text(self) -> str:
        text = self._decode(self._window + self._pending)
        if text.startswith(self._window_text):
            return text[len(self._window_text) :]
        return self._decode(self._pending)

    def _advance(self) -> None:
        self._window, self._pending = self._pending, []
        self._window_text = self._decode(self._window)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}.", param="model") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{path} holds a {type(config).__name__}, expected an object.", param="model")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _only_template(source: str) -> dict[str, str]:
    from shuteye.chat_template import require_template

    require_template(source, param="chat_template")
    return {"default": source}


def _read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; files win over the configuration, as in transformers."""
    return dict(_configured_templates(config)) | dict(_template_files(directory))


def _configured_templates(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    configured = config.get("chat_template")
    if isinstance(configured, str):
        yield "default", configured
    elif isinstance(configured, list):
        yield from ((entry["name"], entry["template"]) for entry in configured)


def _template_files(directory: Path) -> Iterator[tuple[str, str]]:
    single = directory / "chat_template.jinja"
    if single.is_file():
        yield "default", single.read_text(encoding="utf-8")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        yield path.stem, path.read_text(encoding="utf-8")
