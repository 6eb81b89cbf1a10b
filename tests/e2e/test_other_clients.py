"""Clients that people use, unmodified, in environments of their own, against the real model (`make test-clients`)."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
from shuteye_server import Served, clean_environment

from shuteye.config import default_cache_dir

HELPERS = Path(__file__).parents[1] / "helpers"
ENVIRONMENTS = Path(os.environ.get("SHUTEYE_TEST_CLIENTS", default_cache_dir() / "clients"))
ROUNDING = {"rel": 1e-4, "abs": 1e-3}

pytestmark = [pytest.mark.clients, pytest.mark.model, pytest.mark.timeout(600)]


def run(client, script, *arguments):
    """The last line that `script` prints, as JSON, run by the interpreter of `client`'s environment."""
    python = ENVIRONMENTS / client / "bin" / "python"
    assert python.exists(), f"{python} is missing; `make test-clients` sets it up"
    return said_by([python, HELPERS / script, *map(str, arguments)])


def said_by(command):
    """The last line that a command prints, as JSON."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        env=clean_environment(TOKENIZERS_PARALLELISM="false"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def real():
    """SmolLM2 in float32, so that answers do not depend on how a prompt was batched."""
    server = Served("smollm2-135m", "--enable-sleep-mode", "--dev-mode", "--dtype", "float32", cache_dir=None)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


class TestAnthropic:
    def test_generation(self, real):
        """Events that Anthropic's client cannot put together, or another answer than the chat route's."""
        found = run("anthropic", "with_anthropic.py", "generation", real.url, real.model)
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the river end?"}]
        chat = real.done("/v1/chat/completions", messages=said, model=real.model, temperature=0, max_tokens=20)
        answer, usage = chat["choices"][0]["message"]["content"], chat["usage"]
        assert {found[name] for name in ("whole", "streamed", "final", "async")} == {answer}
        assert set(found["stop_reasons"]) == {"max_tokens"}
        assert set(found["output_tokens"]) == {usage["completion_tokens"]}
        assert set(found["input_tokens"]) == {usage["prompt_tokens"]}

    def test_tools(self, real):
        """Calls that the client cannot read, or cannot send back."""
        found = run("anthropic", "with_anthropic.py", "tools", real.url, real.model)
        assert found["stop_reason"] == "tool_use"
        assert found["calls"] == found["streamed"] != []
        assert [(name, [*given]) for name, given in found["calls"]] == [("weather", ["city"])]
        assert found["after"] == "text"

    def test_refusals(self, real):
        """A 400 whose type or message the client loses."""
        found = run("anthropic", "with_anthropic.py", "refusals", real.url, real.model)
        assert (found["status"], found["type"]) == (400, "invalid_request_error")
        assert "'image'" in found["message"]

    def test_asleep(self, real):
        """A sleeping model taken for a bug of the server."""
        real.done("/sleep")
        found = run("anthropic", "with_anthropic.py", "sleep", real.url, real.model)
        real.done("/wake_up")
        assert (found["status"], found["type"]) == (503, "overloaded_error")
        assert "sleep mode" in found["message"]
        assert int(found["retry_after"]) >= 1


PROVIDERS = {"openai": "/v1", "hosted_vllm": "/v1", "anthropic": ""}
"""Of litellm's proxy: whose API it takes ours for, and what it is told of our address."""


@pytest.fixture(scope="class")
def proxy(real, tmp_path_factory):
    """litellm's proxy before the server, which it knows under a name for each provider."""
    directory = tmp_path_factory.mktemp("litellm")
    served = [
        {
            "model_name": provider,
            "litellm_params": {
                "model": f"{provider}/{real.model}",
                "api_base": f"{real.url}{path}",
                "api_key": "none",
                "max_retries": 0,
            },
        }
        for provider, path in PROVIDERS.items()
    ]
    config = directory / "config.yaml"  # JSON is YAML
    config.write_text(json.dumps({"model_list": served, "litellm_settings": {"num_retries": 0}}))
    command = [ENVIRONMENTS / "litellm" / "bin" / "litellm", "--config", config, "--host", "127.0.0.1", "--port"]
    port = free_port()
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=clean_environment(LITELLM_LOCAL_MODEL_COST_MAP="True", NO_DOCS="True"),
        )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health/liveliness", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def free_port():
    """A port that nobody listens on, as the proxy must be told one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_answer(url, process, log):
    while process.poll() is None:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"litellm's proxy ended: {log.read_text()[-3000:]}")


class TestLiteLLMsProxy:
    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_anthropics_client_through_the_proxy(self, real, proxy, provider):
        """Fields that the proxy makes of Anthropic's and we refuse, or answers that it cannot turn back."""
        found = run("anthropic", "with_anthropic.py", "proxied", proxy, provider)
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the river end?"}]
        chat = real.done("/v1/chat/completions", messages=said, model=real.model, temperature=0, max_tokens=20)
        answer, usage = chat["choices"][0]["message"]["content"], chat["usage"]
        assert (found["whole"], found["streamed"]) == (answer, answer)
        assert found["stop_reasons"] == ["max_tokens"] * 2
        assert found["output_tokens"] == [usage["completion_tokens"]] * 2
        name, given, stop_reason = found["call"]
        assert (name, "city" in given, stop_reason) == ("weather", True, "tool_use")

    def test_a_sleeping_model_is_no_bug(self, real, proxy):
        """A status that clients do not send again, as the proxy makes another of it."""
        real.done("/sleep")
        try:
            found = run("anthropic", "with_anthropic.py", "sleep", proxy, "anthropic")
        finally:
            real.done("/wake_up")
        assert found["status"] == 503
        assert "sleep mode" in found["message"]


