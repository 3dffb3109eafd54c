#!/usr/bin/env bash
# Train the storybook models on a CPU: at most 150 minutes on 2 cores. The same call goes on from where it
# stopped. Usage: recipes/storybook_build.sh [OUTPUT]
set -eu
cd "$(dirname "$0")/.."
out=${1:-runs/storybook-cpu}
python=${PYTHON:-.venv/bin/python}
"$python" -m ip2p storybook build --preset cpu -o "$out"
"$python" -m ip2p storybook score --model "$out/bundle" --count 500 --out "$out/score.json" \
    --sheet "$out/rows.png" --overwrite
