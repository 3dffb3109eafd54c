#!/usr/bin/env bash
# The paper's training data at the paper's scale, with real models: captions, edits in words, pairs, filter.
# Then train on them: recipes/paper.sh OUTPUT/kept EDITOR; recipes/paper.sh OUTPUT does both.
# Usage: [SERVER=http://…/v1 MODEL=NAME] [RAY=HEAD:6379] [COUNT=454445] [AS_PAPER=1] recipes/synth.sh OUTPUT
# OUTPUT lies on a disk of the machine that runs this; the workers write nothing (docs/synth.md).
# Killed or stopped, the same line goes on: each step with the parts that are missing.
#
# What each step costs. Figures of the paper and of its released data are marked so; those that were computed
# from a measured pass of a network say so; nothing here has been run as a whole.
set -eu

# LAION-Aesthetics 6.5+, the paper's captions: a table of texts and addresses, no pictures are fetched.
CAPTIONS=${CAPTIONS:-ChristophSchuhmann/improved_aesthetics_6.5plus}
COUNT=${COUNT:-454445} # the paper's triples; 451,990 were left after its check of contents
SEED=${SEED:-0}        # draws the captions
LM=${LM:-Qwen/Qwen2.5-7B} # tuned on the seed triples; the paper tuned GPT-3 Davinci, for one epoch
SERVER=${SERVER:-}     # instead of tuning: a server in OpenAI's protocol, …
MODEL=${MODEL:-}       # … and what it calls its model
WAY=${WAY:-chat}       # how it is asked: chat for a general model, completion for a tuned one
RAY=${RAY:-}           # a cluster's address; empty: this machine alone
# The paper's painter, autoencoder and judge.
PAINTER=${PAINTER:-stable-diffusion-v1-5/stable-diffusion-v1-5}
VAE=${VAE:-stabilityai/sd-vae-ft-mse}
CLIP=${CLIP:-openai/clip-vit-large-patch14}
AS_PAPER=${AS_PAPER:-} # 1: none of the savings

if [ $# -ne 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1
mkdir -p "$out"
ray=()
[ -z "$RAY" ] || ray=(--ray "$RAY")

# 1. Edits in words: one a caption, sampled at 0.7 with frequency penalty 0.1, up to 256 tokens, as the paper's.
#    Paper: calls of a paid interface. Here the tokens are counted, and with --price the cost; a model of your own
#    costs the time of its GPU.
if [ -n "$SERVER" ]; then
    ip2p synth instruct "$CAPTIONS" -o "$out/triples.parquet" --sample "$COUNT" --seed "$SEED" \
        --server "$SERVER" --model "${MODEL:?what the server calls its model: MODEL=NAME}" --way "$WAY" \
        --together 64
else
    [ -f "$out/lm/config.json" ] || ip2p synth tune-lm --base "$LM" -o "$out/lm" --lora 16 --epochs 1
    ip2p synth instruct "$CAPTIONS" -o "$out/triples.parquet" --sample "$COUNT" --seed "$SEED" \
        --model "$out/lm" --batch 64 "${ray[@]}"
fi

# 2. Pairs, at 512 pixels. The paper's way draws 100 candidates of 100 steps: with guidance and two pictures
#    40,000 passes of the network an edit. Computed: 24 passes of SD 1.5 take 77.6 ms on one H100 (fp16, eager),
#    so that is 129 s an edit, and 16,300 GPU hours for all. By default there are rounds of 20 steps, up to 32
#    candidates, and hopeless edits are given up: at most 2,560 passes, 8.3 s, 1,045 GPU hours.
#    The disk: the released set of 313,010 edits has 436 GB as JPEG; here pictures are PNG, so plan for more.
how=()
[ -z "$AS_PAPER" ] || how=(--as-paper)
ip2p synth pairs "$out/triples.parquet" -o "$out/pairs" --model "$PAINTER" --vae "$VAE" --clip "$CLIP" \
    --size 512 --preset paper "${how[@]}" "${ray[@]}"

# 3. The best four of each edit by the directional similarity, near-duplicates out. The scores lie in the table,
#    so that no network runs; the time is that of copying. Paper: image 0.75, captions 0.2, directional 0.2
#    (its code: image 0.70, --preset code); 313,010 of 451,990 edits kept a pair.
ip2p synth filter "$out/pairs" -o "$out/kept" --preset paper --top 4
ip2p synth inspect "$out/kept" -o "$out/kept.html" --count 20000 --overwrite
echo "train on it: recipes/paper.sh $out/kept EDITOR" >&2
