"""Tools and reasoning through POST /v1/chat/completions, with an engine that says what a script says."""

from __future__ import annotations

import json

import pytest
from fake_model import byte_tokenizer
from llguidance import LLMatcher, LLTokenizer
from openai.types.chat import ChatCompletion, ChatCompletionChunk

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"does {name}",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "time")
]
BYTES = LLTokenizer("byte")
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "Rom"}}\n</tool_call>'
)
NATIVE = (
    "{% if tools %}TOOLS:{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}\n"
    "{% endfor %}"
)


@pytest.fixture
def chat(make_engine, client_of):
    """Asks a server whose model says `script`; gives the engine too."""

    def ask(script, *, server=None, template=None, **fields):
        options = {"tokenizer_": byte_tokenizer(chat_template=template)} if template else {}
        engine = make_engine(script=[script] if isinstance(script, str) else script, max_model_len=4096, **options)
        response = client_of(engine, **(server or {})).post("/v1/chat/completions", json=ASK | fields)
        return engine, response

    return ask


def whole(response):
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate(response.json()).choices[0]


def streamed(response):
    """One choice's deltas put together as OpenAI's clients do."""
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line][:-1]
    said = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for line in lines:
        ChatCompletionChunk.model_validate_json(line)
        choice = json.loads(line)["choices"][0]
        delta = choice["delta"]
        said["content"] += delta.get("content", "")
        said["reasoning"] += delta.get("reasoning", "")
        said["finish_reason"] = choice["finish_reason"]
        for call in delta.get("tool_calls", []):
            if call["index"] == len(said["calls"]):
                assert call["id"].startswith("call_")
                assert call["type"] == "function"
                said["calls"].append([call["function"]["name"], ""])
            else:
                assert call["index"] == len(said["calls"]) - 1
                assert "name" not in call["function"]
            said["calls"][-1][1] += call["function"]["arguments"]
    return said


def prompt_of(engine):
    return engine.tokenizer.decode(engine.seen[-1][0], skip_special_tokens=False)


def test_calls_are_told_apart_from_content(chat):
    """Markers shown to the caller, calls left in the text, or ids that two calls share."""
    _engine, response = chat(CALLS, tools=TOOLS)
    choice = whole(response)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Köln"}),
        ("time", {"city": "Rom"}),
    ]
    assert len({call.id for call in calls}) == 2


def test_a_stream_says_the_same_and_says_it_early(chat):
    """Calls withheld to the end, or half-characters in arguments."""
    _engine, response = chat(CALLS, tools=TOOLS, stream=True)
    assert streamed(response) == {
        "content": "Let me see.",
        "reasoning": "",
        "calls": [["weather", '{"city": "Köln"}'], ["time", '{"city": "Rom"}']],
        "finish_reason": "tool_calls",
    }
    assert response.text.count('"tool_calls":[{') > 10


@pytest.mark.parametrize("script", ["a <tool", "a \n", '<tool_call>{"na'])
def test_text_held_back_is_sent_at_the_end(chat, script):
    """The last words of a stream lost, since they might have become a call."""
    _engine, response = chat(script, tools=TOOLS, stream=True)
    assert streamed(response)["content"] == script


def test_one_call_only_if_asked(chat):
    """`parallel_tool_calls=false` ignored."""
    for stream in (False, True):
        _engine, response = chat(CALLS, tools=TOOLS, parallel_tool_calls=False, stream=stream)
        calls = streamed(response)["calls"] if stream else whole(response).message.tool_calls
        assert len(calls) == 1


def test_without_tools_everything_is_content(chat):
    """Text that merely looks like a call, taken away from who asked for text."""
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        engine, response = chat(CALLS, **fields)
        assert whole(response).message.content == CALLS
        assert "does weather" not in prompt_of(engine)


