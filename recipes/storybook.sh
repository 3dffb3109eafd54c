#!/usr/bin/env bash
# The paper's method from end to end on drawn pages, with the models in the package, on a CPU: captions, edits
# in words, pairs of pictures, a filter, an editor trained on what stays, its score.
# Usage: [COUNT=200] [STEPS=300] … recipes/storybook.sh [OUTPUT]
# Killed or stopped, the same line goes on: each step with what lies in OUTPUT, and none is done twice. Another
# number is refused by the step that it concerns; name another OUTPUT for it.
set -eu

COUNT=${COUNT:-200} # captions, each of another page
SEED=${SEED:-1}     # draws them
EDITS=${EDITS:-1}   # edits in words of a caption
BASE=${BASE:-storybook} # the model that is trained
STEPS=${STEPS:-300} # of training
BATCH=${BATCH:-16}  # pairs a step
LR=${LR:-1e-4}      # learning rate
SCORED=${SCORED:-90} # edits with known answers by which the editor is scored

cd "$(dirname "$0")/.."
out=${1:-runs/storybook-data}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

# The captions follow from the seed, so that they are written anew without harm.
"$python" -m ip2p storybook draw --count "$COUNT" --seed "$SEED" --captions "$out/captions.txt" --overwrite

"$python" -m ip2p synth instruct "$out/captions.txt" -o "$out/triples.parquet" --edits "$EDITS"
# All that was drawn is kept, so that the page can show what the filter refuses.
"$python" -m ip2p synth pairs "$out/triples.parquet" -o "$out/pairs" --keep all
"$python" -m ip2p synth filter "$out/pairs" -o "$out/kept"
"$python" -m ip2p synth inspect "$out/pairs" -o "$out/pairs.html" --overwrite

"$python" -m ip2p train --data "$out/kept" --base "$BASE" --output "$out/editor" --steps "$STEPS" \
    --batch "$BATCH" --lr "$LR" --save-every 50 --validate-every 0 --cache "$out/cache" --track none

"$python" -m ip2p storybook score --model "$out/editor" --count "$SCORED" --out "$out/score.json" \
    --sheet "$out/rows.png" --overwrite
