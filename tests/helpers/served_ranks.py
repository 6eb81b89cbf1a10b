"""A server over rank processes that fail where they are told to, asked over HTTP.

The engine runs in a thread of this process, so that the ranks are ours; the loop around it is that of every engine.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress

import httpx2
from faulty_rank import plan_fault, records
from live_server import LiveServer

from shuteye import AsyncEngine

ANSWER_S = 30.0


class Stream:
    """One greedy completion, followed in a thread until it ends in one way or the other."""

    def __init__(self, served, prompt, max_tokens):
        self.prompt, self.max_tokens = prompt, max_tokens
        self.text, self.finish_reason, self.error = "", None, None
        self.started = threading.Event()
        self._served = served
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        body = self._served.request(self.prompt, self.max_tokens) | {"stream": True}
        with httpx2.stream("POST", f"{self._served.url}/v1/completions", json=body, timeout=ANSWER_S) as response:
            if response.status_code != 200:
                response.read()
                self.error = response.json()["error"]
            for line in response.iter_lines():
                payload = line.removeprefix("data: ")
                if payload and payload != "[DONE]":
                    self._take(json.loads(payload))
        self.started.set()

    def _take(self, payload):
        self.error = payload.get("error") or self.error
        for choice in payload.get("choices", ()):
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"]
            self.started.set()

    def wait(self):
        self._thread.join(ANSWER_S)
        assert not self._thread.is_alive(), f"a stream has not ended after {ANSWER_S} s"
        return self


class ServedRanks:
    """The server, and its ranks by their rows in /state."""

    def __init__(self, config, faults):
        self.faults = faults
        self.num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
        self._model = config.model
        self._server = LiveServer(AsyncEngine(config, in_process=True))
        self._server.thread.start()
        self._server.wait_ready()
        self.url = self._server.url
        self.http = httpx2.Client(base_url=self.url, timeout=ANSWER_S)

    def close(self):
        self.http.close()
        self._server.stop()

    # --- asking -----------------------------------------------------------------------------------

    def post(self, path, **more):
        return self.http.post(path, **more)

    def done(self, path, **more):
        """The answer of a call that must succeed."""
        response = self.post(path, **more)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def refused(self, path, **more):
        """Status and message of a call that must fail."""
        response = self.post(path, **more)
        assert response.status_code >= 400, f"{path}: {response.status_code} {response.text}"
        return response.status_code, response.json()["error"]["message"]

    def request(self, prompt, max_tokens):
        return {
            "model": str(self._model),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def complete(self, prompt, max_tokens=12):
        return self.done("/v1/completions", json=self.request(prompt, max_tokens))["choices"][0]["text"]

    def streams(self, prompts, max_tokens):
        """Streams that have all begun."""
        streams = [Stream(self, prompt, max_tokens) for prompt in prompts]
        for stream in streams:
            assert stream.started.wait(ANSWER_S)
        return streams

    def state(self):
        return self.http.get("/state").json()["state"]

    def health(self):
        response = self.http.get("/health")
        return response.status_code, response.json().get("error", {}).get("message", "")

    # --- ranks ------------------------------------------------------------------------------------

    def resident_bytes(self):
        """By rank, of all its tags, as the engine says."""
        return [sum(tag["resident_bytes"] for tag in rank["tags"]) for rank in self.state()["ranks"]]

    def pid(self, rank):
        return self.state()["ranks"][rank]["pid"]

    def kill(self, rank, number=signal.SIGKILL):
        os.kill(self.pid(rank), number)

    def plan_fault(self, rank, *lines):
        plan_fault(self.faults, rank, *lines)

    def records(self):
        return records(self.faults, self.num_ranks)

    def wait_until_gone(self, pid):
        """When the process had ended (monotonic seconds)."""
        deadline = time.monotonic() + ANSWER_S
        while os.path.exists(f"/proc/{pid}/exe"):
            assert time.monotonic() < deadline, f"process {pid} goes on"
            time.sleep(0.002)
        return time.monotonic()

    def restore(self):
        """Awake, with the image's weights, and nothing in flight."""
        for rank in range(self.num_ranks):
            self.plan_fault(rank)
            with suppress(ProcessLookupError):
                self.kill(rank, signal.SIGCONT)
        self.done("/wake_up")
        self.done("/resume")
        self.done("/reload_weights")
        assert self.health()[0] == 200
