"""Tokenizer, decode stream and chat templates: what would differ from transformers, or break a character."""

import datetime
import json
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from shuteye.errors import InvalidRequest, UnsupportedModel
from shuteye.testing import write_tiny_tokenizer
from shuteye.tokenizer import Tokenizer

FAMILY = "👩‍👩‍👧‍👦 e\u0301 нет 日本語 \u200f\U0001f3f4\U000e0067\U000e007f"
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A byte-level tokenizer (one token per byte; ids 0 to 2 are special) in Hugging Face format."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(directory):
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def byte_fallback():
    """A SentencePiece-like tokenizer: words open with U+2581, bytes are tokens of their own."""
    words = ["<unk>", "\u2581hello", "\u2581world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


def render(source, messages=HELLO, /, **kwargs):
    """What a template makes of messages, without any checkpoint."""
    return Tokenizer(Backend(models.BPE()), chat_templates={"default": source}).apply_chat_template(messages, **kwargs)


def stream_all(tokenizer, ids, **options):
    stream = tokenizer.decode_stream(**options)
    return [piece for piece in map(stream.step, ids) if piece is not None], stream.flush()


class TestLoading:
    def test_directory_without_tokenizer_says_what_to_do(self, tmp_path):
        """A FileNotFoundError from deep inside would be answered with 500."""
        with pytest.raises(UnsupportedModel, match=r"no tokenizer.json.*save_pretrained"):
            Tokenizer.from_directory(tmp_path)

    @pytest.mark.parametrize(
        ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[1"), ("tokenizer_config.json", "[]")]
    )
    def test_damaged_file_is_named(self, directory, tmp_path, name, text):
        """The user would not know which file to replace."""
        for path in directory.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / name).write_text(text)
        with pytest.raises(UnsupportedModel, match=name):
            Tokenizer.from_directory(tmp_path)

    def test_truncation_and_padding_of_the_checkpoint_are_off(self, directory, tmp_path):
        """Long prompts would be cut silently, as tokenizer.json of many checkpoints asks for."""
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        backend.enable_truncation(4)
        backend.enable_padding(length=64)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert len(Tokenizer.from_directory(tmp_path).encode("0123456789")) == 10

    def test_special_tokens_given_as_objects(self, directory, tmp_path):
        """Older checkpoints write {"content": ...}; templates would render the dict."""
        (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
        config = {
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": None,
            "chat_template": "{{ bos_token }}",
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", None)
        assert tokenizer.apply_chat_template(HELLO) == "<s>"

    @pytest.mark.parametrize("files", [False, True])
    def test_named_templates(self, directory, tmp_path, files):
        """A request with tools would be rendered without them."""
        templates = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
        (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
        if files:
            (tmp_path / "chat_template.jinja").write_text(templates["default"])
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
        else:
            entries = [{"name": name, "template": template} for name, template in templates.items()]
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert tokenizer.apply_chat_template(HELLO) == "plain"
        assert tokenizer.apply_chat_template(HELLO, tools=[{"name": "clock"}]) == "clock"

    @pytest.mark.parametrize("tools", [None, [{"name": "clock"}]])
    def test_a_given_template_takes_the_place_of_all_others(self, directory, tmp_path, tools):
        """A conversation with tools that is still rendered by the checkpoint's own template for these."""
        (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
        entries = [{"name": name, "template": "theirs"} for name in ("default", "tool_use")]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries, "eos_token": "</s>"}))
        tokenizer = Tokenizer.from_directory(tmp_path, chat_template="mine{{ eos_token }}")
        assert tokenizer.apply_chat_template(HELLO, tools=tools) == "mine</s>"
        assert tokenizer.template_source(with_tools=True) == "mine{{ eos_token }}"

    @pytest.mark.parametrize("source", ["{% for %}", "{{ 1", "{{ 1 | nothing_known }}", "{% endfor %}"])
    def test_a_given_template_that_is_none_is_refused_at_once(self, directory, source):
        """A server that starts, and then answers every conversation with 400."""
        with pytest.raises(InvalidRequest, match="chat_template is not a Jinja template") as refused:
            Tokenizer.from_directory(directory, chat_template=source)
        assert refused.value.param == "chat_template"

    def test_neither_torch_nor_transformers_is_imported(self):
        """The API process would carry hundreds of megabytes it has no use for."""
        check = "import sys, shuteye.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
        result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "set()"


class TestEncodeDecode:
    @given(text=st.text())
    @settings(deadline=None)
    def test_round_trip(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text

    def test_lone_surrogate_is_the_callers_mistake(self, tokenizer):
        """JSON can carry one; it would be a 500."""
        with pytest.raises(InvalidRequest, match="Unicode"):
            tokenizer.encode("a\ud800")

    @pytest.mark.parametrize("token_id", [-1, 2**32])
    def test_impossible_id_is_the_callers_mistake(self, tokenizer, token_id):
        """/detokenize would answer 500."""
        with pytest.raises(InvalidRequest, match="between 0 and"):
            tokenizer.decode([token_id])

    def test_special_tokens_are_skipped_unless_asked_for(self, tokenizer):
        ids = [1, *tokenizer.encode("a"), 2]
        assert tokenizer.decode(ids) == "a"
        assert tokenizer.decode(ids, skip_special_tokens=False) == (
            f"{tokenizer.id_to_token(1)}a{tokenizer.id_to_token(2)}"
        )

    def test_token_text_keeps_the_space_that_opens_a_word(self, byte_fallback):
        """The tokens of logprobs, joined, would run words together."""
        assert [byte_fallback.token_text(i) for i in (1, 2, 3)] == [" hello", " world", "!"]


class TestDecodeStream:
    @given(text=st.text() | st.text(alphabet=FAMILY + "\ufffd"))
    @settings(max_examples=200, deadline=None)
    def test_pieces_are_whole_characters_and_join_to_the_text(self, tokenizer, text):
        """Half an emoji would reach the client as U+FFFD; one token here is one byte, the worst case."""
        pieces, rest = stream_all(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) + rest == text
        if "\ufffd" not in text:
            assert rest == ""
            assert "\ufffd" not in "".join(pieces)

    @given(ids=st.lists(st.integers(0, 258), max_size=40), skip=st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_any_ids_join_to_what_decoding_at_once_gives(self, tokenizer, ids, skip):
        """A model may emit any bytes; streamed and final text would differ."""
        pieces, rest = stream_all(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip)

    @given(ids=st.lists(st.integers(0, 258), max_size=40))
    @settings(deadline=None)
    def test_streams_as_tokenizers_does(self, tokenizer, ids):
        """Our stream would release text later, or earlier, than the one it stands for."""
        theirs = decoders.DecodeStream(skip_special_tokens=False)
        ours = tokenizer.decode_stream(skip_special_tokens=False)
        for token_id in ids:
            assert ours.step(token_id) == theirs.step(tokenizer._backend, token_id)

    def test_incomplete_character_comes_with_the_flush_only(self, tokenizer):
        """Generation cut by max_tokens in the middle of a character would lose it, or split it before."""
        ids = tokenizer.encode("a👩")[:-1]
        assert stream_all(tokenizer, ids) == (["a"], "\ufffd")

    @given(words=st.lists(st.sampled_from([" hello", " world", "!", "é", "👩", "日"]), max_size=12))
    @settings(deadline=None)
    def test_spaces_between_words_survive_a_stripping_decoder(self, byte_fallback, words):
        """SentencePiece decoders strip the first space of what they are given: streamed words would run together."""
        ids = []
        for word in words:
            plain = byte_fallback._backend.token_to_id(word.replace(" ", "\u2581"))
            ids += [plain] if plain is not None else [4 + byte for byte in word.encode()]
        pieces, rest = stream_all(byte_fallback, ids)
        assert "".join(pieces) + rest == byte_fallback.decode(ids)

    def test_invalid_byte_after_a_valid_one_does_not_raise(self, byte_fallback):
        """tokenizers' own stream raises here, as the valid byte it already showed becomes U+FFFD in hindsight."""
        ids = [1, 4 + 0x41, 4 + 0xFF, 2]
        theirs = decoders.DecodeStream(skip_special_tokens=False)
        with pytest.raises(Exception, match="prefix"):
            [theirs.step(byte_fallback._backend, token_id) for token_id in ids]
        pieces, rest = stream_all(byte_fallback, ids)
        assert "".join(pieces) + rest == "helloA\ufffd world"

    def test_skipped_special_tokens_cost_nothing(self, tokenizer):
        """A run of skipped tokens (ignore_eos) would be decoded again at every step."""
        stream = tokenizer.decode_stream()
        for _ in range(1000):
            assert stream.step(2) is None
        assert stream._pending == []


class TestChatTemplate:
    def test_blocks_are_trimmed_as_transformers_does(self):
        """Stray newlines would be in every prompt."""
        assert render("  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\nend") == "Hi\nend"

    def test_loop_controls_and_generation_tag(self):
        """Templates of the hub use both; they would be syntax errors."""
        source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        assert render(source, HELLO * 3) == "Hi"

    def test_tojson_escapes_nothing(self):
        """Jinja's own filter writes \\u003c for <; a tool's description would be garbled."""
        assert render("{{ tools | tojson }}", tools=[{"é": "<&'\">"}]) == '[{"é": "<&\'\\">"}]'
        assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=True) }}") == '{\n "a": 2,\n "b": 1\n}'

    def test_strftime_now_is_today(self):
        assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)

    def test_tools_and_documents_are_none_unless_given(self):
        """`{% if tools is not none %}` would be true for an undefined variable."""
        assert render("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}") == "True True True"
        assert render("{{ add_generation_prompt }} {{ deep }}", add_generation_prompt=False, deep=3) == "False 3"

    def test_null_fields_are_dropped_and_reasoning_has_all_its_names(self):
        """`content: null` of a tool call would be rendered as "None"."""
        message = {"role": "assistant", "content": None, "reasoning": "hm"}
        source = "{{ messages[0].content is defined }} {{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
        assert render(source, [message]) == "False hm hm"

    @pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ 'u: ' + messages[0]['content'] }}"])
    def test_text_parts_are_joined_for_a_template_of_plain_text(self, source):
        """The openai client sends content as parts; the template would fail, or render a Python list."""
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert render(source, [{"role": "user", "content": parts}]).endswith("a\nb")
        with pytest.raises(InvalidRequest, match="image_url"):
            render(source, [{"role": "user", "content": [*parts, {"type": "image_url"}]}])

    def test_parts_are_left_to_a_template_that_reads_them(self):
        """A template that places parts itself would get them joined."""
        source = "{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}"
        assert render(source, [{"role": "user", "content": [{"type": "text", "text": x} for x in "ab"]}]) == "<a><b>"

    @pytest.mark.parametrize(
        ("source", "messages", "says"),
        [
            ("{{ raise_exception('roles must alternate') }}", HELLO, "roles must alternate"),
            ("{% for %}", HELLO, "cannot render"),
            ("{{ messages[0]['content'] + 'x' }}", [{"role": "user"}], "content"),
            ("{{ messages[0]['content'] + 'x' }}", [{"role": "user", "content": 3}], "cannot render"),
            ("{{ 1 // 0 }}", HELLO, "zero"),
            ("{{ messages.__class__.__mro__ }}", HELLO, "unsafe"),
            ("{{ messages.append(1) }}", HELLO, "unsafe|safe"),
            ("x", [], "non-empty"),
            ("x", ["Hi"], "non-empty"),
        ],
    )
    def test_failures_are_the_requests_and_name_messages(self, source, messages, says):
        """A bad message would be answered 500, or a template would reach into the process."""
        with pytest.raises(InvalidRequest, match=says) as caught:
            render(source, messages)
        assert caught.value.param == "messages"

    def test_no_template_points_to_completions(self):
        tokenizer = Tokenizer(Backend(models.BPE()))
        assert not tokenizer.has_chat_template
        with pytest.raises(InvalidRequest, match="no default chat template"):
            tokenizer.apply_chat_template(HELLO)

    def test_messages_of_the_caller_are_not_changed(self):
        """The request would be logged or retried with what the template made of it."""
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
        before = json.dumps(messages)
        render("{{ messages[0].content }}", messages)
        assert json.dumps(messages) == before


