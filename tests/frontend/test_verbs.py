"""The faces of an engine have the same verbs: LLM, AsyncEngine, Client and AsyncClient."""

import inspect
import typing

import msgspec
import pytest

from shuteye import LLM, AsyncEngine
from shuteye.calls import (
    ControlCall,
    RpcCall,
    SleepCall,
    UnloadCall,
    UpdateCall,
    UpdateFromFileCall,
    notes_of,
    report_of,
)
from shuteye.client import AsyncClient, Client
from shuteye.client.control import _nothing, route_of
from shuteye.errors import InvalidRequest
from shuteye.frontend.engine import Engine
from shuteye.server.control.calls import call_of, model_of
from shuteye.server.control.routes import router
from shuteye.typed_frames import encode

CALLS = [UnloadCall, *(kind for kind in typing.get_args(ControlCall) if kind is not UpdateCall)]
VERB_OF_FACE = {
    AsyncEngine: {"update_weights": "update_weights_from_file"},
    LLM: {"update_weights": "update_weights_from_file"},
}
ONLY_ASYNC = {
    "launch": "LLM starts when it is made",
    "start": "the same",
    "restart": "an engine in a thread dies only by a bug; make another LLM",
    "abort": "a caller who blocks until the end has nothing to end",
    "stream": "a caller who blocks cannot follow",
    "request_ids": "the same",
    "on_auto_wake": "nobody listens",
    "engine_pid": "the process is this one",
}
ONLY_BLOCKING = {"chat": "the server has messages of its own", "get_tokenizer": "vLLM's name for `tokenizer`"}
VLLMS_NAMES = {"sampling_params": "params", "pooling_params": "params", "prompts": "prompt", "audio": "pcm"}
OF_STREAMS = {"request_id", "output_kind", "backlog", "add_special_tokens"}


def public(face):
    return {name for name in dir(face) if not name.startswith("_")}


def parameters(method):
    return [
        each.replace(annotation=inspect.Parameter.empty)
        for each in list(inspect.signature(method).parameters.values())[1:]
    ]


def test_llm_has_every_verb_that_async_engine_has():
    """A verb added to one of them alone; what is left out on purpose is named above."""
    assert public(AsyncEngine) - public(LLM) == set(ONLY_ASYNC)
    assert public(LLM) - public(AsyncEngine) == set(ONLY_BLOCKING)


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.verb)
@pytest.mark.parametrize("face", [LLM, AsyncEngine, Client, AsyncClient])
def test_control_verbs_take_what_their_call_takes(face, kind):
    """A parameter that one face does not pass on, or a default of its own."""
    method = getattr(face, VERB_OF_FACE.get(face, {}).get(kind.verb, kind.verb))
    given = [each.replace(annotation=inspect.Parameter.empty) for each in inspect.signature(kind).parameters.values()]
    assert parameters(method) == given
    assert all(name in method.__doc__ for name in notes_of(kind))


@pytest.mark.parametrize("verb", ["generate", "transcribe", "embed", "score", "update_weights", "control"])
def test_other_verbs_take_the_same_in_the_same_order(verb):
    """A parameter of one face alone: LLM has vLLM's names, and nothing that only a stream needs."""
    blocking = [VLLMS_NAMES.get(each.name, each.name) for each in parameters(getattr(LLM, verb))]
    awaited = [each.name for each in parameters(getattr(AsyncEngine, verb)) if each.name not in OF_STREAMS]
    assert [name.removesuffix("s") for name in blocking] == [name.removesuffix("s") for name in awaited]


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.verb)
def test_http_says_every_field_of_a_call(kind):
    """A field that no request can set, or that gets lost between the body and the call."""
    fields = {
        name: {"level": 2, "timeout_s": 1.5, "tags": ["weights"], "args": ["x"]}.get(name, "x")
        for name in kind.__struct_fields__
    }
    sent = {name.removesuffix("_s"): value for name, value in fields.items()}
    assert call_of(kind, model_of(kind).model_validate(sent, strict=True)) == kind(**fields)
    if kind is not UnloadCall:  # which no engine is sent
        assert msgspec.msgpack.decode(encode(kind(**fields)), type=ControlCall) == kind(**fields)


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.verb)
def test_every_call_has_a_route_and_its_answer_a_reader(kind):
    """A call that HTTP does not offer, or whose answer a client throws away."""
    asked = {"method": "states"} if kind is RpcCall else {"path": "/x"} if kind is UpdateFromFileCall else {}
    route = route_of(kind(**asked))
    assert (route.method, route.path) in {(method, each.path) for each in router.routes for method in each.methods}
    assert (route.parse(200, b"{}") is None) if report_of(kind) is type(None) else (route.parse is not _nothing)


def test_clients_take_the_older_name_of_a_drains_timeout():
    """Programs written for the name that was: see docs/vllm.md for how long aliases stay."""
    asked = []
    client = Client.__new__(Client)
    client.control = asked.append
    client.sleep(2, mode="wait", drain_timeout_s=3)
    client.pause(drain_timeout_s=3)
    assert [call.timeout_s for call in asked] == [3, 3]


def test_one_string_is_no_list_of_tags():
    """Letters taken for tags."""
    with pytest.raises(InvalidRequest, match="list of strings"):
        SleepCall(1, tags="weights")
    assert SleepCall(1, tags=["weights"]).tags == ("weights",)


def test_the_seam_is_small():
    """A verb that every engine and every fake of one must have; a new one belongs into a call or a job."""
    ends_others_requests = {"request_ids", "abort"}  # also while a call drains them, behind which a call would wait
    seam = {"view", "model", "start", "restart", "close", "stream", "control"}
    assert set(Engine.__abstractmethods__) == seam | ends_others_requests
