"""POST /update_weights: from a path on the host, and uploaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from http_answers import error

from shuteye.server.http.events import run_to_completion

UPLOAD = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"tensors")
    return path


def test_weights_are_updated_from_a_path(client, engine, file):
    """An update that answers 200 and writes nothing, or something else."""
    response = client.post("/update_weights", json={"path": str(file)})
    assert (response.status_code, response.json()["updated_bytes"]) == (200, 7)
    assert engine.updated == [(str(file), b"tensors")]
    text = client.get("/metrics").text
    assert (
        'shuteye_transitions_total{cause="call",model_name="tiny",outcome="changed",transition="update_weights"} 1.0'
        in text
    )
    assert 'shuteye_weights_updated_bytes_total{model_name="tiny"} 7.0' in text


def test_uploaded_in_pieces(client, engine, monkeypatch):
    """Bytes lost or reordered between two pieces; a file that stays when the server is killed, or afterwards."""
    links = []
    read = engine.control

    async def update(call):
        links.append(Path(call.path).stat().st_nlink)
        return await read(call)

    monkeypatch.setattr(engine, "control", update)
    response = client.post("/update_weights", content=iter([b"ten", b"", b"sors"]), headers=UPLOAD)
    assert response.status_code == 200
    path, content = engine.updated[0]
    assert content == b"tensors"
    assert links == [0], "the file has a name"
    assert not Path(path).exists()


def test_an_upload_without_room_is_503(client, engine, monkeypatch):
    """A bare OSError, and no word of the other way."""

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shuteye.handover.os.write", full)
    response = client.post("/update_weights", content=b"tensors", headers=UPLOAD)
    assert (response.status_code, error(response)["type"]) == (503, "MemoryExhaustedError")
    assert "No space left" in error(response)["message"]
    assert engine.updated == []


def test_an_upload_outlives_whoever_waited_for_its_update():
    """A path that leads to another file by the time the engine opens it, because the handler was cancelled."""

    async def scenario():
        events = []

        async def work():
            await asyncio.sleep(0.05)
            events.append("opened")

        async def handler():
            try:
                await run_to_completion(work())
            finally:
                events.append("closed")

        task = asyncio.create_task(handler())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert events == ["opened", "closed"]

    asyncio.run(scenario())


def test_an_upload_may_be_larger_than_other_bodies_but_not_than_the_model(make_engine, client_of, monkeypatch):
    """Weights refused by the limit for prompts; a disk filled by whoever has the key."""
    monkeypatch.setattr("shuteye.server.control.routes.SLACK_BYTES", 0)
    engine = make_engine()  # its weights are 1000 bytes
    client = client_of(engine, max_body_bytes=100)
    assert client.post("/update_weights", content=b"x" * 3999, headers=UPLOAD).status_code == 200
    for content in (b"x" * 4001, iter([b"x" * 3000, b"x" * 3000])):
        response = client.post("/update_weights", content=content, headers=UPLOAD)
        assert response.status_code == 413
        assert error(response)["type"] == "RequestTooLargeError"
    assert len(engine.updated) == 1
    assert client.post("/update_weights", json={"path": "x" * 200}).status_code == 413


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"json": {}}, "path"),
        ({"json": {"path": ""}}, "path"),
        ({"json": {"path": 1}}, "path"),
        ({"json": {"path": "/x", "update_info": {}}}, "update_info"),
        ({"json": []}, None),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, None),
        ({"content": b"x"}, None),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, None),
        ({"json": {"path": "/no/such/file"}}, "path"),
    ],
)
def test_what_cannot_be_read_is_400(client, engine, request_, param):
    """A 500, or a 200 for nothing."""
    response = client.post("/update_weights", **request_)
    assert response.status_code == 400
    assert error(response)["param"] == param
    assert engine.updated == []


def test_updating_weights_while_asleep_is_a_conflict(client, engine, file):
    """Weights written to memory that is not there."""
    client.post("/sleep")
    assert client.post("/update_weights", json={"path": str(file)}).status_code == 409
    client.post("/sleep?level=2")
    client.post("/wake_up?tags=weights")
    assert client.post("/update_weights", json={"path": str(file)}).status_code == 200


def test_it_needs_the_admin_key(make_engine, client_of):
    """Anyone who may ask the model replacing it."""
    client = client_of(make_engine(), admin_api_key="admin", api_key="sk")

    assert client.post("/update_weights", json={"path": "/x"}).status_code == 401
    headers = UPLOAD | {"Authorization": "Bearer sk"}
    assert client.post("/update_weights", content=b"x", headers=headers).status_code == 403
