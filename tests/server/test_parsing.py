"""Readers of model output: the same pieces however the text is cut, whatever a model writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.server.parsing.parser import ReasoningParser, begins_inside
from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, OutputParser, Reasoning, held_length
from shuteye.server.parsing.tool_formats import HermesParser, LlamaParser, MistralParser, format_of


def merged(pieces):
    """Neighbours of one kind joined: what matters is the whole."""
    found = []
    for piece in pieces:
        last = found[-1] if found else None
        same = type(last) is type(piece) and not isinstance(piece, CallBegin)
        if same and getattr(last, "index", None) == getattr(piece, "index", None):
            found[-1] = replace(last, text=last.text + piece.text)
        else:
            found.append(piece)
    return found


def read(make, *texts):
    reader = make()
    pieces = [piece for text in texts for piece in reader.feed(text)]
    return merged([*pieces, *reader.finish()])


def call(index, name, arguments):
    return [CallBegin(index, name), CallArguments(index, arguments)]


def thinking(rest=OutputParser, *, inside):
    return lambda: ReasoningParser(rest(), inside=inside)


ONE = '{"name": "f", "arguments": {"a": "}<\\"x", "b": [1, {"c": null}]}}'
ARGUMENTS = '{"a": "}<\\"x", "b": [1, {"c": null}]}'
CASES = [
    (HermesParser, "hello  \n", [Content("hello  \n")]),
    (HermesParser, "a < b <tool", [Content("a < b <tool")]),
    (HermesParser, f"Sure.\n<tool_call>\n{ONE}\n</tool_call>\n", [Content("Sure."), *call(0, "f", ARGUMENTS)]),
    (
        HermesParser,
        f'<tool_call>{ONE}</tool_call>\n<tool_call>{{"arguments":{{"b":2}},"name":"g"}}</tool_call> ok',
        [*call(0, "f", ARGUMENTS), *call(1, "g", '{"b":2}'), Content(" ok")],
    ),
    (HermesParser, '<tool_call>{"name": "f"}</tool_call>', call(0, "f", "{}")),
    (HermesParser, '<tool_call>{"name": "f", "arguments": null}</tool_call>', call(0, "f", "{}")),
    (HermesParser, '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', call(0, "f", '{"a": 1}')),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {"a": 1', call(0, "f", '{"a": 1')),
    (HermesParser, "<tool_call>oops</tool_call>", [Content("<tool_call>oops</tool_call>")]),
    (HermesParser, '<tool_call>{"x": 3}</tool_call> bye', [Content('<tool_call>{"x": 3}</tool_call> bye')]),
    (HermesParser, "<tool_call>", [Content("<tool_call>")]),
    (LlamaParser, 'see {"name": "f"}', [Content('see {"name": "f"}')]),
    (LlamaParser, ' {"name": "f", "parameters": {"a": 1}}', call(0, "f", '{"a": 1}')),
    (
        LlamaParser,
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        [*call(0, "f", '{"a": 1}'), *call(1, "g", "{}")],
    ),
    (LlamaParser, '{"city": "Paris"}', [Content('{"city": "Paris"}')]),
    (LlamaParser, "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
    (LlamaParser, " <|pyt", [Content(" <|pyt")]),
    (MistralParser, "hi [", [Content("hi [")]),
    (
        MistralParser,
        f'[TOOL_CALLS] [{ONE}, {{"name": "g", "arguments": {{}}}}]',
        [*call(0, "f", ARGUMENTS), *call(1, "g", "{}")],
    ),
    (
        MistralParser,
        'so[TOOL_CALLS]f[ARGS]{"a": {"b": "}"}}[TOOL_CALLS]g[CALL_ID]x9[ARGS]{"c": 1}',
        [Content("so"), *call(0, "f", '{"a": {"b": "}"}}'), *call(1, "g", '{"c": 1}')],
    ),
    (MistralParser, "[TOOL_CALLS][oops]", [Content("[TOOL_CALLS][oops]")]),
    (MistralParser, "[TOOL_CALLS]", [Content("[TOOL_CALLS]")]),
    (thinking(inside=True), "so</think>hi", [Reasoning("so"), Content("hi")]),
    (thinking(inside=True), "<think>so</thi</think>hi", [Reasoning("so</thi"), Content("hi")]),
    (thinking(inside=True), "never done", [Reasoning("never done")]),
    (thinking(inside=False), "\n<think>so</think>\n\nhi", [Reasoning("so"), Content("\n\nhi")]),
    (thinking(inside=False), "<b>hi</b>", [Content("<b>hi</b>")]),
    (thinking(inside=False), " <thi", [Content(" <thi")]),
    (
        thinking(HermesParser, inside=True),
        f"call f</think>\n<tool_call>{ONE}</tool_call>",
        [Reasoning("call f"), *call(0, "f", ARGUMENTS)],
    ),
]


@pytest.mark.parametrize(("make", "text", "expected"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_outputs_of_known_models_are_parsed(make, text, expected):
    assert read(make, text) == expected


@pytest.mark.parametrize(("make", "text", "expected"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_output_parses_the_same_however_it_is_cut(make, text, expected):
    """A marker, an escape or a character's neighbour lost where two deltas meet."""
    assert read(make, *text) == expected
    for at in range(len(text)):
        assert read(make, text[:at], text[at:]) == expected


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<think>",
    "</think>",
    ONE,
    "{",
    "}",
]
WRITTEN = st.lists(
    st.sampled_from([*PARTS, '"name"', ":", '"f"', ",", "[", "]", ";", "\\", '"', " ", "\n", "x", "é"]), max_size=14
)
MAKERS = [HermesParser, LlamaParser, MistralParser, thinking(inside=True), thinking(HermesParser, inside=False)]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(MAKERS), WRITTEN, st.data())
def test_random_text_parses_the_same_however_it_is_cut(make, parts, data):
    """A stream that says something else than the whole answer, or a reader that never returns."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert read(make, *[text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == read(make, text)


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=4), st.lists, max_leaves=20)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON))
def test_any_arguments_come_through_as_they_are(arguments):
    """Braces or quotes within strings taken for JSON's own."""
    written = json.dumps(arguments)
    assert read(HermesParser, f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>') == call(
        0, "f", written
    )


