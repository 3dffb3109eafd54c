#!/usr/bin/env bash
# Train the storybook models on one GPU, in runs with a time limit. Needs no network.
# Starts or resumes the build in runs/storybook-h100, and writes the newest weights (shards under 16 MiB
# in one flat folder) and a contact sheet to OUTDIR.
# To reuse a trained autoencoder and text encoder, copy the folder of their build there first.
# Usage: recipes/storybook_gpu.sh SECONDS OUTDIR [PRESET [STEPS]]
set -eu
seconds=$1
outdir=$2
preset=${3:-h100}
steps=${4:-}
started=$(date +%s)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
state=runs/storybook-$preset
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Install missing packages from wheels in .whl, if there are any.
if [ -d .whl ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target /tmp/ip2p-site .whl/*.whl
    export PYTHONPATH="$PYTHONPATH:/tmp/ip2p-site"
fi
mkdir -p "$outdir"
# Reserve the last 75 seconds for writing the weights and drawing the sheet.
left=$((seconds - ($(date +%s) - started) - 75))
"$python" -m ip2p storybook build --preset "$preset" -o "$state" --seconds "$left" ${steps:+--steps "$steps"} \
    2>&1 | tee -a "$outdir/log.txt"
if [ -f "$state/bundle/model_index.json" ]; then
    timeout 50 "$python" -m ip2p storybook score --model "$state/bundle" --count 48 --out "$outdir/score.json" \
        --sheet "$outdir/rows.png" --overwrite --batch-size 48 2>&1 | tee -a "$outdir/log.txt" || true
    # Write few files: the shards as they are, the rest as one small archive.
    for file in "$state"/bundle/*/*.safetensors; do
        cp "$file" "$outdir/$(basename "$(dirname "$file")")--$(basename "$file")"
    done
    mv "$outdir/log.txt" "$outdir/score.json" "$state/bundle/" 2>/dev/null || true
    tar -C "$state" --exclude='*.safetensors' -czf "$outdir/bundle.tar.gz" bundle
fi
ls -l "$outdir"
