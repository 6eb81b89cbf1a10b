"""Sockets between machines: who gets in, and whether it is noticed that somebody has gone."""

import time

import msgspec
import pytest
import zmq

from shuteye.executors import tcp_pairs
from shuteye.executors.tcp_pairs import ConnectionMonitor, FrontDoor
from shuteye.executors.wire import connect_pair


@pytest.fixture
def context(monkeypatch):
    context, opened = zmq.Context(), []
    make = context.socket
    monkeypatch.setattr(context, "socket", lambda *of, **how: opened.append(make(*of, **how)) or opened[-1])
    yield context
    for socket in opened:
        socket.close()
    context.term()


@pytest.fixture
def door(context):
    door = FrontDoor(context, "127.0.0.1")
    yield door
    door.close()


def exchange(engine, rank):
    rank.send(b"hello")
    assert engine.poll(5_000), "nothing has come"
    assert engine.recv() == b"hello"
    engine.send(b"welcome")
    assert rank.poll(5_000)
    return rank.recv()


def stranger(context, address, how):
    """Somebody on the network, with what can be known there."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    match how:
        case "no keys":
            return connect_pair(context, address.asks)
        case "keys of its own":
            its = msgspec.structs.replace(address, public_key=public, secret_key=secret)
        case "the rank's public key":
            its = msgspec.structs.replace(address, secret_key=secret)
    return tcp_pairs.connect(context, address.asks, its)[0]


@pytest.mark.parametrize("how", ["no keys", "keys of its own", "the rank's public key"])
def test_nobody_else_speaks_to_an_engine(door, context, how):
    """Would catch a stranger who tells an engine what a rank has computed, or takes the rank's place."""
    asks, _, address = door.open()
    intruder = stranger(context, address, how)
    intruder.send(b"I am the rank")
    assert not asks.poll(500), "a stranger was heard"
    rank, _ = tcp_pairs.connect(context, address.asks, address)
    assert exchange(asks, rank) == b"welcome"
    assert not intruder.poll(100)


def test_a_rank_speaks_to_its_engine_alone(door, context):
    """Would catch a rank that obeys whoever has taken the engine's port."""
    asks, _, address = door.open()
    rank, _ = tcp_pairs.connect(context, address.asks, msgspec.structs.replace(address, engine_key="a" * 40))
    rank.send(b"hello")
    assert not asks.poll(500)


def test_a_rank_that_was_replaced_gets_in_no_more(door, context):
    asks, _, address = door.open()
    door.forget(address)
    rank, _ = tcp_pairs.connect(context, address.asks, address)
    rank.send(b"hello")
    assert not asks.poll(500)


def test_keys_are_not_shown(door):
    _, _, address = door.open()
    assert address.secret_key not in repr(address)


def test_a_peer_that_goes_is_noticed(door, context):
    """Would catch strangers at the port who hide it."""
    asks, _, address = door.open()
    monitor = ConnectionMonitor(asks)
    rank, _ = tcp_pairs.connect(context, address.asks, address)
    exchange(asks, rank)
    intruder = stranger(context, address, "no keys")
    time.sleep(0.1)
    monitor.look()
    assert monitor.has_come
    assert not monitor.has_gone
    rank.close()
    deadline = time.monotonic() + 5
    while not monitor.has_gone:
        assert time.monotonic() < deadline
        monitor.socket.poll(100)
        monitor.look()
    intruder.close()
    monitor.close()


@pytest.mark.parametrize("first", ["stranger", "rank"])
def test_strangers_are_not_the_peer(door, first):
    """Would catch a rank that is given up because somebody scans ports."""
    asks, _, _ = door.open()
    monitor = ConnectionMonitor(asks)
    rank, other = 11, 12
    if first == "stranger":
        monitor.note(zmq.EVENT_ACCEPTED, other)
    monitor.note(zmq.EVENT_ACCEPTED, rank)
    monitor.note(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)
    if first == "rank":
        monitor.note(zmq.EVENT_ACCEPTED, other)
    monitor.note(zmq.EVENT_DISCONNECTED, other)
    assert not monitor.has_gone
    monitor.note(zmq.EVENT_DISCONNECTED, rank)
    assert monitor.has_gone
    monitor.close()


def test_strangers_do_not_hide_that_the_peer_has_gone(door):
    """Would catch a lost rank that is waited for as long as somebody else keeps a connection open."""
    asks, _, _ = door.open()
    monitor = ConnectionMonitor(asks)
    monitor.note(zmq.EVENT_ACCEPTED, 11)
    monitor.note(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)
    monitor.note(zmq.EVENT_ACCEPTED, 12)
    monitor.note(zmq.EVENT_DISCONNECTED, 11)
    assert monitor.has_gone
    monitor.close()


def test_a_rank_sees_its_engine_come_and_go(door, context):
    """Would catch a rank that ends because it began to watch when its engine was there already."""
    for _ in range(20):
        asks, _, address = door.open()
        rank, connection = tcp_pairs.connect(context, address.asks, address)
        exchange(asks, rank)
        connection.look()
        assert connection.has_come
        assert not connection.has_gone
        asks.close()
        connection.socket.poll(2_000)
        connection.look()
        assert connection.has_gone
        connection.close()
