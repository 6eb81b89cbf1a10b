"""The names of metrics: ours begin with `shuteye_`, and dashboards made for vLLM look for `vllm:`."""

from __future__ import annotations

import re
from typing import Literal

MetricsPrefix = Literal["shuteye", "vllm", "both"]

_OURS = re.compile(rb"^(# (?:HELP|TYPE) )?shuteye_", re.MULTILINE)
_HTTP = re.compile(rb"^((?:# (?:HELP|TYPE) )?)shuteye_(http_requests)", re.MULTILINE)


def named(exposition: bytes, prefix: MetricsPrefix) -> bytes:
    """Metrics in Prometheus' text format under the prefix that is wanted; HTTP requests have none with vLLM."""
    if prefix == "shuteye":
        return exposition
    theirs = _OURS.sub(rb"\1vllm:", _HTTP.sub(rb"\1\2", exposition))
    return theirs if prefix == "vllm" else exposition + theirs