@pytest.fixture(scope="session")
def theirs(smollm2, gguf_read_once):
    """The real tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    with gguf_read_once():
        return AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)


@pytest.fixture(scope="session")
def ours(theirs, tmp_path_factory):
    """The same, saved as an image stores it."""
    path = tmp_path_factory.mktemp("smollm2-tokenizer")
    theirs.save_pretrained(path)
    return Tokenizer.from_directory(path)


@pytest.mark.model
class TestAgainstTransformers:
    """The real tokenizer, against transformers' own."""

    def test_vocabulary_and_special_tokens(self, ours, theirs):
        assert ours.vocab_size == len(theirs)
        assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
        assert all(ours.is_special(token_id) for token_id in theirs.all_special_ids)

    @pytest.mark.parametrize(
        "text", ["", " a  b\n\n", "def f(x):\n\treturn x", FAMILY, "<|im_start|>user\nHi<|im_end|>"]
    )
    def test_encode_and_decode(self, ours, theirs, text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    @given(text=st.text(max_size=60))
    @settings(max_examples=50, deadline=None)
    def test_stream_joins_to_their_decode(self, ours, theirs, text):
        ids = ours.encode(text)
        pieces, rest = stream_all(ours, ids)
        assert "".join(pieces) + rest == theirs.decode(ids, skip_special_tokens=True)

    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    @pytest.mark.parametrize(
        "messages",
        [
            HELLO,
            [{"role": "system", "content": "Be brief."}, *HELLO],
            [*HELLO, {"role": "assistant", "content": "Hello <b>&</b>"}, {"role": "user", "content": FAMILY}],
        ],
    )
    def test_chat_template(self, ours, theirs, messages, add_generation_prompt):
        prompt = ours.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        assert prompt == theirs.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        ids = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)["input_ids"]
        assert ours.encode(prompt, add_special_tokens=False) == ids


