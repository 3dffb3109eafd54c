#!/usr/bin/env bash
# Generate training data at the paper's scale with full-size models: captions, text edits, pairs, filter.
# To train on it: recipes/paper.sh OUTPUT/kept EDITOR. recipes/paper.sh OUTPUT does both.
# Usage: [SERVER=http://…/v1 MODEL=NAME] [RAY=HEAD:6379] [COUNT=454445] [AS_PAPER=1] recipes/synth.sh OUTPUT
# OUTPUT is on a local disk of the machine that runs this script; workers do not write files (docs/synth.md).
# After an interruption, run the same command again. Each step continues with the missing shards.
#
# The comments give the cost of each step. "Paper" marks figures of the paper and its released data;
# "estimated" marks figures based on the measured time of one UNet evaluation. This script has not been run as a whole.
set -eu

# LAION-Aesthetics 6.5+, the paper's captions: a table of texts and URLs. No images are downloaded.
CAPTIONS=${CAPTIONS:-ChristophSchuhmann/improved_aesthetics_6.5plus}
COUNT=${COUNT:-454445} # the paper's number of triples; 451,990 remained after its content check
SEED=${SEED:-0}        # seed of the caption sample
LM=${LM:-Qwen/Qwen2.5-7B} # fine-tuned on the seed triples; the paper fine-tuned GPT-3 Davinci for one epoch
SERVER=${SERVER:-}     # use an OpenAI-compatible server instead of fine-tuning, …
MODEL=${MODEL:-}       # … and its name for the model
WAY=${WAY:-chat}       # chat for a general model, completion for a fine-tuned one
RAY=${RAY:-}           # address of a Ray cluster; empty: only this machine
# The paper's text-to-image model, autoencoder and CLIP.
PAINTER=${PAINTER:-stable-diffusion-v1-5/stable-diffusion-v1-5}
VAE=${VAE:-stabilityai/sd-vae-ft-mse}
CLIP=${CLIP:-openai/clip-vit-large-patch14}
AS_PAPER=${AS_PAPER:-} # 1: no shortcuts

if [ $# -ne 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1
mkdir -p "$out"
ray=()
[ -z "$RAY" ] || ray=(--ray "$RAY")

# 1. Text edits: one per caption, with temperature 0.7, frequency penalty 0.1 and up to 256 tokens, as in the paper.
#    The paper used a paid API. With a server, ip2p counts the tokens, and with --price the cost; a local model costs
#    GPU time.
if [ -n "$SERVER" ]; then
    ip2p synth instruct "$CAPTIONS" -o "$out/triples.parquet" --sample "$COUNT" --seed "$SEED" \
        --server "$SERVER" --model "${MODEL:?set the name of the model on the server: MODEL=NAME}" --way "$WAY" \
        --together 64
else
    [ -f "$out/lm/config.json" ] || ip2p synth tune-lm --base "$LM" -o "$out/lm" --lora 16 --epochs 1
    ip2p synth instruct "$CAPTIONS" -o "$out/triples.parquet" --sample "$COUNT" --seed "$SEED" \
        --model "$out/lm" --batch 64 "${ray[@]}"
fi

# 2. Pairs at 512 pixels. Paper: 100 candidates with 100 steps each, which takes 40,000 UNet evaluations per edit with
#    guidance and two images. Estimated: 24 evaluations of SD 1.5 take 77.6 ms on one H100 (fp16, eager), so this is
#    129 s per edit and 16,300 GPU hours in total. By default, up to 32 candidates are drawn with 20 steps each, and
#    hopeless edits are abandoned: at most 2,560 evaluations, 8.3 s per edit, 1,045 GPU hours.
#    Disk space: the released dataset of 313,010 edits has 436 GB as JPEG. Images here are PNG, so plan for more.
how=()
[ -z "$AS_PAPER" ] || how=(--as-paper)
ip2p synth pairs "$out/triples.parquet" -o "$out/pairs" --model "$PAINTER" --vae "$VAE" --clip "$CLIP" \
    --size 512 --preset paper "${how[@]}" "${ray[@]}"

# 3. Keep the best four pairs of each edit by directional similarity, without near duplicates. The table already has
#    the scores, so no network runs. Paper: image 0.75, captions 0.2, directional 0.2 (its code: image 0.70,
#    --preset code); 313,010 of 451,990 edits kept a pair.
ip2p synth filter "$out/pairs" -o "$out/kept" --preset paper --top 4
ip2p synth inspect "$out/kept" -o "$out/kept.html" --count 20000 --overwrite
echo "train on it: recipes/paper.sh $out/kept EDITOR" >&2
