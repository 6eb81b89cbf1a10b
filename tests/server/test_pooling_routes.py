"""The shapes of embeddings, scores and rankings; what cannot be done is refused by name."""

from __future__ import annotations

import base64
from array import array

import pytest
from starlette.testclient import TestClient

from shuteye import AsyncEngine
from shuteye.config import EngineConfig
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.testing import tiny_encoder

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(make_engine, client_of):
    return client_of(make_engine(task="embed"))


@pytest.fixture
def scorer(make_engine, client_of):
    return client_of(make_engine(task="score"))


def test_embeddings_in_openai_s_shape(client):
    answer = client.post("/v1/embeddings", json={"input": ["abc", "de"], "model": "tiny"}).json()
    assert {key: answer[key] for key in ("object", "model", "data", "usage")} == {
        "object": "list",
        "model": "tiny",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [3.0, float(sum(ids(client, "abc")))]},
            {"object": "embedding", "index": 1, "embedding": [2.0, float(sum(ids(client, "de")))]},
        ],
        "usage": {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0},
    }


def ids(client, text):
    return client.post("/tokenize", json={"prompt": text}).json()["tokens"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
def test_base64_is_the_same_numbers(client, path):
    """The format that OpenAI's client asks for by default."""
    bodies = [{"input": "abc"} | extra for extra in ({}, {"encoding_format": "base64"})]
    plain, packed = (client.post(path, json=body).json()["data"][0] for body in bodies)
    key = "embedding" if path == "/v1/embeddings" else "data"
    assert array("f", base64.b64decode(packed[key])).tolist() == plain[key]


@pytest.mark.parametrize(
    ("given", "counts"),
    [("abc", [3]), (["abc", "d"], [3, 1]), ([1, 2, 3], [3]), ([[1, 2], [3]], [2, 1])],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_every_form_of_input(client, given, counts):
    data = client.post("/v1/embeddings", json={"input": given}).json()["data"]
    assert [each["embedding"][0] for each in data] == counts


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [[]]}, "input"),
        ("/v1/embeddings", {"input": ["a", 3]}, "input"),
        ("/v1/embeddings", {"input": [10**6]}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "a", "embed_dtype": "float64"}, "embed_dtype"),
        ("/v1/embeddings", {"input": "a", "endianness": "middle"}, "endianness"),
        ("/v1/embeddings", {"input": "a", "padding": "longest"}, "padding"),
        ("/v1/embeddings", {"input": "a", "padding": "max_length"}, "padding"),
        ("/v1/embeddings", {"input": "a", "normalize": True}, "normalize"),
        ("/v1/embeddings", {"input": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/v1/embeddings", {"messages": []}, "messages"),
        ("/v1/embeddings", {"messages": HI, "input": "a"}, "input"),
        ("/v1/embeddings", {"messages": [HI, "a"]}, "messages"),
        (
            "/v1/embeddings",
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/pooling", {"input": "a", "task": "token_embed"}, "task"),
        ("/pooling", {"input": "a", "task": "classify"}, "task"),
        ("/v2/embed", {}, "texts"),
        ("/v2/embed", {"texts": []}, "texts"),
        ("/v2/embed", {"texts": ["a"], "inputs": [{"content": [{"type": "text", "text": "b"}]}]}, "texts"),
        ("/v2/embed", {"images": ["data:"]}, "images"),
        ("/v2/embed", {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, "content"),
        ("/v2/embed", {"texts": ["a"], "input_type": "of_a_kind"}, "input_type"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["int8"]}, "embedding_types[0]"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["binary"]}, "embedding_types"),
        ("/v2/embed", {"texts": ["a"], "truncate": "MIDDLE"}, "truncate"),
        ("/v2/embed", {"texts": ["abcd"], "truncate": "NONE", "max_tokens": 3}, "max_tokens"),
        ("/score", {"text_1": "a"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": "b", "queries": "a", "documents": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "queries"),
        ("/score", {"text_1": "a", "text_2": []}, "queries"),
        ("/score", {"text_1": "a", "text_2": "b", "use_activation": True}, "use_activation"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/score", {"queries": "a", "items": "b", "documents": "c"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": {"content": [{"type": "image_url", "image_url": {}}]}}, "content"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": -5}, "max_tokens_per_doc"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_chunks_per_doc": 10}, "max_chunks_per_doc"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(make_engine, client_of, path, body, param):
    """A field that is dropped silently, or a 500 for a caller's mistake."""
    response = client_of(make_engine(task="embed", breakage=_refuse_empty(body))).post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def _refuse_empty(body):
    """What the engine says of an input without tokens; the fake one says it when told to."""
    from shuteye.errors import InvalidRequest

    return InvalidRequest("Input 0 has no tokens.", param="input") if body.get("input") == [[]] else None


def test_harmless_and_neutral_fields_are_accepted(client):
    body = {"input": "a", "user": "u", "priority": 0, "truncation_side": "right", "embed_dtype": "float32"}
    assert client.post("/v1/embeddings", json=body).status_code == 200


def test_unknown_models_are_404(client):
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/score", {"text_1": "a", "text_2": "b"})):
        assert client.post(path, json=body | {"model": "other"}).status_code == 404


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_in_vllm_s_shape(scorer, path, names):
    """The fake engine's score of a pair is how many tokens it has."""
    answer = scorer.post(path, json={names[0]: "ab", names[1]: ["c", "defg"]}).json()
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": 3.0},
        {"index": 1, "object": "score", "score": 6.0},
    ]
    assert answer["object"] == "list"
    assert answer["usage"]["prompt_tokens"] == 9


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rankings_in_cohere_s_and_jina_s_shape(scorer, path):
    body = {"query": "ab", "documents": ["c", {"text": "defg"}, "hi", "jk"], "top_n": 3}
    answer = scorer.post(path, json=body).json()
    assert answer["results"] == [
        {"index": 1, "document": {"text": "defg"}, "relevance_score": 6.0},
        {"index": 2, "document": {"text": "hi"}, "relevance_score": 4.0},
        {"index": 3, "document": {"text": "jk"}, "relevance_score": 4.0},
    ]
    bare = scorer.post(path, json=body | {"top_n": None, "return_documents": False}).json()["results"]
    assert [(each["index"], "document" in each) for each in bare] == [(1, False), (2, False), (3, False), (0, False)]


def test_texts_in_parts_are_texts(scorer):
    """vLLM's other form of a text; parts are lines."""
    parts = {"content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]}
    answer = scorer.post("/score", json={"queries": {"content": parts["content"][:1]}, "documents": [parts, "e"]})
    assert [each["score"] for each in answer.json()["data"]] == [4.0, 2.0]
    ranked = scorer.post("/rerank", json={"query": "ab", "documents": parts}).json()["results"]
    assert ranked == [{"index": 0, "document": {"text": "c\nd"}, "relevance_score": 5.0}]


def test_queries_and_documents_are_cut_each_to_its_own_length(scorer, client):
    """A limit that cuts the pair, the query in the document's place, or nothing."""
    limits = {"max_tokens_per_query": 2, "max_tokens_per_doc": 3}
    for each in (scorer, client):
        body = {"query": "abcde", "documents": ["abcdefg", "ab"], **limits}
        assert each.post("/rerank", json=body).json()["usage"]["prompt_tokens"] == (2 + 3) + (2 + 2)
        assert each.post("/rerank", json=body | dict.fromkeys(limits, 0)).json()["usage"]["prompt_tokens"] == 19


def test_conversations_are_read_through_the_chat_template(client):
    """`messages`, or messages as `input`: one conversation or several, as the same text would be read."""
    rendered = "<|im_start|>user\nhi<|im_end|>\n"
    expected = len(ids(client, rendered))
    opened = expected + len(ids(client, "<|im_start|>assistant\n"))
    for field in ("messages", "input"):
        for given, counts in ((HI, [expected]), ([HI, HI * 2], [expected, 2 * expected])):
            data = client.post("/v1/embeddings", json={field: given}).json()["data"]
            assert [each["embedding"][0] for each in data] == counts
        asked = client.post("/v1/embeddings", json={field: HI, "add_generation_prompt": True}).json()
        assert asked["usage"]["prompt_tokens"] == opened
    open_ended = client.post("/v1/embeddings", json={"messages": HI, "continue_final_message": True}).json()
    assert open_ended["usage"]["prompt_tokens"] == len(ids(client, "<|im_start|>user\nhi"))


def test_either_end_of_a_text_is_cut_off(client):
    """`truncation_side` of texts and of ids."""
    for given in ("abcd", ids(client, "abcd")):
        body = {"input": given, "truncate_prompt_tokens": 2}
        found = [
            client.post("/v1/embeddings", json=body | {"truncation_side": side}).json()["data"][0]["embedding"]
            for side in ("right", "left")
        ]
        assert found == [[2.0, float(sum(ids(client, text)))] for text in ("ab", "cd")]


def test_classes_in_vllm_s_shape(make_engine, client_of):
    """The fake engine's numbers of a text: how many tokens it has, and their sum, which is larger."""
    client = client_of(make_engine(task="classify"))
    answer = client.post("/classify", json={"input": ["abc", "d"]}).json()
    assert answer["data"][0] == {
        "index": 0,
        "label": None,
        "probs": [3.0, float(sum(ids(client, "abc")))],
        "num_classes": 2,
    }
    assert (answer["object"], answer["usage"]["prompt_tokens"]) == ("list", 4)
    pooled = client.post("/pooling", json={"input": "abc", "task": "classify"}).json()["data"][0]
    assert (pooled["object"], pooled["data"]) == ("pooling", answer["data"][0]["probs"])
    assert client.post("/classify", json={"messages": HI}).json()["usage"]["prompt_tokens"] > 4
    assert client.post("/invocations", json={"input": "abc"}).json()["data"] == answer["data"][:1]
    for path, body in (("/score", {"text_1": "a", "text_2": "b"}), ("/v1/embeddings", {"input": "a"})):
        response = client.post(path, json=body)
        assert (response.status_code, "'classify'" in response.json()["error"]["message"]) == (400, True)


def test_a_header_no_client_takes_is_refused(client):
    """A header line of more than 64 kB, at which clients break off."""
    body = {"input": ["a"] * 1000, "encoding_format": "bytes"}
    response = client.post("/v1/embeddings", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "encoding_format")
    assert len(client.post("/v1/embeddings", json=body | {"encoding_format": "bytes_only"}).content) == 8000


def test_padding_is_bounded(make_engine, client_of):
    """A small body that takes the engine as many tokens as millions of words would."""
    client = client_of(make_engine(task="embed", max_model_len=100_000))
    response = client.post("/v1/embeddings", json={"input": ["a"] * 100, "padding": "max_length"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "padding")
    assert "10,000,000 prompt tokens" in response.json()["error"]["message"]


def test_a_model_that_scores_does_not_embed(scorer):
    response = scorer.post("/v1/embeddings", json={"input": "a"})
    assert response.status_code == 400
    assert "'score'" in response.json()["error"]["message"]


def test_embeddings_count_in_the_metrics(client):
    client.post("/v1/embeddings", json={"input": ["abc", "de"]})
    assert 'shuteye_request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in client.get("/metrics").text


def test_a_real_engine_behind_the_routes(tmp_path):
    """Rows that do not belong to their texts, an asleep model that answers, or that wakes another."""
    checkpoint = tiny_encoder(tmp_path / "model")
    config = EngineConfig(
        str(checkpoint), enable_sleep_mode=True, num_threads=1, dtype="float32", cache_dir=tmp_path / "cache"
    )
    texts = ["a", "the quick brown fox", "jumps"]
    with TestClient(
        create_app(AsyncEngine(config, in_process=True), ServerConfig(dev_mode=True)), "http://localhost"
    ) as client:
        while client.get("/ready").status_code != 200:
            pass
        before = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
        single = [client.post("/v1/embeddings", json={"input": text}).json()["data"][0]["embedding"] for text in texts]
        for together, alone in zip(before, single, strict=True):
            assert together["embedding"] == pytest.approx(alone, abs=1e-6)
        ranked = client.post("/rerank", json={"query": texts[1], "documents": texts}).json()["results"]
        assert ranked[0]["index"] == 1
        assert ranked[0]["relevance_score"] == pytest.approx(1, abs=1e-6)
        assert "shuteye_request_queue_time_seconds_count" in client.get("/metrics").text
        assert "shuteye_request_prefill_time_seconds_count" in client.get("/metrics").text
        for level in (1, 2):
            assert client.post(f"/sleep?level={level}").json()["freed_bytes"] > 0
            assert client.post("/v1/embeddings", json={"input": texts}).status_code == 503
            client.post("/wake_up")
            assert client.post("/v1/embeddings", json={"input": texts}).json()["data"] == before
