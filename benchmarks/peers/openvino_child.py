"""Runs inside OpenVINO's environment: a continuous-batching pipeline, told what to do by JSON lines on stdin.

Each line is answered by one line on stdout; times are of `time.perf_counter`, which all processes of a machine share.

    {"prompts": [...], "max_tokens": n}  ->  {"begin_s": …, "streams": [{"arrivals_s": [...], "prompt_tokens": …, …}]}
    {"unload": true}                     ->  {"seconds": …}

The pipeline is loaded by the first prompts, and again by the first ones after it was unloaded.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from typing import Any

import openvino_genai  # type: ignore[import-not-found]  # in an environment of its own

MALLOC_TRIM = ctypes.CDLL(None).malloc_trim


class Child:
    def __init__(self, directory: str, *, kv_gib: int, max_streams: int, precision: str) -> None:
        self._directory = directory
        self._precision = precision
        self._kv_gib = kv_gib
        self._max_streams = max_streams
        self._pipeline: Any = None
        self._last_id = 0

    def answer(self, line: dict[str, Any]) -> dict[str, Any]:
        if line.get("unload"):
            return {"seconds": self._unload()}
        if self._pipeline is None:
            self._load()
        return self._generate(line["prompts"], line["max_tokens"])

    def _load(self) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = self._kv_gib
        scheduler.max_num_seqs = self._max_streams
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            self._directory, scheduler, "CPU", properties={"KV_CACHE_PRECISION": self._precision}
        )

    def _unload(self) -> float:
        begin = time.perf_counter()
        self._pipeline = None
        gc.collect()
        MALLOC_TRIM(0)
        return time.perf_counter() - begin

    def _generate(self, prompts: list[str], max_tokens: int) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        begin = time.perf_counter()
        handles = []
        for prompt in prompts:
            self._last_id += 1
            handles.append(self._pipeline.add_request(self._last_id, prompt, config))
        arrivals: list[list[float]] = [[] for _ in prompts]
        counts = [0] * len(prompts)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            self._collect(handles, arrivals, counts)
        self._collect(handles, arrivals, counts)
        tokenizer = self._pipeline.get_tokenizer()
        lengths = [tokenizer.encode(prompt).input_ids.shape[1] for prompt in prompts]
        keys = ("arrivals_s", "completion_tokens", "prompt_tokens")
        return {
            "begin_s": begin,
            "streams": [dict(zip(keys, each, strict=True)) for each in zip(arrivals, counts, lengths, strict=True)],
        }

    @staticmethod
    def _collect(handles: list[Any], arrivals: list[list[float]], counts: list[int]) -> None:
        for index, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    counts[index] += len(output.generated_ids)
                    arrivals[index].append(time.perf_counter())


def main() -> None:
    directory, kv_gib, max_streams, precision = sys.argv[1:]
    child = Child(directory, kv_gib=int(kv_gib), max_streams=int(max_streams), precision=precision)
    for line in sys.stdin:
        print(json.dumps(child.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
