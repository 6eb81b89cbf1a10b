"""A lease as a context: taken, renewed, given back, and told when it is lost."""

import json

import httpx2
import pytest

from shuteye.client import Client
from shuteye.errors import TransitionConflict

GRANT = {"id": "lease-1", "bytes": 10, "expires_in_s": 0.3, "slept": ["a"], "freed_bytes": 7, "restore_s": 0.1}
GONE = {"error": {"message": "over", "type": "LeaseGoneError", "code": 410}}
REFUSED = {
    "error": {"message": "not within 10 seconds", "type": "LeaseRefusedError", "code": 409},
    "available_bytes": 1,
    "in_the_way": [],
}


class Server:
    """Grants, renews and takes back, or answers as `answers` says; remembers what it was asked."""

    def __init__(self, **answers):
        self.asked = []
        self.answers = {"POST": (201, GRANT), "PUT": (200, {}), "DELETE": (200, {"status": "released"})} | answers

    def __call__(self, request):
        self.asked.append((request.method, request.url.path, json.loads(request.content or b"null")))
        status, body = self.answers[request.method]
        return httpx2.Response(status, json=body)

    def count(self, method):
        return sum(asked[0] == method for asked in self.asked)


def client_of(server):
    return Client("http://server", transport=httpx2.MockTransport(server))


def test_it_is_taken_renewed_and_given_back():
    """Would catch memory that is lost while it is used, or that nobody gets back."""
    server = Server()
    with client_of(server) as client, client.lease(10, ttl_s=0.03, holder="trainer") as lease:
        assert (lease.grant.slept, lease.grant.freed_bytes) == (("a",), 7)
        while server.count("PUT") < 2:
            assert not lease.lost.wait(0.005)
    method, path, body = server.asked[0]
    assert (method, path) == ("POST", "/v1/leases")
    assert (body["bytes"], body["ttl_s"], body["holder"], body["restore"]) == (10, 0.03, "trainer", True)
    assert server.asked[1] == ("PUT", "/v1/leases/lease-1", {"ttl_s": 0.03})
    assert server.asked[-1][:2] == ("DELETE", "/v1/leases/lease-1")


def test_an_error_within_gives_it_back_and_is_not_swallowed():
    """Would catch memory that is kept by a program that has failed."""
    server = Server()
    with pytest.raises(ZeroDivisionError), client_of(server) as client, client.lease(10):
        raise ZeroDivisionError
    assert server.count("DELETE") == 1


def test_a_refusal_is_raised_and_nothing_is_given_back():
    """Would catch a program that goes on without its memory."""
    server = Server(POST=(409, REFUSED))
    with client_of(server) as client, pytest.raises(TransitionConflict, match="within 10"), client.lease(10):
        pass
    assert server.count("DELETE") == 0


def test_one_that_is_lost_is_told_and_not_renewed_again():
    """Would catch a holder that never learns that others have its memory."""
    server = Server(PUT=(410, GONE))
    with client_of(server) as client, client.lease(10, ttl_s=0.03) as lease:
        assert lease.lost.wait(10)
    assert (server.count("PUT"), server.count("DELETE")) == (1, 0)


def test_an_outage_is_survived():
    """Would catch a lease that is given up because one renewal of three has failed."""
    server = Server(PUT=(500, {"error": {"message": "oops", "type": "InternalServerError", "code": 500}}))
    with client_of(server) as client, client.lease(10, ttl_s=0.03) as lease:
        while server.count("PUT") < 2:
            assert not lease.lost.wait(0.005)
        server.answers["PUT"] = (200, {})
    assert not lease.lost.is_set()
    assert server.count("DELETE") == 1
