"""What an operator should know of a configuration, in the log when the server starts.

Knows nothing of what refuses a configuration: all of these can be served.
"""

from __future__ import annotations

import logging

from shuteye.config import EngineConfig
from shuteye.errors import ShuteyeError
from shuteye.server.config import ServerConfig
from shuteye.server.http.auth import control_routes_exist

logger = logging.getLogger(__name__)


def log_notices(engine: EngineConfig, server: ServerConfig) -> None:
    """One line for each setting that does less, or more, than it may look like."""
    if engine.memory_backend == "fake":
        logger.warning(
            "--memory-backend fake is a stand-in for tests, not for serving: it fills all memory that it takes with a "
            "pattern, the whole KV cache at once, so that it costs more than it must."
        )
    if engine.enable_sleep_mode and not control_routes_exist(server):
        logger.warning(
            "--enable-sleep-mode without --admin-api-key: the control routes (/sleep, /wake_up, …) do not exist, and "
            "nobody can put this model to sleep. Give a key, or --dev-mode to do without one."
        )
    if server.admin_api_key is not None and not engine.enable_sleep_mode:
        logger.warning(
            "--admin-api-key without --enable-sleep-mode: of the control routes only /restart_engine exists, not "
            "/sleep, /wake_up and the others."
        )
    if server.admin_api_key is None and server.dev_mode:
        _warn_of_open_control_routes(server, enable_sleep_mode=engine.enable_sleep_mode)


def _warn_of_open_control_routes(config: ServerConfig, *, enable_sleep_mode: bool) -> None:
    routes = "routes (/sleep, /wake_up, …) are" if enable_sleep_mode else "route /restart_engine is"
    logger.warning("Development mode: the control %s open to every caller, without a key.", routes)
    if not config.is_loopback:
        logger.warning(
            "DANGER: development mode on %s, which other machines can reach: anyone there can control "
            "this model. Use --admin-api-key, or listen on 127.0.0.1.",
            config.host,
        )


def with_flag(error: ShuteyeError) -> str:
    """What an error says, beginning with the flag that it is about, if it is about one."""
    fields = EngineConfig.__dataclass_fields__ | ServerConfig.__dataclass_fields__
    if error.param not in fields:
        return error.message
    return f"--{error.param.replace('_', '-')}: {error.message}"
