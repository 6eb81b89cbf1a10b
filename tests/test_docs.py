"""README and docs against the code: snippets run, tables hold, and every path, name and module is there."""

import ast
import contextlib
import functools
import json
import re
import shlex
import time
from pathlib import Path

import msgspec
import pytest
from starlette.testclient import TestClient

from shuteye import LLM, AsyncEngine, EngineConfig, errors
from shuteye.errors import ModelSleeping, TransitionConflict
from shuteye.models.modules import quiet
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.control.routes import SleepAnswer
from shuteye.server.http.errors import error_body

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "shuteye"
README, SLEEP, STRUCTURES = ROOT / "README.md", ROOT / "docs" / "sleep.md", ROOT / "docs" / "structures.md"
DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [README, SLEEP, STRUCTURES, ROOT / "docs" / "concepts.md", ROOT / "docs" / "vllm.md", *GUIDES, *DECISIONS]

_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_REFERENCE = re.compile(r"([\w./-]+\.(?:py|toml))(?::([\w.]+))?")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def blocks(page, language):
    return [text for found, text in _FENCED.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page):
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def needs_a_server(snippet):
    return "http://" in snippet


# --- Python -------------------------------------------------------------------------------------


def load_with_transformers(checkpoint):
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("page", [README, SLEEP], ids=lambda page: page.name)
def test_python_snippets_compile(page):
    """A snippet that cannot even be pasted."""
    snippets = blocks(page, "python")
    assert len(snippets) >= 2
    for snippet in snippets:
        compile(snippet, str(page), "exec")


def test_the_readme_s_python_runs(tiny_shuteye):
    """A README that shows calls the library does not have."""
    snippets = [snippet for snippet in blocks(README, "python") if not needs_a_server(snippet)]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), {})


def test_the_sleep_guide_s_python_runs_from_top_to_bottom(tiny_shuteye, tiny_checkpoint):
    """A guide whose asserts do not hold; its snippets share names, as a reader would type them."""
    snippets = [snippet for snippet in blocks(SLEEP, "python") if not needs_a_server(snippet)]
    assert len(snippets) >= 6
    names = {"trainer": load_with_transformers(tiny_checkpoint)}
    with contextlib.ExitStack() as stack:
        for snippet in snippets:
            exec(compile(snippet, str(SLEEP), "exec"), names)
            if "llm" in names:
                stack.callback(names["llm"].close)


# --- HTTP ---------------------------------------------------------------------------------------


def curl_commands(page):
    """(method, path with query, headers, body) of every `curl` in blocks of them."""
    for block in blocks(page, "sh"):
        words = shlex.split(block, comments=True)
        starts = [index for index, word in enumerate(words) if word == "curl"]
        if words[0] != "curl":
            continue
        for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
            yield curl_command(words[start + 1 : end])


def curl_command(words):
    method, body, url, headers = None, None, None, {}
    words = iter(words)
    for word in words:
        match word:
            case "-X":
                method = next(words)
            case "-d":
                body = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            case _:
                assert url is None, f"two addresses in one command: {url} {word}"
                url = word
    assert url.startswith("http://127.0.0.1:8000/")
    return method or ("GET" if body is None else "POST"), url.removeprefix("http://127.0.0.1:8000"), headers, body


@pytest.mark.parametrize("page", [README, SLEEP], ids=lambda page: page.name)
def test_curl_commands_are_answered(page, tiny_options, tiny_checkpoint):
    """A route, a parameter or an order of calls that the server refuses."""
    config = EngineConfig(str(tiny_checkpoint), enable_sleep_mode=True, **tiny_options)
    server = ServerConfig(dev_mode=True, served_model_name=("smollm2-135m",))
    commands = list(curl_commands(page))
    assert len(commands) >= 4
    with TestClient(create_app(AsyncEngine(config, in_process=True), server), "http://localhost") as client:
        while client.get("/ready").json().get("reason") == "loading":
            time.sleep(0.01)
        for method, path, headers, body in commands:
            content = body and body.replace("/models/trained", str(tiny_checkpoint))
            response = client.request(method, path, headers=headers, content=content)
            assert response.status_code == 200, f"{method} {path}: {response.text}"
        assert client.get("/ready").status_code == 200, f"{page.name} leaves its model asleep"


def test_the_answers_shown_are_the_answers_given():
    """A field that was renamed, or a body that is not the contract's."""
    report, refusal = map(json.loads, blocks(SLEEP, "json"))
    assert json.loads(msgspec.json.encode(msgspec.convert(report, SleepAnswer))) == report
    assert refusal == error_body(ModelSleeping())


# --- tables -------------------------------------------------------------------------------------

