#!/usr/bin/env bash
# The paper's method at the paper's scale, with real models: captions, edits in words, pairs, filter, training.
# Usage: [what recipes/synth.sh takes] [RECIPE=…] [GPUS=8] recipes/paper.sh OUTPUT
# The data come first (recipes/synth.sh, into OUTPUT; RAY=… spreads them), the editor is OUTPUT/editor.
#
# Or train on data that are there, on one machine or several: the same line on each of them, RANK apart.
# Usage: [RECIPE=recipes/code.yaml] [MACHINES=4 RANK=0 HEAD=10.0.0.1 [PORT=29500]] [GPUS=8] \
#            recipes/paper.sh DATA OUTPUT [flags of ip2p train]
# DATA, OUTPUT and the cache (--cache, by default ~/.cache/ip2p) lie on a disk that all machines share.
#
# Killed or stopped, the same line goes on: the data with the parts that are missing, training from the newest
# checkpoint.
set -eu
machines=${MACHINES:-1}
case ${1-} in
"" | -*)
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
case ${2-} in
"" | -*)
    if [ "$machines" -gt 1 ]; then
        echo "paper.sh: the data are made by one machine (RAY=… spreads them); with MACHINES=$machines name them:" \
            "recipes/paper.sh $1/kept $1/editor" >&2
        exit 2
    fi
    "$(dirname "$0")/synth.sh" "$1"
    data=$1/kept
    output=$1/editor
    shift
    ;;
*)
    data=$1
    output=$2
    shift 2
    ;;
esac
recipe=${RECIPE:-$(dirname "$0")/paper.yaml}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$gpus" -ge 1 ] || gpus=1
places=()
if [ "$machines" -gt 1 ]; then
    places=(--machine_rank "${RANK:?which machine is this: RANK=0 … $((machines - 1))}"
        --main_process_ip "${HEAD:?the address of machine 0: HEAD=10.0.0.1}"
        --main_process_port "${PORT:-29500}")
fi
[ $((machines * gpus)) -gt 1 ] && places+=(--multi_gpu)
# Given by the flags above; an accelerate config of this machine's user would come between.
exec accelerate launch --num_machines "$machines" --num_processes $((machines * gpus)) --mixed_precision no \
    --dynamo_backend no "${places[@]}" \
    -m ip2p train --config "$recipe" --data "$data" --output "$output" "$@"