def test_every_choice_is_read_on_its_own(chat):
    """Readers shared by the choices of a stream."""
    _engine, response = chat([CALLS, "no call"], tools=TOOLS, n=2)
    first, second = ChatCompletion.model_validate(response.json()).choices
    assert (len(first.message.tool_calls), first.finish_reason) == (2, "tool_calls")
    assert (second.message.content, second.message.tool_calls, second.finish_reason) == ("no call", None, "stop")
    _engine, response = chat([CALLS, "no call"], tools=TOOLS, n=2, stream=True)
    texts = {0: "", 1: ""}
    for line in response.text.split("\n\n")[:-2]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "Let me see.", 1: "no call"}


@pytest.mark.parametrize(
    ("parser", "script"),
    [
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Rom"}}'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rom"}}]'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Rom"}}</tool_call>'),
    ],
)
def test_the_parser_is_the_one_that_was_asked_for(chat, parser, script):
    """`--tool-call-parser` ignored."""
    _engine, response = chat(script, tools=TOOLS, server={"tool_call_parser": parser})
    (call,) = whole(response).message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rom"}')


def test_the_template_tells_the_parser(chat):
    _engine, response = chat(
        '[TOOL_CALLS]weather[ARGS]{"city": "Rom"}', template=NATIVE + "{# [TOOL_CALLS] #}", tools=TOOLS
    )
    assert whole(response).message.tool_calls[0].function.name == "weather"


def test_a_template_that_knows_tools_is_told_of_them(chat):
    """Tools, earlier calls or their results that never reach the model; arguments as text, not as an object."""
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    engine, response = chat("fine", template=NATIVE, tools=TOOLS, messages=messages)
    assert response.status_code == 200, response.text
    prompt = prompt_of(engine)
    assert prompt.startswith('TOOLS:[{"type": "function", "function": {"name": "weather"')
    assert prompt.endswith("<user>hi<assistant>CALL weather Rom<tool>sunny")


def test_a_template_without_tools_is_told_in_plain_words(chat):
    """A small model's template that silently drops tools, fails on a call, or shows an unknown role."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    engine, response = chat("fine", tools=TOOLS, messages=messages)
    assert response.status_code == 200, response.text
    prompt = prompt_of(engine)
    assert prompt.startswith("<|im_start|>system\nBe kind.\n\nYou can call these functions")
    assert '"name": "weather", "description": "does weather"' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>' in prompt
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_forced_call_is_a_grammar_of_those_tools(chat, choice):
    """A demand that the model is free to ignore; or a named tool among others that it may call instead."""
    script = '<tool_call>\n{"name": "time", "arguments": {"city": "Rom"}}\n</tool_call>'
    engine, response = chat(script, tools=TOOLS, tool_choice=choice)
    named = isinstance(choice, dict)
    grammar = engine.seen[-1][1].structured_outputs.grammar
    assert '\\"name\\": \\"time\\"' in grammar
    assert ('\\"name\\": \\"weather\\"' in grammar) is not named
    assert whole(response).finish_reason == ("stop" if named else "tool_calls")


@pytest.mark.parametrize(
    ("fields", "matches", "fails"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1]}', "[1]"),
        ({"structured_outputs": {"regex": "[a-c]/d{2}"}}, "b/dd", "b/d"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "no"),
    ],
)
def test_a_structure_stands_beside_calls(chat, fields, matches, fails):
    """A structure that is refused because there are tools; one that forbids calls; one that is not held to."""
    engine, response = chat("x", tools=TOOLS, **fields)
    assert response.status_code == 200, response.text
    grammar = engine.seen[-1][1].structured_outputs.grammar
    call = '<tool_call>\n{"name": "time", "arguments": {"city": "Rom"}}\n</tool_call>'
    assert (accepts(grammar, call), accepts(grammar, matches)) == (True, True)
    assert not accepts(grammar, fails)
    forced = chat("x", tools=TOOLS, tool_choice="required", **fields)[0].seen[-1][1].structured_outputs.grammar
    assert (accepts(forced, call), accepts(forced, matches)) == (True, False)


def accepts(grammar, text):
    """Whether a text is all that a grammar may give."""
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def test_only_allowed_tools_are_offered(chat):
    """A model told of tools that it must not call."""
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    engine, _ = chat("x", tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert "does time" in prompt_of(engine)
    assert "does weather" not in prompt_of(engine)
    assert '\\"name\\": \\"time\\"' in engine.seen[-1][1].structured_outputs.grammar


def test_markers_that_are_special_tokens_are_seen_and_forced_as_such(chat):
    """Calls that vanish because the tokenizer leaves special tokens out of the text."""
    tokenizer = byte_tokenizer()
    tokenizer._backend.add_special_tokens(["<tool_call>", "</tool_call>"])
    special = type(tokenizer)(tokenizer._backend, chat_templates={"default": NATIVE})
    from shuteye.server.openai.tools import Tool, forced_call
    from shuteye.server.parsing.parser import ReadingPlan

    assert ReadingPlan(tools="hermes").needs_special_tokens(special)
    assert not ReadingPlan(tools="hermes").needs_special_tokens(byte_tokenizer())
    grammar = forced_call([Tool.model_validate(TOOLS[0])], "hermes", special, several=False).grammar
    assert f'call: <[{special.token_to_id("<tool_call>")}]> "\\n"' in grammar


# --- reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parser", "script"), [("deepseek_r1", "hmm</think>Rome"), ("qwen3", "<think>hmm</think>Rome")]
)
def test_reasoning_is_told_apart(chat, parser, script):
    """The model's thoughts shown as its answer."""
    _engine, response = chat(script, server={"reasoning_parser": parser})
    message = response.json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hmm", "Rome")
    _engine, response = chat(script, server={"reasoning_parser": parser}, stream=True)
    said = streamed(response)
    assert (said["reasoning"], said["content"], said["finish_reason"]) == ("hmm", "Rome", "stop")


