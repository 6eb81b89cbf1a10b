"""What the access log leaves out: probes and scrapers, and nothing else."""

import logging

import pytest

from shuteye.server.run import _worth_logging


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ('127.0.0.1:1 - "GET /ready HTTP/1.1" 503', False),
        ('127.0.0.1:1 - "GET /metrics HTTP/1.1" 200', False),
        ('127.0.0.1:1 - "HEAD /health HTTP/1.1" 200', False),
        ('127.0.0.1:1 - "GET /v1/models HTTP/1.1" 200', True),
        ('127.0.0.1:1 - "POST /sleep?level=1 HTTP/1.1" 200', True),
        ('127.0.0.1:1 - "GET /readyness HTTP/1.1" 404', True),
    ],
)
def test_the_access_log_leaves_out_only_polling(line, kept):
    """Would catch a log that hides who put the model to sleep, or one that drowns it in probes."""
    assert _worth_logging(logging.makeLogRecord({"msg": line})) == kept