class TestLiteLLM:
    def test_generation(self, real):
        """Fields that litellm sends and we refuse, or answers that it cannot read."""
        found = run("litellm", "with_litellm.py", "generation", real.url, real.model)
        messages = [{"role": "user", "content": "Where does the river end?"}]
        asked = {"model": real.model, "temperature": 0, "max_tokens": 20}
        chat = real.done("/v1/chat/completions", messages=messages, **asked)
        text = real.done("/v1/completions", prompt="Once upon a time", **asked)
        choice, usage = chat["choices"][0], chat["usage"]
        for provider in ("openai", "hosted_vllm"):
            assert found[provider] == {
                "whole": choice["message"]["content"],
                "streamed": choice["message"]["content"],
                "finish_reason": choice["finish_reason"],
                "usage": [usage["prompt_tokens"], usage["completion_tokens"]],
            }
        assert found["async streamed"] == choice["message"]["content"]
        assert found["text"] == text["choices"][0]["text"]

    def test_refusals(self, real):
        """A 400 whose message litellm loses."""
        found = run("litellm", "with_litellm.py", "refusals", real.url, real.model)
        assert found["status"] == 400
        assert "min_p must be in [0, 1]" in found["message"]

    def test_asleep(self, real):
        """A sleeping model taken for a bug of the server."""
        real.done("/sleep")
        found = run("litellm", "with_litellm.py", "sleep", real.url, real.model)
        real.done("/wake_up")
        assert (found["class"], found["status"]) == ("ServiceUnavailableError", 503)
        assert "sleep mode" in found["message"]

    def test_embedding(self):
        """Vectors that litellm reads as something else, or that depend on how they were asked for."""
        server = Served("minilm-l6", "--dtype", "float32", cache_dir=None)
        try:
            server.wait_until_ready()
            found = run("litellm", "with_litellm.py", "embedding", server.url, server.model)
            asked = server.done("/v1/embeddings", model=server.model, input=["a cat", "a dog"])
        finally:
            server.stop()
        expected = [one["embedding"] for one in asked["data"]]
        assert [len(vector) for vector in found["vectors"]] == [384, 384]
        for ours, theirs in zip(found["vectors"], expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
        assert found["tokens"] == asked["usage"]["prompt_tokens"]


ANSWER = "The answer is 4."
"""What the real model says to the one question that all of these ask."""

ACROSS_A_SLEEP = {"asleep": 503, "after": ANSWER}


def test_openai_agents(real):
    """Fields of the agents SDK that are refused, events it cannot follow, or a sleep that passes for an answer."""
    found = run("openai-agents", "with_openai_agents.py", real.url, real.model)
    assert found.keys() == {"chat completions", "responses"}
    for kind in found.values():
        tool = kind.pop("tool")
        assert tool in {"deep:sea", "deep:river"}
        assert kind == {
            "chat": ANSWER,
            "stream": {"text": ANSWER, "events": True},
            "structured": "Place",
            **ACROSS_A_SLEEP,
        }


def test_langchain(real):
    """Structure or calls that langchain does not find where it looks for them."""
    found = run("langchain", "with_langchain.py", real.url, real.model)
    assert found.keys() == {"chat completions", "responses"}
    for kind in found.values():
        assert min(kind.pop("usage")) > 0
        assert kind == {
            "chat": ANSWER,
            "stream": ANSWER,
            "tool": ["depth_of", ["place"]],
            "json_schema": "Place",
            "function_calling": "Place",
            **ACROSS_A_SLEEP,
        }


def test_pydantic_ai(real):
    """Output by a tool or by the schema that pydantic-ai has to ask for again, and again."""
    found = run("pydantic-ai", "with_pydantic_ai.py", real.url, real.model)
    assert found.keys() == {"chat completions", "responses"}
    for kind in found.values():
        assert kind == {
            "chat": ANSWER,
            "stream": ANSWER,
            "ToolOutput": "Place",
            "NativeOutput": "Place",
            **ACROSS_A_SLEEP,
        }


def test_instructor(real):
    """A mode of instructor's that is refused, or an answer that does not fit the model it was asked for."""
    found = run("instructor", "with_instructor.py", real.url, real.model)
    assert found == {
        "TOOLS": "Place",
        "JSON_SCHEMA": "Place",
        "partial": ["kind", "salty"],
        "asleep": True,
        "after": "Place",
    }


def test_the_npm_clients(real):
    """Answers that only Python's clients read."""
    directory, node = ENVIRONMENTS / "npm", shutil.which("node")
    assert node, "node is missing: install it from the distribution"
    assert (directory / "node_modules").exists(), f"{directory} is missing; `make test-clients` sets it up"
    script = directory / "with_npm.mjs"  # node looks for packages beside the script
    shutil.copy(HELPERS / script.name, script)
    found = said_by([node, script, real.url, real.model])
    assert found.keys() == {"openai", "ai chat", "ai responses"}
    for kind in found.values():
        assert kind == {
            "chat": ANSWER,
            "stream": ANSWER,
            "tool": ["depth_of", ["kind", "salty"]],
            "structured": ["kind", "salty"],
            **ACROSS_A_SLEEP,
        }


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_guidellm(real, tmp_path, route):
    """A benchmark whose requests count as failed, or that has no tokens and times, as it does not read our chunks."""
    program = ENVIRONMENTS / "guidellm" / "bin" / "guidellm"
    assert program.exists(), f"{program} is missing; `make test-clients` sets it up"
    report, tokenizer = tmp_path / "report.json", real.get("/state").json()["model"]["tokenizer_dir"]
    options = {
        "backend": f"kind=openai_http,target={real.url},model={real.model},request_format={route}",
        "profile": "kind=concurrent,streams=2",
        "constraint": "kind=max_requests,count=4",
        "tokenizer": f"kind=hf_auto,model={tokenizer}",
        "data": "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "output": f"kind=json,path={report}",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [program, "run", "--disable-console", *flags]
    environment = clean_environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals, metrics = benchmark["metrics"]["request_totals"], benchmark["metrics"]
    assert (totals["successful"], totals["errored"]) == (4, 0)
    assert metrics["output_token_count"]["successful"]["total_sum"] == 4 * 8
    assert metrics["prompt_token_count"]["successful"]["min"] >= 32
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0


@pytest.fixture(scope="class")
def exact():
    """SmolLM2 as its own library computes it: quantized weights round what they are multiplied with."""
    server = Served("smollm2-135m", "--dtype", "float32", "--quantization", "none", cache_dir=None)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture(scope="class")
def by_lm_eval(exact, tmp_path_factory):
    """Every response to lm-eval's tasks; tokens counted by lm-eval itself, or by whatever `tokenizers` says."""

    def evaluated(**tokenizers):
        model = {"model": exact.model, "base_url": f"{exact.url}/v1/completions", "num_concurrent": 4, "max_retries": 1}
        arguments = json.dumps(model | tokenizers)
        return run("lm-eval", "with_lm_eval.py", "local-completions", arguments, tmp_path_factory.mktemp("lm-eval"))

    return evaluated


@pytest.fixture(scope="class")
def evaluated(exact, by_lm_eval):
    return by_lm_eval(tokenizer=exact.get("/state").json()["model"]["tokenizer_dir"])


class TestLMEval:
    def test_a_remote_tokenizer_counts_as_the_one_at_hand(self, by_lm_eval, evaluated):
        """Tokens that are other ones over HTTP, so that another part of a text is scored."""
        remote = by_lm_eval(tokenizer_backend="remote")
        require_same_choices(remote["samples"]["local_choices"], evaluated["samples"]["local_choices"])
        assert remote["samples"]["local_continued"] == evaluated["samples"]["local_continued"]
        for one, other in zip(remote["samples"]["local_texts"], evaluated["samples"]["local_texts"], strict=True):
            assert one[0][0] == pytest.approx(other[0][0], **ROUNDING)

    def test_loglikelihoods_are_those_of_its_own_model(self, exact, evaluated, smollm2, tmp_path):
        """Log-probabilities of the prompt that are shifted by a token, cached wrongly, or of another model."""
        tokenizer = exact.get("/state").json()["model"]["tokenizer_dir"]
        weights = smollm2.path
        theirs = {
            "pretrained": str(weights.parent),
            "gguf_file": weights.name,
            "tokenizer": tokenizer,
            "dtype": "float32",
            "device": "cpu",
        }
        expected = run("lm-eval", "with_lm_eval.py", "hf", json.dumps(theirs), tmp_path)
        require_same_choices(evaluated["samples"]["local_choices"], expected["samples"]["local_choices"])
        for one, other in zip(evaluated["samples"]["local_texts"], expected["samples"]["local_texts"], strict=True):
            assert one[0][0] == pytest.approx(other[0][0], **ROUNDING)
        assert evaluated["samples"]["local_continued"] == expected["samples"]["local_continued"]
        for task, metric in [("local_choices", "acc,none"), ("local_texts", "byte_perplexity,none")]:
            assert evaluated["results"][task][metric] == pytest.approx(expected["results"][task][metric], rel=1e-4)


def require_same_choices(found, expected):
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == 4
        for (our,), (their,) in zip(ours, theirs, strict=True):
            assert our[0] == pytest.approx(their[0], **ROUNDING)
            assert our[1] == their[1], "one says that this continuation is the likeliest, the other that it is not"
