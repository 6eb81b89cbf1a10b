"""`use_beam_search` of both generation routes, on a real tiny model, beside transformers' logits."""

import pytest
import torch
from http_answers import error, events

from shuteye import AsyncEngine, EngineConfig

PROMPT = list(range(3, 24))
TEXT = {"prompt": PROMPT, "max_tokens": 4, "n": 3, "use_beam_search": True, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3, "n": 2, "use_beam_search": True}


@pytest.fixture
def client(tiny_checkpoint, core_cache, client_of):
    config = EngineConfig(
        model=str(tiny_checkpoint),
        dtype="float32",
        kv_cache_memory=1 << 20,
        max_model_len=64,
        num_threads=1,
        cache_dir=core_cache,
        enable_sleep_mode=True,
    )
    return client_of(AsyncEngine(config, in_process=True))


def beams_of_transformers(checkpoint, count, length):
    """The best continuations, each with the sum of its log-probabilities."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    live = [((), 0.0)]
    for _ in range(length):
        grown = []
        for token_ids, logprob in live:
            with torch.inference_mode():
                found = model(torch.tensor([[*PROMPT, *token_ids]])).logits[0, -1].log_softmax(-1).topk(2 * count)
            grown += [
                ((*token_ids, token), logprob + value)
                for token, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)
            ]
        live = sorted(grown, key=lambda one: -one[1])[:count]
    return live


def test_the_best_completions_are_transformers_own(client, tiny_checkpoint):
    """Beams that share K/V which is not theirs, or whose log-probabilities are of another position."""
    ask = TEXT | {"return_token_ids": True, "logprobs": 1}
    body = client.post("/v1/completions", json=ask).json()
    expected = beams_of_transformers(tiny_checkpoint, 3, 4)
    assert [tuple(choice["token_ids"]) for choice in body["choices"]] == [token_ids for token_ids, _sum in expected]
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in body["choices"]]
    assert sums == pytest.approx([logprob for _ids, logprob in expected], abs=1e-3)
    assert all(len(tops) <= 2 for choice in body["choices"] for tops in choice["logprobs"]["top_logprobs"])
    assert body["usage"]["completion_tokens"] == 12
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 3


def test_several_prompts_and_streams_are_answered_alike(client):
    """Choices under another prompt's number, or a stream that ends without its beams."""
    single = client.post("/v1/completions", json=TEXT).json()["choices"]
    double = client.post("/v1/completions", json=TEXT | {"prompt": [PROMPT, PROMPT]}).json()["choices"]
    assert [choice["index"] for choice in double] == list(range(6))
    assert [choice["text"] for choice in double] == 2 * [choice["text"] for choice in single]
    chunks = events(client.post("/v1/completions", json=TEXT | {"stream": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]] == [one["text"] for one in single]


def test_a_chat_is_searched_too(client):
    """A field of vLLM's that one route knows and the other refuses."""
    body = client.post("/v1/chat/completions", json=CHAT).json()
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 11}, "n"),
        ({"stop": "x"}, "stop"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": 1, "logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"length_penalty": 11.0}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
    ],
)
def test_what_a_search_would_not_heed_is_refused_by_name(client, fields, param):
    """An answer that looks as if a stop string or a schema had been looked at."""
    found = error(client.post("/v1/completions", json=TEXT | fields))
    assert (found["code"], found["param"]) == (400, param)
