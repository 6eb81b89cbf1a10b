"""What quantizing costs, and whether shuteye adds to it: log-probabilities of a fixed text, token by token.

The same windows are scored by shuteye, by transformers in float32 on the dequantized weights, and by llama.cpp's
llama-perplexity, where it is installed. Prints perplexities, how far shuteye's is from transformers', and how far apart
single tokens' log-probabilities are.

    python benchmarks/perplexity.py                         every format of SmolLM2-135M, minutes each
    python benchmarks/perplexity.py --format q4_0 --windows 4
    python benchmarks/perplexity.py --docs                  keeps the figures for docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import serve
from checkpoints import Checkpoint
from machine import LEVELS, Machine, this_machine
from peers.llama_cpp import program
from prose import fixed_text
from scored_files import SCORED, Groups, prepare_scored, stands_for
from scores import ScoreReport, Scores

WINDOW = 512
"""Tokens; each window is scored by itself, its first token not at all."""
NUM_WINDOWS = 40
MAGIC = b"_logits_"
Floats = NDArray[np.float64]


def windows(checkpoint: Checkpoint, count: int) -> list[list[int]]:
    """The text's first tokens in pieces of `WINDOW`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    ids = tokenizer.encode(fixed_text(), add_special_tokens=False).ids[: count * WINDOW]
    assert len(ids) == count * WINDOW, f"the text has only {len(ids)} tokens"
    return [ids[begin : begin + WINDOW] for begin in range(0, len(ids), WINDOW)]


# --- who scores -----------------------------------------------------------------------------------
# Each gives log-probabilities of tokens 1 … WINDOW - 1 of every window: [windows, WINDOW - 1].


def _is_gguf(checkpoint: Checkpoint) -> bool:
    return isinstance(SCORED[checkpoint.format].made, str)


def by_shuteye(checkpoint: Checkpoint, pieces: Sequence[list[int]], level: str | None, kv_cache_dtype: str) -> Floats:
    from shuteye import LLM, SamplingParams

    served = checkpoint.gguf if _is_gguf(checkpoint) else checkpoint.directory
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory": 256 << 20, "max_model_len": 2 * WINDOW}
    options["kv_cache_dtype"] = kv_cache_dtype
    if level:
        options["kernels"] = level
    with LLM(str(served), offline=True, **options) as llm:
        outputs = llm.generate(list(pieces), SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1))
    found = np.empty((len(pieces), WINDOW - 1))
    for row, output in zip(found, outputs, strict=True):
        known = output.prompt_logprobs or ()
        for index, token in enumerate(output.prompt_token_ids[1:], start=1):
            row[index - 1] = (known[index] or {})[token].logprob
    return found


