#!/usr/bin/env bash
# Creates environments for clients too heavy for .venv, of Python and of node. Called by `make test-clients`.
# usage: tools/clients.sh VENV DIRECTORY      VENV is the project's; DIRECTORY gets one environment per client.
set -euo pipefail

# Pinned, so that a new release of theirs cannot break a build of ours. litellm is older than it could be on purpose:
# 1.82.7 and 1.82.8 (March 2026) were malicious, and so, later, was 1.107.0; 1.82.6 is the release known to be clean.
litellm=('litellm[proxy]==1.82.6' 'openai<3')
anthropic=('anthropic==2.15.0')
openai_agents=('openai-agents==0.24.0')
langchain=('langchain-openai==1.7.4' 'langchain-core==1.8.3')
pydantic_ai=('pydantic-ai-slim[openai]==2.68.0')
instructor=('instructor==1.17.0')
npm=('openai@6.49.0' 'ai@6.0.326' '@ai-sdk/openai@3.0.141')
lm_eval=('lm-eval[api]==0.4.13' 'peft')
guidellm=('guidellm==0.8.1')

project=$(cd "$1" && pwd)
mkdir -p "$2"
directory=$(cd "$2" && pwd)

# environment NAME: an empty one, unless what it is made from has not changed since it was made.
environment() {
    local name=$1 wanted=$2
    if [[ "$(cat "$directory/$name/.made-from" 2>/dev/null)" == "$wanted" ]]; then return 1; fi
    rm -rf "${directory:?}/$name"
    "$project/bin/python" -m venv "$directory/$name"
}

install() {
    local name=$1
    shift
    "$directory/$name/bin/python" -m pip install --quiet "$@"
    echo "$*" > "$directory/$name/.made-from"
    echo "Set up $name in $directory/$name."
}

if environment anthropic "${anthropic[*]}"; then
    install anthropic "${anthropic[@]}"
fi

if environment litellm "${litellm[*]}"; then
    install litellm "${litellm[@]}"
fi

# These need torch and transformers: those of the project are used, and no second torch is installed.
purelib() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
for client in lm-eval guidellm; do
    declare -n wanted=${client//-/_}
    if environment "$client" "${wanted[*]}"; then
        purelib "$project" > "$(purelib "$directory/$client")/project.pth"
        install "$client" "${wanted[@]}"
    fi
done

for client in openai-agents langchain pydantic-ai instructor; do
    declare -n wanted=${client//-/_}
    if environment "$client" "${wanted[*]}"; then
        install "$client" "${wanted[@]}"
    fi
done

if [[ "$(cat "$directory/npm/.made-from" 2>/dev/null)" != "${npm[*]}" ]]; then
    rm -rf "$directory/npm"
    mkdir "$directory/npm"
    (cd "$directory/npm" && npm init --yes > /dev/null && npm install --silent --no-audit --no-fund "${npm[@]}")
    echo "${npm[*]}" > "$directory/npm/.made-from"
    echo "Set up npm in $directory/npm."
fi
