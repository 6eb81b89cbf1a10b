#!/usr/bin/env bash
# Creates the virtual environment and installs shuteye into it with what its tests need. Called by `make`.
# usage: tools/setup.sh VENV STAMP        from requirements/lock.txt; STAMP is written last: what broke off is done again
#        tools/setup.sh --latest VENV     the newest versions that pyproject.toml allows
set -euo pipefail

latest=''
if [[ $1 == --latest ]]; then
    latest=yes
    shift
fi
venv=$1
stamp=${2-}
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

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

# PyPI's PyTorch for Linux on x86 brings gigabytes of CUDA libraries. PyTorch's own index has the CPU build, and is
# asked for that one package only, if there is no NVIDIA device, pip was not told where packages come from, and the
# index answers at once. If not, pip goes on with what it sees: a CPU build found there (PIP_FIND_LINKS) still wins.
torch_sources() {
    local told
    if [[ -e /proc/driver/nvidia/version ]]; then return; fi
    told=$(pip config list) # whole, then searched: a reader that stops early would break pip's pipe
    if [[ $told =~ (index-url|find-links|no-index)= ]]; then return; fi
    if "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$torch_index/torch/', timeout=5).close()" 2>/dev/null; then
        echo "--extra-index-url=$torch_index"
    fi
}

# install TOTAL ARGUMENT…: pip, whose output becomes one line of progress
install() {
    local total=$1
    shift
    pip install --progress-bar off "$@" | "$venv/bin/python" tools/pip_progress.py "$total"
}

cd "$(dirname "$0")/.."
mkdir -p "$venv"
exec 9>"$venv/.set-up.lock"
if ! flock --nonblock 9; then
    echo "Another set-up of $venv is running; waiting for it."
    flock 9
fi
if [[ -n $stamp && -e $stamp ]]; then exit 0; fi

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "Setting up $venv with $("$python" --version) …"
    "$python" -m venv "$venv"
fi
mapfile -t sources < <(torch_sources)
total=$(grep -c '==' requirements/lock.txt)
if [[ -n $latest ]]; then
    echo "[1/2] The newest versions that pyproject.toml allows"
    install "$total" --upgrade --upgrade-strategy eager "${sources[@]}" -r requirements/torch.txt --editable '.[dev]'
    pip list --format freeze > "$venv/versions.txt"
    echo "Set up in $venv; what was installed stands in $venv/versions.txt."
    exit 0
fi
echo "[1/3] $total packages of requirements/lock.txt"
install "$total" --no-deps --require-hashes -r requirements/lock.txt
echo "[2/3] PyTorch: its CPU build has 190 MB"
pip install "${sources[@]}" -r requirements/torch.txt
echo "[3/3] shuteye, whose native kernels are compiled"
pip install --quiet --no-deps --no-build-isolation --editable .
rm -f "$venv"/.set-up-*
touch "$stamp"
echo "Set up in $venv."
