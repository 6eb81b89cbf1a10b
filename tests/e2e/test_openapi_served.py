"""The OpenAPI document against the server that serves it: requests made up from it, answers compared with it."""

import functools
import json

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, strategies
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from shuteye_server import ANSWER_S, SLEEPING_BODY, Served

from shuteye.client.answers import is_sleeping
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.testing import tiny_encoder, tiny_speech_model

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
PAIR = {"text_1": "a", "text_2": ["b", "c"]}
MESSAGE = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
SENSIBLE = {"/v1/responses": {"input": "hi"}, "/v1/messages": MESSAGE, "/score": PAIR, "/v1/score": PAIR}
"""Fields that a schema cannot describe well enough to be met by chance; every second request has them."""

MUST_BE_SERVED = {
    "generate": {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "POST /v1/messages",
        "POST /tokenize",
        "POST /detokenize",
    },
    "embed": {"POST /v1/embeddings", "POST /pooling", "POST /v2/rerank"},
    "score": {"POST /rerank"},
    "transcribe": set(),  # no made-up file is a recording
}


@functools.cache
def schema_of(document):
    return schemathesis.openapi.from_dict(json.loads(document))


def operations(server, *, control):
    """All operations of the server's document; of control routes only, or of the others.

    Routes that render take the bodies of those that generate, read by the same code, and are left out; so is the one
    that ends the server.
    """
    schema = schema_of(server.get("/openapi.json").text)
    found = [operation.ok() for operation in schema.get_all_operations()]
    found = [operation for operation in found if not operation.path.endswith(("/render", "/shutdown"))]
    return [operation for operation in found if is_control(operation) == control]


def is_control(operation):
    return "409" in operation.definition.raw["responses"]


def takes_something(operation):
    """False for an operation that no request can be wrong for: without a body or parameters of the query."""
    return len(operation.body) > 0 or len(operation.query) > 0


def fuzz(server, operation, examples, *, check, random=False):
    """Send `examples` requests of each mode; every answer comes in time, and passes `check` and the document.

    Returns the statuses that came.
    """
    statuses = set()

    def ask(case, sensible):
        if sensible and isinstance(case.body, dict):
            case.body |= SENSIBLE.get(operation.path, {})
            if isinstance(case.body.get("model"), str):
                case.body["model"] = server.model
        answer = case.call(base_url=server.url, timeout=ANSWER_S)
        statuses.add(answer.status_code)
        check(operation, answer)
        case.validate_response(answer, checks=CHECKS)

    for mode in MODES if takes_something(operation) else MODES[:1]:
        known = (id(operation.schema), operation.label, mode, examples)
        if known in DRAWN and not random:
            for case, sensible in DRAWN[known]:
                ask(case, sensible)
        else:
            DRAWN[known] = draw_and_ask(operation, mode, examples, ask, random=random)
    return statuses


DRAWN = {}
"""What was drawn before; without chance, the same would be drawn again of the same document, which takes longer."""


def draw_and_ask(operation, mode, examples, ask, *, random):
    """Draw cases and ask them; returns them. To ask one again changes nothing of it but the name of the model."""
    drawn = []
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not random,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    wanted = strategies.booleans() if mode is GenerationMode.POSITIVE else strategies.just(False)

    @settings
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), sensible=wanted)
    def draw(case, sensible):
        drawn.append((case, sensible))
        ask(case, sensible)

    draw()
    return drawn


def served(operation, answer):
    """No 5xx at all."""
    assert answer.status_code < 500, f"{operation.label}: {answer.status_code} {answer.text}"


def refused(operation, answer):
    """The contract's 503 from routes that need the weights, and no other 5xx."""
    if operation.label == "GET /ready":
        assert answer.status_code == 503
    else:
        assert answer.status_code < 500 or is_sleeping(503, answer.content), f"{operation.label}: {answer.text}"
        assert operation.path == "/v1/messages" or answer.status_code < 500 or answer.content == SLEEPING_BODY


def survives(server):
    """What was sent left the server as able as before."""
    server.restore()
    assert server.complete("after all that", max_tokens=4)


MODELS = {
    "embed": tiny_encoder,
    "score": functools.partial(tiny_encoder, task="score"),
    "transcribe": tiny_speech_model,
}
MANY = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("examples", [2, pytest.param(300, marks=MANY)])
class TestFuzz:
    def test_awake(self, server, examples):
        """A 500 for a strange request, a request that hangs, or an answer that is not what the document says."""
        for operation in operations(server, control=False):
            statuses = fuzz(server, operation, examples, check=served, random=examples > 100)
            assert statuses & {200} or operation.label not in MUST_BE_SERVED["generate"], "the engine was never reached"
        survives(server)

    @pytest.mark.parametrize("level", [1, 2])
    def test_asleep(self, server, examples, level):
        """As awake; or a request that gets past the gate because it is strange."""
        server.done(f"/sleep?level={level}")
        for operation in operations(server, control=False):
            fuzz(server, operation, examples, check=refused, random=examples > 100)
        assert server.get("/is_sleeping").json() == {"is_sleeping": True}
        survives(server)

    def test_control_routes(self, server, examples):
        """A control call that fails in other ways than by the table, or leaves something that cannot be woken."""
        for operation in operations(server, control=True):
            fuzz(server, operation, examples, check=served, random=examples > 100)
        survives(server)


@pytest.mark.parametrize("task", ["embed", "score", "transcribe"])
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_other_tasks(task, tmp_path):
    """As above, for models that do not generate; awake, then asleep."""
    model = MODELS[task](tmp_path / "model")
    obtain_image(Order(str(model), str(tmp_path)), no_progress).close()
    server = Served(model, "--enable-sleep-mode", "--dev-mode", "--num-threads", "1", cache_dir=tmp_path)
    try:
        server.wait_until_ready()
        for operation in operations(server, control=False):
            statuses = fuzz(server, operation, 150, check=served, random=True)
            assert statuses & {200} or operation.label not in MUST_BE_SERVED[task], "the engine was never reached"
        server.done("/sleep")
        for operation in operations(server, control=False):
            fuzz(server, operation, 150, check=refused, random=True)
    finally:
        server.stop()
