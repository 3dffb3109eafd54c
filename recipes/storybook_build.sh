#!/usr/bin/env bash
# Train the storybook models on a CPU, in several runs. The same command resumes.
# Usage: recipes/storybook_build.sh [OUTPUT [SECONDS]]
# To train the editor longer, run ip2p storybook build --preset cpu -o OUTPUT --stage unet --minutes 300, then this.
set -eu
cd "$(dirname "$0")/.."
out=${1:-runs/storybook-cpu}
python=${PYTHON:-.venv/bin/python}
seconds=${2:-}
"$python" -m ip2p storybook build --preset cpu -o "$out" ${seconds:+--seconds "$seconds"}
# A run may end before there is a model.
if [ -z "$seconds" ] || [ -f "$out/bundle/model_index.json" ]; then
    "$python" -m ip2p storybook score --model "$out/bundle" --count 500 --out "$out/score.json" \
        --sheet "$out/rows.png" --overwrite
fi
