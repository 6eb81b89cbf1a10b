#!/usr/bin/env bash
# Creates the virtual environment and installs shuteye into it with what its tests need. Called by `make`.
# usage: tools/setup.sh VENV STAMP        STAMP is written last: an interrupted set-up is done again.
set -euo pipefail

venv=$1
stamp=$2
here=$(cd "$(dirname "$0")/.." && pwd)
torch_index=https://download.pytorch.org/whl/cpu

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "shuteye needs Python 3.11 or newer with the venv module; ${PYTHON:-python3} is not that." >&2
    echo "Install it (on Debian and Ubuntu: python3 python3-venv), or name one: make PYTHON=/path/to/python3" >&2
    return 1
}

# PyPI's PyTorch for Linux on x86 brings gigabytes of CUDA libraries. PyTorch's own index has the CPU build, and is
# asked for that one package only, if there is no NVIDIA device, pip was not told where packages come from, and the
# index answers at once. If not, pip goes on with what it sees: a CPU build found there (PIP_FIND_LINKS) still wins.
torch_sources() {
    if [[ -e /proc/driver/nvidia/version ]]; then return; fi
    if "$venv/bin/python" -m pip config list | grep -qE '(index-url|find-links|no-index)='; then return; fi
    if "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$torch_index/torch/', timeout=5).close()" 2>/dev/null; then
        echo "--extra-index-url=$torch_index"
    fi
}

cd "$here"
mkdir -p "$venv"
exec 9>"$venv/.set-up.lock"
if ! flock --nonblock 9; then
    echo "Another set-up of $venv is running; waiting for it."
    flock 9
fi
if [[ -e $stamp ]]; then exit 0; fi

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "Setting up $venv with $("$python" --version) …"
    "$python" -m venv "$venv"
fi
mapfile -t sources < <(torch_sources)
"$venv/bin/python" -m pip install --quiet "${sources[@]}" -r requirements/torch.txt
"$venv/bin/python" -m pip install --quiet --editable '.[dev]'
rm -f "$venv"/.set-up-*
touch "$stamp"
echo "Set up in $venv."
