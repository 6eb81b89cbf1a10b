"""Vectors of a real engine in every form that they can be asked for, and what is done to texts before."""

from __future__ import annotations

import base64
import json
import sys

import pytest
import torch
from starlette.testclient import TestClient

from shuteye import AsyncEngine
from shuteye.config import EngineConfig
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.testing import CHAT_TEMPLATE, tiny_encoder

DTYPES = {
    "float32": (torch.float32, torch.int32),
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "fp8_e4m3": (torch.float8_e4m3fn, torch.uint8),
    "fp8_e5m2": (torch.float8_e5m2, torch.uint8),
}
TEXTS = ["the quick brown fox", "jumps"]
PROMPTS = {"query": "query: ", "document": ""}


def served(path, cache_dir):
    config = EngineConfig(str(path), num_threads=1, dtype="float32", cache_dir=cache_dir)
    return TestClient(create_app(AsyncEngine(config, in_process=True), ServerConfig()), "http://localhost")


def ready(client):
    while client.get("/ready").status_code != 200:
        pass
    return client


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vectors")
    path = tiny_encoder(directory / "model")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    with served(path, directory / "cache") as client:
        yield ready(client)


def answer(client, path="/v1/embeddings", **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def numbers(client, **body):
    return torch.tensor([each["embedding"] for each in answer(client, **body).json()["data"]])


def decoded(data, dtype, endianness):
    """As a client reads bytes that it knows the dtype and the order of."""
    kind, same_size = DTYPES[dtype]
    size = kind.itemsize
    order = sys.byteorder if endianness in (None, "native") else endianness
    words = [int.from_bytes(data[at : at + size], order, signed=size > 1) for at in range(0, len(data), size)]
    return torch.tensor(words, dtype=same_size).view(kind)


@pytest.mark.parametrize("endianness", [None, "native", "big", "little"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_order_is_the_rounded_vector(client, dtype, endianness):
    """Bytes in another order, of another dtype than was asked for, or of the vector next to it."""
    expected = numbers(client, input=TEXTS).to(DTYPES[dtype][0])
    asked = {"input": TEXTS, "embed_dtype": dtype, "endianness": endianness}
    for index, each in enumerate(answer(client, **asked, encoding_format="base64").json()["data"]):
        found = decoded(base64.b64decode(each["embedding"]), dtype, endianness)
        assert torch.equal(found.float(), expected[index].float())
    response = answer(client, **asked, encoding_format="bytes")
    assert response.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(response.headers["metadata"])
    assert [each["shape"] for each in metadata["data"]] == [[64], [64]]
    for index, each in enumerate(metadata["data"]):
        assert (each["embed_dtype"], each["endianness"]) == (dtype, endianness or "native")
        found = decoded(response.content[each["start"] : each["end"]], dtype, endianness)
        assert torch.equal(found.float(), expected[index].float())
    bare = answer(client, **asked, encoding_format="bytes_only")
    assert bare.content == response.content
    assert "metadata" not in bare.headers


def test_numbers_are_float32_whatever_bytes_would_be(client):
    """A dtype that is for bytes, applied to numbers; vLLM's rule."""
    assert torch.equal(numbers(client, input=TEXTS, embed_dtype="fp8_e4m3"), numbers(client, input=TEXTS))


def test_conversations_are_embedded_as_the_template_renders_them(client):
    messages = [{"role": "user", "content": "a fox"}]
    rendered = "<|im_start|>user\na fox<|im_end|>\n"
    for special in (False, True):
        expected = numbers(client, input=rendered, add_special_tokens=special)
        found = numbers(client, messages=messages, **({"add_special_tokens": True} if special else {}))
        torch.testing.assert_close(found, expected)


def test_padding_fills_up_to_the_context_or_what_is_cut_to(client):
    """Padding that is not there, masked so that it changes nothing, or longer than inputs may be."""
    plain = answer(client, input="fox").json()
    for wanted, limit in (({}, 128), ({"truncate_prompt_tokens": 40}, 40)):
        padded = answer(client, input=["fox", "x" * 500][: 2 if wanted else 1], padding="max_length", **wanted).json()
        assert padded["usage"]["prompt_tokens"] == limit * len(padded["data"])
        assert padded["data"][0]["embedding"] != pytest.approx(plain["data"][0]["embedding"], abs=1e-3)
    assert answer(client, input="fox", padding="do_not_pad").json()["data"] == plain["data"]


def test_cohere_s_types_are_of_the_same_vectors(client):
    """Bits in another order, signs the wrong way round, or a type that was not asked for."""
    expected = numbers(client, input=TEXTS)
    types = ["float", "base64", "binary", "ubinary"]
    found = answer(client, "/v2/embed", texts=TEXTS, embedding_types=types).json()
    assert torch.equal(torch.tensor(found["embeddings"]["float"]), expected)
    for vector, encoded in zip(expected, found["embeddings"]["base64"], strict=True):
        assert torch.equal(decoded(base64.b64decode(encoded), "float32", "little"), vector)
    bits = (expected >= 0).long().view(2, 8, 8)
    packed = (bits << torch.arange(7, -1, -1)).sum(dim=-1)
    assert found["embeddings"]["ubinary"] == packed.tolist()
    assert found["embeddings"]["binary"] == (packed - 128).tolist()
    count = answer(client, input=TEXTS).json()["usage"]["prompt_tokens"]
    assert found["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": count, "image_tokens": 0},
    }
    assert (found["texts"], found["response_type"]) == (TEXTS, "embeddings_by_type")
    assert answer(client, "/v2/embed", texts=TEXTS).json()["embeddings"].keys() == {"float"}


def test_cohere_s_input_type_is_the_checkpoint_s_prompt(client):
    """A purpose that is dropped, or one that the model does not know and that is taken for none."""
    found = answer(client, "/v2/embed", texts=["fox"], input_type="query").json()["embeddings"]["float"]
    torch.testing.assert_close(torch.tensor(found), numbers(client, input="query: fox"))
    refused = client.post("/v2/embed", json={"texts": ["fox"], "input_type": "search_query"})
    assert refused.status_code == 400
    assert "Supported values: document, query" in refused.json()["error"]["message"]


def test_cohere_s_client_can_always_send_its_purposes(make_engine, client_of):
    """Its client cannot leave `input_type` out; a model without prompts reads every text in the same way."""
    plain = client_of(make_engine(task="embed"))
    for purpose in ("search_document", "search_query", "classification", "clustering"):
        assert answer(plain, "/v2/embed", texts=["fox"], input_type=purpose).json()["texts"] == ["fox"]


def test_cohere_s_truncation(client):
    """The end that stays is the other one, or a limit beyond the context is an error."""
    text = "".join(chr(97 + index % 26) for index in range(300))
    cut = {
        side: numbers(client, input=text, truncate_prompt_tokens=-1, truncation_side=side) for side in ("left", "right")
    }
    for truncate, side in (("START", "left"), ("END", "right"), (None, "right")):
        found = answer(client, "/v2/embed", texts=[text], truncate=truncate, max_tokens=10**6).json()
        torch.testing.assert_close(torch.tensor(found["embeddings"]["float"]), cut[side])
    assert client.post("/v2/embed", json={"texts": [text], "truncate": "NONE"}).status_code == 400
    assert not torch.allclose(cut["left"], cut["right"])


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_classes_are_the_model_s(tmp_path, problem):
    """Numbers that are not transformers' own, labels of other classes, or a softmax where several labels may hold."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tiny_encoder(tmp_path / "model", task="classify", problem_type=problem)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        logits = torch.stack([model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS])
    with served(path, tmp_path / "cache") as opened:
        client = ready(opened)
        found = answer(client, "/classify", input=TEXTS).json()["data"]
        raw = answer(client, "/classify", input=TEXTS, use_activation=False).json()["data"]
    expected = torch.softmax(logits, dim=-1) if problem is None else torch.sigmoid(logits)
    torch.testing.assert_close(torch.tensor([each["probs"] for each in found]), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor([each["probs"] for each in raw]), logits, atol=1e-5, rtol=1e-4)
    assert [each["label"] for each in found] == [["calm", "loud"][index] for index in logits.argmax(dim=-1)]
    assert [each["num_classes"] for each in found] == [2, 2]