def test_pieces_are_emitted_as_soon_as_they_are_certain():
    """Arguments withheld until the call is complete: no streaming."""
    reader = HermesParser()
    assert reader.feed('<tool_call>{"name": "f", "argum') == [CallBegin(0, "f")]
    assert reader.feed('ents": {"a": ') == [CallArguments(0, '{"a": ')]
    assert reader.feed("1") == [CallArguments(0, "1")]


@pytest.mark.parametrize(
    ("parser", "prompt", "inside"),
    [
        ("deepseek_r1", "<assistant>", True),
        ("deepseek_r1", "<think>\n\n</think>\n\n", False),
        ("qwen3", "<assistant>\n", False),
        ("qwen3", "<assistant>\n<think>\n", True),
        ("qwen3", None, False),
    ],
)
def test_the_prompt_may_have_opened_the_reasoning(parser, prompt, inside):
    """All of a thinking model's answer taken for content, or all of another's for reasoning."""
    assert begins_inside(parser, prompt) is inside


def test_templates_tell_their_format():
    assert format_of("... [TOOL_CALLS] ...") == "mistral"
    assert format_of("... <|python_tag|> ...") == "llama3_json"
    assert format_of("... <tool_call> ...") == format_of("") == "hermes"


def test_only_a_possible_start_of_a_marker_is_held_back():
    assert [held_length(text, "<ab>") for text in ("", "x", "<", "x<a", "<ab", "<ab>", "<a<")] == [0, 0, 1, 2, 3, 0, 1]
