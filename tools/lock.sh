#!/usr/bin/env bash
# Renews requirements/lock.txt from the ranges in pyproject.toml: exact versions with hashes, for every Python that
# shuteye supports. Called by `make lock`, after which `make test` says whether the new versions can be kept.
# usage: tools/lock.sh PYTHON        PYTHON has the venv module; uv goes to build/lock. With UPGRADE= in the environment
#                                    only what pyproject.toml has new is added, and the rest stays at its versions.
set -euo pipefail
cd "$(dirname "$0")/.."

uv_version=0.13.9
directory=build/lock

if [[ "$("$directory/bin/uv" --version 2>/dev/null)" != "uv $uv_version "* ]]; then
    "$1" -m venv "$directory"
    "$directory/bin/python" -m pip install --quiet "uv==$uv_version"
fi

# PyTorch is left out: the hash of its CPU build differs from build to build, and requirements/torch.txt names it.
UV_CUSTOM_COMPILE_COMMAND='make lock' "$directory/bin/uv" pip compile pyproject.toml requirements/torch.txt \
    --config-file requirements/uv.toml --native-tls ${UPGRADE---upgrade} \
    --extra dev --universal --python-version 3.11 --generate-hashes --no-emit-package torch \
    --quiet --output-file requirements/lock.txt
git --no-pager diff --stat -- requirements/lock.txt
