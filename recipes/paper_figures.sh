#!/usr/bin/env bash
# Draw figures 8 and 10 of the paper on storybook pages, where the exact answers are known, on a CPU (docs/paper.md).
# Figure 8: the bundled editor and SDEdit over the image scale. Figure 10: editors trained on 1%, 10% and 100% of the
# filtered data, and on unfiltered data. Both are also drawn against exact success.
# Usage: [EDITS=100] [CAPTIONS=200] [TRAIN_STEPS=400] … recipes/paper_figures.sh [OUTPUT]
# After an interruption, the same command resumes. The defaults take about an hour on 2 cores; TRAIN_MINUTES limits each
# training.
set -eu

EDITS=${EDITS:-100}             # test edits per curve; the paper: 2,000
STEPS=${STEPS:-10}              # sampling steps; the paper: 100
TEXT_CFG=${TEXT_CFG:-3}
SWEEP=${SWEEP:-image_cfg=1.0:2.2:0.3}
CAPTIONS=${CAPTIONS:-200}       # captions for the training data
TRAIN_STEPS=${TRAIN_STEPS:-400} # steps of each of the four trainings
TRAIN_MINUTES=${TRAIN_MINUTES:-25}
BATCH=${BATCH:-16}
LR=${LR:-1e-4}

cd "$(dirname "$0")/.."
out=${1:-runs/paper-figures}
python=${PYTHON:-.venv/bin/python}
ip2p() { "$python" -m ip2p "$@"; }
mkdir -p "$out"

# 1. Figure 8: the editor and SDEdit on the same base.
ip2p evaluate storybook --model storybook --count "$EDITS" --steps "$STEPS" --text-cfg "$TEXT_CFG" --sweep "$SWEEP" --baseline sdedit \
    -o "$out/figure-8"

# 2. Training data by the paper's method. All pairs are kept and filtered afterwards.
ip2p storybook draw --count "$CAPTIONS" --seed 1 --captions "$out/captions.txt" --overwrite
ip2p synth instruct "$out/captions.txt" -o "$out/triples.parquet"
ip2p synth pairs "$out/triples.parquet" -o "$out/pairs" --keep all
ip2p synth filter "$out/pairs" -o "$out/filtered"

# 3. The base draws from captions without an input image: the bundled model without its image channels.
[ -f "$out/base/model_index.json" ] || "$python" - "$out/base" <<'PYTHON'
import shutil, sys
from diffusers import UNet2DConditionModel
from ip2p.models.bundle import find_model
packaged = find_model("storybook")
shutil.copytree(packaged, sys.argv[1], ignore=shutil.ignore_patterns("model_index.json", "ip2p.json", "lm"))
unet = UNet2DConditionModel.from_pretrained(packaged / "unet")
half = unet.config.in_channels // 2
small = UNet2DConditionModel.from_config({**unet.config, "in_channels": half})
weights = unet.state_dict()
small.load_state_dict({**weights, "conv_in.weight": weights["conv_in.weight"][:, :half]})
small.save_pretrained(f"{sys.argv[1]}/unet")
shutil.copy(packaged / "model_index.json", sys.argv[1])  # last, because it marks the folder as complete
PYTHON

# 4. Figure 10: the same number of steps on 1%, 10% and 100% of the filtered pairs, and on unfiltered ones.
rows() { "$python" -c "import sys; from ip2p.data.loading import open_source; print(len(open_source(sys.argv[1])))" "$1"; }
kept=$(rows "$out/filtered")
models=()
for share in 1 10 100 all; do
    data=$out/data-$share
    case $share in
        all) source=$out/pairs; count=$kept ;; # the same number of pairs, so that the filter is the only difference
        *) source=$out/filtered; count=$((kept * share / 100)) ;;
    esac
    [ "$count" -gt 2 ] || count=3
    ip2p data convert "$source" "$data" --to parquet --count "$count"
    ip2p train --data "$data" --base "$out/base" --output "$out/editor-$share" --steps "$TRAIN_STEPS" \
        --seconds $((TRAIN_MINUTES * 60)) --batch "$BATCH" --lr "$LR" --save-every 100 --validate-every 0 \
        --cache "$out/cache" --track none
    name="$share%"; [ "$share" = all ] && name=unfiltered
    models+=(--model "$name=$out/editor-$share")
done
ip2p evaluate storybook "${models[@]}" --count "$EDITS" --steps "$STEPS" --text-cfg "$TEXT_CFG" --sweep "$SWEEP" -o "$out/figure-10"