def by_transformers(checkpoint: Checkpoint, pieces: Sequence[list[int]]) -> Floats:
    """In float32, on weights that are dequantized to float32: what the file means."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from shuteye.models.modules import quiet

    with quiet():
        if isinstance(SCORED[checkpoint.format].made, Groups):
            config = AutoConfig.from_pretrained(checkpoint.directory)
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            done = model.load_state_dict(dict(stands_for(checkpoint.format)), strict=False)
            assert (done.missing_keys, done.unexpected_keys) == (["lm_head.weight"], []), done
        else:
            where: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint.directory}
            if _is_gguf(checkpoint):
                where = {"pretrained_model_name_or_path": checkpoint.gguf.parent, "gguf_file": checkpoint.gguf.name}
                where["quantization_config"] = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    found = np.empty((len(pieces), WINDOW - 1))
    with torch.inference_mode():
        for row, piece in zip(found, pieces, strict=True):
            ids = torch.tensor(piece)
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            row[:] = logprobs.gather(-1, ids[1:, None])[:, 0].numpy()
    return found


def by_llama_cpp(checkpoint: Checkpoint, pieces: Sequence[list[int]], level: str | None) -> Floats | None:
    """NaN for the first half of each window, which llama-perplexity does not score; None without it, or of groups."""
    perplexity = program("llama-perplexity", level)
    if perplexity is None or isinstance(SCORED[checkpoint.format].made, Groups):
        return None
    with tempfile.TemporaryDirectory() as directory:
        text, logits = Path(directory) / "text.txt", Path(directory) / "logits"
        text.write_text(fixed_text(), encoding="utf-8")
        sizes = ["--no-escape", "-c", str(WINDOW), "-b", str(WINDOW), "--chunks", str(len(pieces)), "-t", "2"]
        command = [str(perplexity), "-m", str(checkpoint.gguf), "-f", str(text), *sizes]
        command += ["--kl-divergence-base", str(logits)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}")
        return read_logits(logits, pieces)


def read_logits(path: Path, pieces: Sequence[list[int]]) -> Floats:
    """What `--kl-divergence-base` wrote: log-probabilities of the whole vocabulary in 16 bits.

    As its source has it: a header, the tokens, and for each scored token a scale, a minimum, and one number per word.

    Its tokenizer divides some line breaks otherwise than the checkpoint's own: windows of other tokens are NaN.

    Raises:
        SystemExit: no window has the tokens of `pieces`, or the file has another form.
    """
    raw = path.read_bytes()
    length, vocab, count = struct.unpack_from("<iii", raw, len(MAGIC))
    begin = len(MAGIC) + 12
    tokens = np.frombuffer(raw, "<i4", length * count, begin).reshape(count, length)
    same = (tokens == np.asarray(pieces)).all(axis=1)
    if raw[: len(MAGIC)] != MAGIC or not same.any():
        sys.exit(f"{path} has other tokens than shuteye's: {tokens[0, :8]} … against {pieces[0][:8]} …")
    first = length // 2
    width = 2 * ((vocab + 1) // 2) + 4
    rows = np.frombuffer(raw, "<u2", -1, begin + tokens.nbytes).reshape(count, length - 1 - first, width)
    scale, least = np.ascontiguousarray(rows[:, :, :4]).view("<f4").transpose(2, 0, 1).astype(np.float64)
    own = np.take_along_axis(rows[:, :, 4:], tokens[:, first + 1 :, None], axis=2)[:, :, 0]
    found = np.full((count, length - 1), math.nan)
    found[same, first:] = (scale * own + least)[same]
    return found


# --- together -------------------------------------------------------------------------------------


def scored(form: str, count: int, level: str | None, kv_cache_dtype: str) -> Scores:
    checkpoint = prepare_scored(form)
    pieces = windows(checkpoint, count)
    ours = by_shuteye(checkpoint, pieces, level, kv_cache_dtype)
    reference = by_transformers(checkpoint, pieces)
    name = form if kv_cache_dtype == "auto" else f"{form}, KV {kv_cache_dtype}"
    return Scores.of(name, ours=ours, reference=reference, llama_cpp=by_llama_cpp(checkpoint, pieces, level))


def in_children(arguments: argparse.Namespace) -> Iterator[Scores]:
    """Format by format, each in a process of its own, as torch and engines keep what they took."""
    for form in arguments.format or SCORED:
        command = [sys.executable, __file__, "--child", form, "--windows", str(arguments.windows)]
        command += ["--kv-cache-dtype", arguments.kv_cache_dtype]
        level = ["--level", arguments.level] if arguments.level else []
        done = subprocess.run([*command, *level], check=True, stdout=subprocess.PIPE, text=True)
        yield Scores(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    arguments = parse()
    if arguments.child:
        found = scored(arguments.child, arguments.windows, arguments.level, arguments.kv_cache_dtype)
        print(json.dumps(found.as_dict()))
        return
    machine = this_machine(level=arguments.level, measured=False)
    print(machine.words, flush=True)
    for scores in in_children(arguments):
        print(scores.in_words(), flush=True)
        if arguments.docs:
            keep(machine, scores)
    if arguments.docs:
        serve.write_docs()


def keep(machine: Machine, scores: Scores) -> None:
    """Put a format's figures beside those of others that this machine has: all of them take hours."""
    path = serve.SCORES / f"{machine.key}.json"
    path.parent.mkdir(exist_ok=True)
    others = ScoreReport.from_dict(json.loads(path.read_text())).scores if path.exists() else ()
    kept = {each.format: each for each in (*others, scores)}
    ordered = tuple(kept[name] for form in SCORED for name in sorted(kept) if name.partition(",")[0] == form)
    report = ScoreReport(time.strftime("%Y-%m-%d"), machine, ordered)
    path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=SCORED, action="append", help="default all; may be repeated")
    parser.add_argument("--level", choices=LEVELS, help="hold shuteye and llama.cpp to this instruction set")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of shuteye alone; others keep the reference's")
    parser.add_argument("--windows", type=int, default=NUM_WINDOWS, help=f"of {WINDOW} tokens; default {NUM_WINDOWS}")
    parser.add_argument("--docs", action="store_true", help="keep the figures for docs/benchmarks.md")
    parser.add_argument("--child", choices=SCORED, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
