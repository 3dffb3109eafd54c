#!/usr/bin/env bash
# Run the paper's method end to end on storybook pages with the bundled models, on a CPU: captions, text edits,
# image pairs, filter, training and the score.
# Usage: [COUNT=200] [STEPS=300] … recipes/storybook.sh [OUTPUT]
# After an interruption, the same command resumes and repeats no finished step. To change a number, use another
# OUTPUT; otherwise the step that uses it fails.
set -eu

COUNT=${COUNT:-200} # captions, one per page
SEED=${SEED:-1}     # seed of the captions
EDITS=${EDITS:-1}   # text edits per caption
BASE=${BASE:-storybook} # base model
STEPS=${STEPS:-300} # training steps
BATCH=${BATCH:-16}  # pairs per step
LR=${LR:-1e-4}      # learning rate
SCORED=${SCORED:-90} # number of edits in the score

cd "$(dirname "$0")/.."
out=${1:-runs/storybook-data}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

# The captions depend only on the seed, so they can be overwritten.
"$python" -m ip2p storybook draw --count "$COUNT" --seed "$SEED" --captions "$out/captions.txt" --overwrite

"$python" -m ip2p synth instruct "$out/captions.txt" -o "$out/triples.parquet" --edits "$EDITS"
# Keep all candidates, so that `inspect` can show what the filter rejects.
"$python" -m ip2p synth pairs "$out/triples.parquet" -o "$out/pairs" --keep all
"$python" -m ip2p synth filter "$out/pairs" -o "$out/kept"
"$python" -m ip2p synth inspect "$out/pairs" -o "$out/pairs.html" --overwrite

"$python" -m ip2p train --data "$out/kept" --base "$BASE" --output "$out/editor" --steps "$STEPS" \
    --batch "$BATCH" --lr "$LR" --save-every 50 --validate-every 0 --cache "$out/cache" --track none

"$python" -m ip2p storybook score --model "$out/editor" --count "$SCORED" --out "$out/score.json" \
    --sheet "$out/rows.png" --overwrite