def test_reasoning_can_be_left_out_and_is_off_by_default(chat):
    _engine, response = chat("hm</think>Rome", server={"reasoning_parser": "deepseek_r1"}, include_reasoning=False)
    assert response.json()["choices"][0]["message"]["reasoning"] is None
    assert response.json()["choices"][0]["message"]["content"] == "Rome"
    _engine, response = chat("<think>hm</think>Rome")
    assert whole(response).message.content == "<think>hm</think>Rome"


def test_a_structure_holds_for_what_follows_the_reasoning(chat):
    """A grammar that keeps a thinking model from thinking; or one that cannot tell where thinking ends."""
    fields = {"response_format": {"type": "json_object"}, "server": {"reasoning_parser": "deepseek_r1"}}
    _engine, response = chat("x", **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    closed = "{% for m in messages %}{{ m.content }}{% endfor %}<think></think>"
    engine, response = chat("{}", template=closed, **fields)
    assert response.status_code == 200
    assert engine.seen[-1][1].structured_outputs.starts_after is None


# --- other template fields ------------------------------------------------------------------------


def test_fields_of_the_template_are_passed_to_a_template_that_reads_them(chat):
    template = "{{ documents[0].text }}|{{ reasoning_effort }}|{{ messages[0].content }}"
    fields = {"documents": [{"title": "t", "text": "doc"}], "reasoning_effort": "high"}
    engine, response = chat("x", template=template, **fields)
    assert response.status_code == 200, response.text
    assert prompt_of(engine) == "doc|high|hi"


def test_the_final_message_can_be_continued_and_echoed(chat):
    """An end-of-turn between the beginning that the caller wrote and the model's words."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    for stream in (False, True):
        engine, response = chat(" 42", messages=messages, continue_final_message=True, echo=True, stream=stream)
        content = streamed(response)["content"] if stream else whole(response).message.content
        assert content == "The answer is 42"
        assert prompt_of(engine).endswith("<|im_start|>assistant\nThe answer is")
