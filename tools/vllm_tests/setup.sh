#!/usr/bin/env bash
# Unpacks the sources and tests of one vLLM release, and creates an environment that they can be imported in: no torch
# of its own, no CUDA, nothing of vLLM compiled. Called by `make test-vllm`.
# usage: tools/vllm_tests/setup.sh VENV DIRECTORY      VENV is the project's; DIRECTORY gets everything.
set -euo pipefail

version=0.33.0
# What importing the tests and the protocol classes that they use needs, beside what the project has.
packages=(regex cachetools psutil blake3 py-cpuinfo aiohttp tiktoken partial-json-parser jsonschema pybase64 cbor2 ijson
    setproctitle anthropic tblib cloudpickle requests httpx pytest-asyncio prometheus-fastapi-instrumentator einops
    python-json-logger watchfiles mcp pillow soundfile model-hosting-container-standards gguf orjson oss-harmony)
# These would bring a torch, or a numpy, of their own.
without_dependencies=(mistral_common pydantic_extra_types pycountry xgrammar apache-tvm-ffi compressed-tensors depyf loguru)
# What vLLM's own build asks for, but for a torch of two gigabytes: pip has metadata made even of what it only downloads.
build=('setuptools>=77.0.3,<81' setuptools-scm setuptools-rust wheel packaging jinja2 cmake ninja)

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$1" && pwd)
mkdir -p "$2"
directory=$(cd "$2" && pwd)

purelib() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

made_from="$version ${packages[*]} ${without_dependencies[*]} ${build[*]}"
if [[ "$(cat "$directory/venv/.made-from" 2>/dev/null)" != "$made_from" ]]; then
    rm -rf "$directory/venv"
    "$project/bin/python" -m venv "$directory/venv"
fi
purelib "$project" > "$(purelib "$directory/venv")/project.pth" # each time: the project's may be another than last time
if [[ ! -e "$directory/venv/.made-from" ]]; then
    "$directory/venv/bin/python" -m pip install --quiet "${packages[@]}"
    "$directory/venv/bin/python" -m pip install --quiet --no-deps "${without_dependencies[@]}"
    "$directory/venv/bin/python" -m pip install --quiet "${build[@]}"
    echo "$made_from" > "$directory/venv/.made-from"
fi

archive="$directory/vllm-$version.tar.gz"
if [[ ! -e "$archive" ]]; then
    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version \
        "$directory/venv/bin/python" -m pip download --quiet --no-deps --no-build-isolation \
        --no-binary vllm --dest "$directory" "vllm==$version"
fi
rm -rf "$directory/tree"
mkdir "$directory/tree"
tar --extract --file "$archive" --directory "$directory/tree" --strip-components 1 \
    "vllm-$version/vllm" "vllm-$version/tests" "vllm-$version/examples"
cp -r "$here/overlay/." "$directory/tree/"
