#!/usr/bin/env bash
# Creates a virtual environment with Ray, which sees all that the project's has. Called by `make test-ray`.
# usage: tools/ray.sh VENV DIRECTORY      VENV is the project's; DIRECTORY becomes the new one.
set -euo pipefail

# Pinned, so that a new release cannot break a build of ours. pyproject.toml says what users may have.
ray=('ray[default,serve]==2.60.0')

project=$(cd "$1" && pwd)
directory=$2
wanted="${ray[*]} beside $project, with its .pth files"

if [[ "$(cat "$directory/.made-from" 2>/dev/null)" == "$wanted" ]]; then exit; fi
rm -rf "${directory:?}"
"$project/bin/python" -m venv "$directory"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
# What the project has is used as it is: no second torch, and no other version of what both need.
echo "import site; site.addsitedir('$("$project/bin/python" -c "$purelib")')" \
  > "$("$directory/bin/python" -c "$purelib")/project.pth"  # its own .pth files are read, too: shuteye is one
"$directory/bin/python" -m pip install --quiet "${ray[@]}"
echo "$wanted" > "$directory/.made-from"
echo "Set up Ray in $directory."