# --- pairs ------------------------------------------------------------------------------------------


@pytest.fixture
def pair_tokenizer(tmp_path):
    write_tiny_tokenizer(tmp_path, pairs=True)
    return tmp_path


def test_a_pair_s_texts_are_told_apart(pair_tokenizer):
    """Would catch special tokens left out, or a second text taken for the first."""
    tokenizer = Tokenizer.from_directory(pair_tokenizer)
    one, _ = tokenizer.encode_pair("ab")
    assert one == tokenizer.encode("ab")
    token_ids, type_ids = tokenizer.encode_pair("ab", "c")
    assert token_ids == [*one, *tokenizer.encode("c")[1:]]
    assert type_ids == [0, 0, 0, 0, 1, 1]
    assert tokenizer.encode_pair("ab", add_special_tokens=False)[0] == one[1:-1]


@pytest.mark.parametrize("lengths", [(10, None), (20, 3), (3, 20), (20, 20), (5, 6), (0, 20)])
@pytest.mark.parametrize("limit", [4, 5, 9, 12, 40])
def test_cutting_is_what_transformers_calls_longest_first(pair_tokenizer, lengths, limit):
    text, pair = ("a" * lengths[0], None if lengths[1] is None else "b" * lengths[1])
    backend = Backend.from_file(str(pair_tokenizer / "tokenizer.json"))
    backend.enable_truncation(limit, strategy="longest_first")
    expected = backend.encode(text, pair)
    found = Tokenizer.from_directory(pair_tokenizer).encode_pair(text, pair, max_length=limit)
    assert found == (expected.ids, expected.type_ids)


def test_nothing_is_cut_to_less_than_the_special_tokens(pair_tokenizer):
    with pytest.raises(InvalidRequest, match="3 special tokens"):
        Tokenizer.from_directory(pair_tokenizer).encode_pair("a", "b", max_length=3)


def test_a_long_text_is_encoded_without_the_lock(tmp_path):
    """A thread that encodes a long text, and keeps every other thread waiting all the while."""
    write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    text = "ab " * 100_000
    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 5, "no other thread had its turn"
    assert tokenizer.encode(text) == tokenizer.encode("ab ") * 100_000
    cut = {str(tokenizer.encode_pair(each, "x" * 10, max_length=50)) for each in (text, text[:300])}
    assert len(cut) == 1
    with pytest.raises(InvalidRequest, match="Unicode"):
        tokenizer.encode(text + "\ud800")
