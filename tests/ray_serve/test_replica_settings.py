"""`args` of a Serve config: which names there are, and what is said of those that are none. And life without Ray."""

import importlib
import sys

import pytest

from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.ray.settings import ReplicaSettings, settings_of
from shuteye.server.config import ServerConfig


def test_flat_args_become_what_they_belong_to():
    settings = settings_of({"model": "m", "on_sleeping_request": "wake", "api_key": "k", "idle_sleep_s": 60})
    assert (settings.engine.model, settings.engine.on_sleeping_request) == ("m", "wake")
    assert (settings.server.api_key, settings.idle_sleep_s, settings.idle_sleep_level) == ("k", 60, 1)
    assert settings.engine.enable_sleep_mode, "what else for?"


def test_lists_of_a_yaml_file_are_taken():
    assert settings_of({"served_model_name": ["a", "b"]}).server.served_model_name == ("a", "b")


def test_sleep_mode_can_be_off():
    assert not settings_of({"enable_sleep_mode": False}).engine.enable_sleep_mode


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "m"}, "'modle', which is no flag"),
        ({"num_replicas": 2}, "num_replicas and ray_actor_options of the deployment 'Engine'"),
        ({"engine": EngineConfig()}, "'engine', which is no flag"),
        ({"port": 8000}, "port does nothing on Ray Serve: Ray Serve listens"),
        ({"engine_restarts": 1}, "engine_restarts does nothing on Ray Serve"),
        ({"idle_sleep_s": 0, "on_sleeping_request": "wake"}, "idle_sleep_s must be a positive number"),
        ({"idle_sleep_s": True, "on_sleeping_request": "wake"}, "idle_sleep_s must be a positive number"),
        ({"idle_sleep_s": 5}, "no request would wake it"),
        ({"idle_sleep_s": 5, "on_sleeping_request": "wake", "enable_sleep_mode": False}, "needs enable_sleep_mode"),
        ({"idle_sleep_level": 0}, "idle_sleep_level must be 1 or 2"),
        ({"call_timeout_s": -1}, "call_timeout_s must be a positive number"),
    ],
)
def test_what_is_wrong_is_named(args, message):
    with pytest.raises(InvalidRequest, match=message):
        settings_of(args)


def test_ray_serve_lets_in_as_many_requests_as_the_engine():
    """Ray Serve's own five at once, while the engine could batch 64."""
    settings = ReplicaSettings(EngineConfig(max_num_seqs=8, max_waiting_requests=16), ServerConfig())
    assert settings.max_ongoing_requests == 24


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "shuteye.ray.deployment", raising=False)
    with pytest.raises(ImportError, match=r"needs Ray Serve .*; install shuteye with its extra: shuteye\[ray\]"):
        importlib.import_module("shuteye.ray.deployment")
