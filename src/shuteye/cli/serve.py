"""`shuteye serve`: load a model and answer HTTP requests.

Knows the help of every flag; what the values do is the engine's and the server's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_origin

from cyclopts import Group, Parameter

from shuteye.cli.template_flag import template_converter
from shuteye.cli.values import Flag, flags_of
from shuteye.config import EngineConfig
from shuteye.server.config import ServerConfig
from shuteye.server.fleet_config import FleetConfig
from shuteye.server.serve_order import ServeOrder

MODEL = Group("Model", sort_key=0)
SLEEP = Group("Sleep", sort_key=1)
ENGINE = Group("Engine", sort_key=2)
SERVER = Group("Server", sort_key=3)
FILES = Group("Files", sort_key=4)
FLEET = Group("Fleet", sort_key=5)
MORE_MODELS = "more_models"

MODEL_FLAGS = {
    "model": Flag(
        "What to serve: a directory in Hugging Face format, a .gguf file, a hub id (owner/name) or a built-in alias.",
        positional=True,
    ),
    "revision": Flag("Branch, tag or commit of a hub id; refused for a local path."),
    "dtype": Flag(
        "Number format of what is computed, and of weights not quantized. auto takes the checkpoint's. "
        "float16 is served as bfloat16, which CPUs are made for; float32 keeps all bits of a float16 checkpoint."
    ),
    "quantization": Flag(
        "auto keeps the bits that the checkpoint has, none dequantizes them, others quantize what has not been."
    ),
    "chat_template": Flag(
        "A Jinja template in the place of the checkpoint's: a file, or the template itself.",
        converter=template_converter,
        metavar="FILE|TEXT",
    ),
    "max_model_len": Flag(
        "Longest prompt plus output, in tokens. By default the checkpoint's context, or what the KV cache can hold."
    ),
}
SLEEP_FLAGS = {
    "enable_sleep_mode": Flag(
        "Offer /sleep, /wake_up and the other control routes; they also need --admin-api-key or --dev-mode."
    ),
    "on_sleeping_request": Flag(
        "A request while asleep: reject answers 503, hold lets it wait for someone to wake the model, wake wakes it."
    ),
    "hold_timeout_s": Flag("How long a held request waits before it is answered with 503, in seconds."),
    "hold_queue_size": Flag("How many requests may be held; the next one is answered with 503."),
    "default_sleep_mode": Flag(
        "Requests in flight when the model goes to sleep: abort ends them, wait lets them finish, keep resumes them "
        "after the wake. A call's own mode wins."
    ),
    "drain_timeout_s": Flag("How long wait lets requests in flight finish before the sleep is given up, in seconds."),
    "verify_wake": Flag("How much of the weights is compared with checksums before a woken model serves."),
    "canary": Flag("Before a woken model serves, a short forward pass must reproduce the logits it gave before."),
    "memory_backend": Flag("How memory is taken and given back. auto picks by platform; fake is for tests."),
}
ENGINE_FLAGS = {
    "kv_cache_dtype": Flag(
        "What the KV cache holds: auto (numbers of --dtype), bf16, fp16, or int8 with a scale for each token and KV "
        "head, which takes about half of the memory of bf16."
    ),
    "kv_cache_memory": Flag(
        "KV cache of all ranks together, such as 512MiB, 2GiB or 1e9. By default a share of free memory, and no more "
        "than --max-num-seqs requests could use; it costs memory only as it fills.",
        size=True,
    ),
    "max_kv_cache_memory": Flag(
        "The most that a KV cache is sized to where --kv-cache-memory is left out. Of several models each has an "
        "eighth of --memory-budget by default, between 32MiB and 1GiB.",
        size=True,
    ),
    "max_num_seqs": Flag("Most requests that run at once; others wait."),
    "max_num_batched_tokens": Flag("Most tokens computed in one step. Longer prompts are cut into several steps."),
    "max_waiting_requests": Flag(
        "Most sequences that wait for a place in the batch; a request beyond that is answered with 503."
    ),
    "max_logprobs": Flag(
        "Most log-probabilities per token that a request may ask for; -1 allows the whole vocabulary, which takes the "
        "server some tenths of a second for each token. One request gets about two million at most beyond 20 a token."
    ),
    "max_grammar_bytes": Flag(
        "Longest schema, expression, grammar or list of choices of a request; a longer one is answered with 400.",
        size=True,
    ),
    "grammar_timeout_s": Flag("How long a request waits for its grammar to be compiled, in seconds."),
    "block_size": Flag("Tokens per KV cache block, the unit of sharing and of prefix caching."),
    "enable_prefix_caching": Flag("Reuse the KV cache of prompts that begin alike."),
    "hang_timeout_s": Flag(
        "An engine process that gives no sign of life for so many seconds counts as hung: /health is 503 and requests "
        "are refused until it goes on, or is restarted."
    ),
    "step_timeout_s": Flag(
        "So does an engine that takes longer for one step, in seconds: of the model, or of a sleep or a wake."
    ),
    "seed": Flag("For requests that bring no seed of their own."),
    "num_threads": Flag("Compute threads of each rank. By default all cores, divided among the ranks."),
    "kernels": Flag("auto uses the native kernels where they can be used; torch never does; others name their set."),
    "tensor_parallel_size": Flag("Ranks that each hold a slice of every layer."),
    "pipeline_parallel_size": Flag("Ranks that each hold a part of the layers."),
    "distributed_executor_backend": Flag(
        "Where ranks run: in the engine process, in processes of their own, or on the machines of a Ray cluster, which "
        "RAY_ADDRESS names (without it: the one that runs here, or a new one). By default one rank runs in the engine "
        "process, and several in processes of their own."
    ),
    "ray_placement": Flag(
        "Which machines of a Ray cluster ranks go to: auto takes as few as have CPUs, and keeps a stage on one machine "
        "if it can; pack takes one; spread takes one for each pipeline stage, or for each rank if there is one stage."
    ),
    "rank_timeout_s": Flag(
        "A rank that does not answer for so many seconds is killed, and the engine is faulted until it is woken."
    ),
}
FLEET_FLAGS = {
    "memory_budget": Flag(
        "What all models may take together. By default what the machine, or the control group, leaves.", size=True
    ),
    "min_awake_seconds": Flag("For so long after a wake a model is not put to sleep for another one."),
    "sleep_idle_seconds": Flag("A model without requests sleeps after so long; by default never for that reason."),
    "sleep_idle_level": Flag("How deep it then sleeps; unloaded ends its process."),
    "sleep_escalate_seconds": Flag("After so long at one level it sleeps more deeply, and at last is unloaded."),
}
FILE_FLAGS = {
    "cache_dir": Flag("Where weight images and fetched wheels live."),
    "offline": Flag("Fetch nothing; use what earlier runs left."),
}
SERVER_FLAGS = {
    "host": Flag("Address to listen on. 0.0.0.0 is every interface."),
    "port": Flag("Port to listen on. 0 lets the system choose."),
    "uds": Flag("Listen on a Unix domain socket at this path, and on no port."),
    "root_path": Flag("What a proxy puts before every path, such as /llm; requests are answered with and without it."),
    "api_key": Flag(
        "Required of inference requests, as Authorization: Bearer.", env=("SHUTEYE_API_KEY", "VLLM_API_KEY")
    ),
    "admin_api_key": Flag("Required on control routes, and turns them on. It opens inference routes too."),
    "dev_mode": Flag(
        "Control routes without a key. For development: anyone who can reach the port can put the model to sleep.",
        env=("SHUTEYE_SERVER_DEV_MODE", "SHUTEYE_DEV_MODE", "VLLM_SERVER_DEV_MODE"),
    ),
    "allowed_hosts": Flag(
        "Names by which control routes without a key may be called, besides localhost and this machine's addresses: "
        "a web page that had its own name resolved to this machine could call them otherwise."
    ),
    "tool_call_parser": Flag("How the model writes tool calls. auto asks its chat template; Hermes' format if unsure."),
    "reasoning_parser": Flag(
        "How the model writes reasoning, which answers then carry apart from their content: deepseek_r1 takes all up "
        "to its end mark, qwen3 only what a begin mark opens."
    ),
    "served_model_name": Flag("Names that requests may use for the model. By default the model as given."),
    "allowed_origins": Flag("Web pages of these origins may call the server, * for every origin. By default of none."),
    "allowed_methods": Flag("HTTP methods that those pages may use."),
    "allowed_headers": Flag("Request headers that those pages may send."),
    "allow_credentials": Flag("Let those pages send cookies."),
    "max_body_bytes": Flag(
        "Larger request bodies are answered with 413; weights for /update_weights may be as large as the model.",
        size=True,
    ),
    "max_json_bytes": Flag("Larger request bodies in JSON are answered with 413.", size=True),
    "max_request_sequences": Flag(
        "Most sequences (prompts times n), inputs to embed or pairs to score of a request; more are answered with 400."
    ),
    "max_audio_s": Flag("Longer audio, in seconds, is answered with 400."),
    "max_waiting_audio_s": Flag(
        "Audio being transcribed or waiting, in seconds all together (64 kB each); more are answered with 503."
    ),
    "on_abort": Flag(
        "Requests that a sleep or a pause with mode abort ends, or /abort_requests: partial answers with what there is "
        "of them, finish_reason abort and 200, as vLLM does; error with 503, which clients send again."
    ),
    "strict_fields": Flag(
        "Answer 400 to a request body with a field that nobody here knows; else such fields are left out, logged, and "
        "named in the answer's X-Ignored-Fields."
    ),
    "enable_force_include_usage": Flag(
        "Every chunk of a stream tells how many tokens it took so far, asked to or not."
    ),
    "return_tokens_as_token_ids": Flag("Log-probabilities name tokens as token_id:N, also where it was not asked for."),
    "metrics_prefix": Flag("Names of metrics: shuteye_…, vllm:… for dashboards made for vLLM, or each metric twice."),
    "max_header_count": Flag("More request headers are answered with 431."),
    "max_header_bytes": Flag(
        "Larger request headers, all of them and the request line together, are answered with 431.", size=True
    ),
    "header_timeout_s": Flag(
        "How long a client may take to send the line and headers of a request, in seconds; then it is answered with "
        "408, and its connection closed."
    ),
    "body_timeout_s": Flag(
        "How long nothing of a request's body may come, in seconds, before it is answered with 408; so is a body of "
        "less than 500 bytes a second."
    ),
    "engine_restarts": Flag(
        "How often an engine that died is restarted by itself within ten minutes; when it dies once more, the server "
        "exits with status 1, so that a supervisor can act. 0: it exits at the first death."
    ),
    "engine_restart_delay_s": Flag(
        "How long to wait before the first of these restarts, in seconds; twice as long before every further one, and "
        "a minute at most."
    ),
    "shutdown_grace_s": Flag(
        "After the first Ctrl-C or SIGTERM, how long running requests may go on, in seconds; new ones get 503.",
        alias="--shutdown-timeout",
    ),
    "log_level": Flag("What server and engine log."),
    "log_format": Flag(
        "auto is short and coloured on a terminal and text elsewhere; text tells level and origin, too; json is one "
        "object a line."
    ),
    "log_requests": Flag("Log a line for every request that was served: its id, token counts and times, not its text."),
    "otlp_traces_endpoint": Flag(
        "Send OpenTelemetry spans to this address, such as http://127.0.0.1:4318/v1/traces (OTLP over HTTP); "
        "needs the extra shuteye[otel]."
    ),
}

_GROUPS = ((MODEL, MODEL_FLAGS), (SLEEP, SLEEP_FLAGS), (ENGINE, ENGINE_FLAGS), (FILES, FILE_FLAGS))
_ENGINE_FLAGS = {name: flag for _group, flags in _GROUPS for name, flag in flags.items()}
_GROUP_OF = {name: group for group, flags in _GROUPS for name in flags}
_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        Parameter(
            help="A TOML file whose table [serve] holds any of these flags. Flags and environment variables win.",
            group=FILES,
            env_var="SHUTEYE_CONFIG",
        ),
    ],
)


_MORE_MODELS = inspect.Parameter(
    MORE_MODELS,
    inspect.Parameter.VAR_POSITIONAL,
    annotation=Annotated[
        str,
        Parameter(help="More models to serve on the same port; requests choose by name.", group=MODEL),
    ],
)


def _signature() -> inspect.Signature:
    """Every field of both configurations, so that none can be forgotten here."""
    engine = [
        parameter
        for group in dict.fromkeys(_GROUP_OF.values())
        for parameter in flags_of(EngineConfig, _ENGINE_FLAGS, group)
        if _GROUP_OF[parameter.name] is group
    ]
    server = flags_of(ServerConfig, SERVER_FLAGS, SERVER)
    fleet = flags_of(FleetConfig, FLEET_FLAGS, FLEET)
    everything = [*engine, _MORE_MODELS, *fleet, *server, _CONFIG]
    return inspect.Signature(sorted(everything, key=lambda parameter: parameter.kind))


_SIGNATURE = _signature()


def variables() -> frozenset[str]:
    """The environment variables that set these flags."""
    details = (one for flag in _SIGNATURE.parameters.values() for one in flag.annotation.__metadata__)
    return frozenset(name for one in details for name in one.env_var)


def serve_here(order: ServeOrder) -> int:
    """Serve in this process, until it is told to stop; its exit code."""
    from shuteye.server.launch import serve as run

    return run(order)


def serve(*arguments: Any, **flags: Any) -> ServeOrder:
    """Load a model and serve it over an OpenAI-compatible API.

    Flags win over environment variables, and those over the file given with --config.
    """
    values = _SIGNATURE.bind(*arguments, **flags).arguments  # only what was given
    engine = _given(EngineConfig, values)
    engines = (engine, *(replace(engine, model=model) for model in values.get(MORE_MODELS, ())))
    return ServeOrder(engines, _given(ServerConfig, values), _given(FleetConfig, values))


C = TypeVar("C")


def _given(kind: type[C], values: Mapping[str, Any]) -> C:
    return kind(**{one.name: values[one.name] for one in fields(cast(Any, kind)) if one.name in values})


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """The arguments of `shuteye serve`, of which a flag that is given again counts as it was given last."""
    names = {name: flag for flag in _SIGNATURE.parameters.values() for name in _spellings(flag)}
    groups: list[tuple[str, list[str]]] = []  # of a flag, and what belongs to it
    left = list(arguments)
    while left:
        token = left.pop(0)
        name, has_value, _value = token.partition("=")
        flag = names.get(name)
        group = [token]
        if flag is not None and not has_value and not _is_switch(flag) and left:
            group.append(left.pop(0))
        key = "" if flag is None or _takes_many(flag) else flag.name
        groups = [one for one in groups if not key or one[0] != key]
        groups.append((key, group))
    return [token for _key, group in groups for token in group]


def _spellings(flag: inspect.Parameter) -> Iterator[str]:
    yield (name := f"--{flag.name.replace('_', '-')}")
    if _is_switch(flag):
        yield name.replace("--", "--no-", 1)
    yield from (alias for one in flag.annotation.__metadata__ for alias in one.alias or ())


def _is_switch(flag: inspect.Parameter) -> bool:
    return bool(flag.annotation.__origin__ is bool)


def _takes_many(flag: inspect.Parameter) -> bool:
    return get_origin(flag.annotation.__origin__) is tuple


serve.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # cyclopts reads it
