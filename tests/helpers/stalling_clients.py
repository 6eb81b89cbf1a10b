"""Clients that send half of what they should, or read nothing of what they get."""

from __future__ import annotations

import contextlib
import json
import socket


def head(path="/v1/completions", nbytes=0):
    fields = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {nbytes}", "", "")
    return "\r\n".join((f"POST {path} HTTP/1.1", *fields))


def request(body, path="/v1/completions"):
    content = json.dumps(body)
    return (head(path, len(content)) + content).encode()


WHOLE = request({"prompt": "abc", "max_tokens": 1})
HALF_A_HEAD = WHOLE[:40]
HALF_A_BODY = WHOLE[:-4]
HALF_A_CONTROL_CALL = head("/sleep", 9).encode() + b'{"le'


class Client:
    """A raw connection to a server."""

    def __init__(self, address, sent=b""):
        self.socket = socket.create_connection(address, timeout=30)
        self.socket.sendall(sent)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.socket.close()

    def answer(self):
        """The status line and all that follows, up to the end of the connection."""
        with contextlib.suppress(ConnectionResetError), self.socket.makefile("rb") as file:
            return file.read()
        return b""

    def begins(self):
        """Wait for an answer's first byte."""
        assert self.socket.recv(1) == b"H"
        return self
