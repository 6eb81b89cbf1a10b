"""Names that a server is called by: which of them a web page cannot have made up.

Knows nothing of routes or keys. DNS rebinding (a page's own name, resolved to this machine after the page was loaded)
makes a stranger's page and this server the same origin to a browser; only the name in `Host` still tells.
"""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d+)?")  # RFC 9110, 7.2


def host_name(host: str | None) -> str | None:
    """The name or address in a `Host` header, in lower case and without port; None if there is none to be read."""
    match = _HOST.fullmatch(host or "")
    return None if match is None else (match["v6"] or match["name"]).lower()


def is_loopback_name(name: str) -> bool:
    """True for names and addresses that mean this machine wherever they are resolved."""
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def is_address(name: str) -> bool:
    """True for an IP address: no name server can have made it mean this machine."""
    return _address(name) is not None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
