"""Prints how the package is built: sizes, functions that only pass on, and what requests and control calls go through.

Knows nothing of directories: it counts what is there, and traces what a server of tiny models runs. To measure another
checkout, put its `src` on PYTHONPATH.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import io
import statistics
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx2
import soundfile

import shuteye

Function = ast.FunctionDef | ast.AsyncFunctionDef

# --- what is written ----------------------------------------------------------------------------


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def statements_of(function: Function) -> list[ast.stmt]:
    """The body without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def only_passes_on(function: Function) -> bool:
    """Whether it is a stub, forwards an attribute of an attribute, or makes one call with just its parameters."""
    body = statements_of(function)
    if not body:
        return True
    if len(body) > 1:
        return False
    value = getattr(body[0], "value", None)
    if isinstance(value, ast.Await):
        value = value.value
    if isinstance(value, ast.Constant):
        return value.value is ...
    if isinstance(value, ast.Attribute):
        return isinstance(value.value, ast.Attribute)
    return isinstance(value, ast.Call) and _passes_parameters(value, function)


def _passes_parameters(call: ast.Call, function: Function) -> bool:
    parameters = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)} - {"self", "cls"}
    given = [each.value if isinstance(each, ast.Starred) else each for each in call.args]
    given += [each.value for each in call.keywords]
    names = {each.id for each in given if isinstance(each, ast.Name)}
    return len(names) == len(given) and names == parameters and isinstance(call.func, ast.Attribute)


def sizes(package: Path) -> Iterator[tuple[str, object]]:
    """Files, lines and functions of every module below `package`."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))]
    lines = [text.count("\n") for text in texts]
    functions = [each for text in texts for each in functions_of(ast.parse(text))]
    lengths = [(each.end_lineno or each.lineno) - each.lineno + 1 for each in functions]
    passing = sum(map(only_passes_on, functions))
    yield "files", len(texts)
    yield "lines", sum(lines)
    yield "lines of a file, median / most", f"{statistics.median(lines):.0f} / {max(lines)}"
    yield "files under 50 lines", sum(count < 50 for count in lines)
    yield "functions", len(functions)
    yield "lines of a function, median / most", f"{statistics.median(lengths):.0f} / {max(lengths)}"
    yield "functions that only pass on", f"{passing} ({passing / len(functions):.1%})"


# --- what runs ----------------------------------------------------------------------------------


class Trace:
    """Which functions below `package` run, in every thread started after this, while a journey is under way."""

    def __init__(self, package: Path) -> None:
        self._root = f"{package}/"
        self._under_way = False
        self._files: set[str] = set()
        self._functions: set[CodeType] = set()
        self._arrows: set[tuple[str, str]] = set()
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    async def follow(self, journey: Coroutine[Any, Any, None]) -> str:
        """What `journey` went through."""
        for seen in (self._files, self._functions, self._arrows):
            seen.clear()
        self._under_way = True
        try:
            await journey
        finally:
            self._under_way = False
        iterators = sorted(code.co_qualname for code in self._functions if _is_async_iterator(code))
        return (
            f"{len(self._functions)} functions in {len(self._files)} files, {len(self._arrows)} arrows between files; "
            f"async iterators: {', '.join(iterators) or 'none'}"
        )

    def _on_event(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not self._under_way or not frame.f_code.co_filename.startswith(self._root):
            return
        here = frame.f_code.co_filename
        self._functions.add(frame.f_code)
        self._files.add(here)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self._root):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != here:
            self._arrows.add((caller.f_code.co_filename, here))


def _is_async_iterator(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_ASYNC_GENERATOR) or code.co_name == "__anext__"


@asynccontextmanager
async def served(model: Path, cache_dir: Path) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A client of a server in this process, its engine in a thread."""
    from shuteye import AsyncEngine, EngineConfig
    from shuteye.server.app import create_app
    from shuteye.server.config import ServerConfig

    config = EngineConfig(
        str(model),
        enable_sleep_mode=True,
        cache_dir=cache_dir,
        num_threads=1,
    )
    app = create_app(AsyncEngine(config, in_process=True), ServerConfig(dev_mode=True))
    transport = httpx2.ASGITransport(app, client=("127.0.0.1", 1))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
    ):
        async with asyncio.timeout(120):
            while (await client.get("/ready")).status_code != httpx2.codes.OK:
                await asyncio.sleep(0.01)
        yield client


async def asked(client: httpx2.AsyncClient, path: str, **options: Any) -> None:
    """One request that must be answered well."""
    answer = await client.post(path, **options)
    answer.raise_for_status()
    assert b'"error"' not in answer.content, answer.text


async def travels(package: Path) -> AsyncGenerator[tuple[str, str], None]:
    """Every journey, once after a first one that warms up what is made on first use."""
    from shuteye.testing import tiny_model, tiny_speech_model

    trace = Trace(package)
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True, "temperature": 0}
        async with served(tiny_model(scratch / "chat"), scratch / "cache") as client:
            await asked(client, "/v1/chat/completions", json=chat)
            yield "a streamed chat", await trace.follow(asked(client, "/v1/chat/completions", json=chat))
            for path in ("/sleep?level=1", "/wake_up", "/reload_weights"):
                yield path, await trace.follow(asked(client, path))
        async with served(tiny_speech_model(scratch / "speech"), scratch / "cache") as client:
            options = {"files": {"file": ("a.wav", _silence())}}
            await asked(client, "/v1/audio/transcriptions", **options)
            yield "a transcription", await trace.follow(asked(client, "/v1/audio/transcriptions", **options))


def _silence() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, [0.0] * 16_000, 16_000, format="WAV")
    return file.getvalue()


async def main() -> None:
    """Print both tables."""
    package = Path(shuteye.__file__).parent
    print(f"{package}\n")
    for name, value in sizes(package):
        print(f"{name:<40} {value}")
    print()
    async for name, value in travels(package):
        print(f"{name:<20} {value}")


if __name__ == "__main__":
    asyncio.run(main())
