"""Talks to a running server: its control routes, and transports for httpx2 that wake a sleeping model and retry.

Knows nothing of engines; of shuteye it sees only outputs and errors.
"""

from __future__ import annotations

from shuteye.client.answers import error_from_response
from shuteye.client.control import DEFAULT_TIMEOUT_S, DEFAULT_URL, AsyncClient, Client, ServerState, WakingCost
from shuteye.client.leases import Lease, LeaseGrant, LeaseRequest
from shuteye.client.waking import AsyncWakingTransport, WakingTransport

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DEFAULT_URL",
    "AsyncClient",
    "AsyncWakingTransport",
    "Client",
    "Lease",
    "LeaseGrant",
    "LeaseRequest",
    "ServerState",
    "WakingCost",
    "WakingTransport",
    "error_from_response",
]