WAYS = {
    # state → the calls that lead there from awake
    "awake": (),
    "level 0": (("sleep", 0),),
    "cache away": (("sleep", 1, ["kv_cache"]),),
    "level 1": (("sleep", 1),),
    "weights away": (("sleep", 1, ["weights"]),),
    "level 2": (("sleep", 2),),
    "level 2, cache there": (("sleep", 2, ["weights"]),),
    "blank": (("sleep", 2), ("wake_up", ["weights"])),
}
CALLS = {
    "sleep(1)": ("sleep", 1),
    "sleep(2)": ("sleep", 2),
    "wake_up()": ("wake_up",),
    'wake_up(["weights"])': ("wake_up", ["weights"]),
    'wake_up(["kv_cache"])': ("wake_up", ["kv_cache"]),
}
REMARKS = ("", ", from the image", ", names what is missing")


def table_under(page, first_cell):
    """The rows of the table whose header begins with `first_cell`, as dicts by header."""
    lines = prose(page).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    header, _, *rows = [cells(line) for line in lines[start : lines.index("", start)]]
    return [dict(zip(header, row, strict=True)) for row in rows]


def cells(line):
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def call(llm, verb, *arguments):
    if verb == "sleep":
        level, *tags = arguments
        return llm.sleep(level, tags=tags[0] if tags else None)
    return llm.wake_up(*arguments)


def where(llm):
    return (*(tag.residency for tag in llm.state.tags), llm.state.level)


def bring_awake(llm):
    if llm.state.missing:
        llm.reload_weights()
    llm.wake_up()
    assert where(llm) == ("resident", "resident", None)


def test_the_table_of_moves_is_the_engine_s(tiny_options, tiny_checkpoint):
    """A guide that promises a move the engine refuses, or hides one that it makes."""
    rows = table_under(SLEEP, "state")
    assert [row["state"] for row in rows] == list(WAYS)
    with LLM(str(tiny_checkpoint), enable_sleep_mode=True, **tiny_options) as llm:
        names = {}
        for name, way in WAYS.items():
            for step in way:
                call(llm, *step)
            names[where(llm)] = name
            bring_awake(llm)
        for row in rows:
            for header, asked in CALLS.items():
                for step in WAYS[row["state"]]:
                    call(llm, *step)
                assert where(llm)[:2] == (row["weights"], row["KV cache"])
                try:
                    found = names[where(llm)] if call(llm, *asked).changed else "unchanged"
                except TransitionConflict:
                    found = "409"
                assert row[header] in [found + remark for remark in REMARKS], (row["state"], header, found)
                bring_awake(llm)


def test_statuses_of_errors_are_the_tree_s():
    """An error named with a status that it does not answer with."""
    named = re.findall(r"`(\w+)`\s+(\d{3})\b", prose(SLEEP))
    assert len(named) >= 6
    by_type = {kind.error_type: kind for kind in vars(errors).values() if hasattr(kind, "error_type")}
    for name, status in named:
        kind = getattr(errors, name, None) or by_type[name]
        assert kind.status_code == int(status), name


# --- paths and names ----------------------------------------------------------------------------


def references(page):
    """(file, name in it or None) of everything in backticks that looks like one."""
    for code in _CODE.findall(prose(page)):
        match = _REFERENCE.fullmatch(code)
        if match:
            yield match[1], match[2]


def located(file):
    return next((base / file for base in (PACKAGE, ROOT) if (base / file).is_file()), None)


@functools.cache
def names_in(path):
    """Functions, classes and assigned names of a module, and of its classes as `Class.name`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= own_names(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for member in node.body for name in own_names(member)}
    return found


def own_names(node):
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name()):
            return {node.target.id}
    return set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_name_exists(page):
    """A page that sends its reader to something renamed or removed."""
    for file, name in references(page):
        path = located(file)
        assert path is not None, f"{page.name} names {file}, which does not exist"
        assert name is None or name in names_in(path), f"{page.name} names {file}:{name}, which does not exist"
    for link in _LINK.findall(prose(page)):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"


def has_content(module):
    """False for an `__init__.py` that is only a docstring."""
    return module.name != "__init__.py" or len(ast.parse(module.read_text(encoding="utf-8")).body) > 1


def test_every_module_has_one_line_in_structures():
    """A new module that nobody can find, or one that is described twice."""
    overview = prose(STRUCTURES).partition("## 2.")[0]
    listed = [
        file
        for line in overview.splitlines()
        if line.startswith("- ")
        for file in _CODE.findall(line.partition(" — ")[0])
    ]
    modules = [str(module.relative_to(PACKAGE)) for module in PACKAGE.rglob("*.py") if has_content(module)]
    assert len(modules) > 50
    assert sorted(listed) == sorted(modules)


def test_structures_names_the_functions_of_the_main_paths():
    """The check above passing because the page names nothing."""
    named = [name for _file, name in references(STRUCTURES) if name]
    assert len(named) > 50


def test_decisions_are_numbered_and_complete():
    """A decision without its reasons, or two with one number."""
    for number, page in enumerate(DECISIONS, start=1):
        text = page.read_text(encoding="utf-8")
        assert page.name.startswith(f"{number:04}-")
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
        assert re.search(r"^Status: (proposed|accepted|superseded by \d{4})$", text, re.MULTILINE)
