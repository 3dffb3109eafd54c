#!/usr/bin/env bash
# Run the paper's method at the paper's scale with full-size models: text edits, pairs, filter, training.
# Usage: [variables of recipes/synth.sh] [RECIPE=…] [GPUS=8] recipes/paper.sh OUTPUT
# Generates data in OUTPUT with recipes/synth.sh (RAY=… uses a cluster), then trains OUTPUT/editor.
#
# Or train on existing data, on one machine or several. Run the same command on each, with its own RANK.
# Usage: [RECIPE=recipes/code.yaml] [MACHINES=4 RANK=0 HEAD=10.0.0.1 [PORT=29500]] [GPUS=8] \
#            recipes/paper.sh DATA OUTPUT [flags of ip2p train]
# DATA, OUTPUT and the cache (--cache, by default ~/.cache/ip2p) must be on a disk that all machines share.
#
# After an interruption, run the same command again. It generates the missing shards and resumes training
# from the newest checkpoint.
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
        echo "paper.sh: one machine generates the data (RAY=… uses a cluster). With MACHINES=$machines, pass the data:" \
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
    places=(--machine_rank "${RANK:?set the rank of this machine: RANK=0 … $((machines - 1))}"
        --main_process_ip "${HEAD:?set the address of machine 0: HEAD=10.0.0.1}"
        --main_process_port "${PORT:-29500}")
fi
[ $((machines * gpus)) -gt 1 ] && places+=(--multi_gpu)
# Without these two flags, accelerate would use the user's own accelerate config.
exec accelerate launch --num_machines "$machines" --num_processes $((machines * gpus)) --mixed_precision no \
    --dynamo_backend no "${places[@]}" \
    -m ip2p train --config "$recipe" --data "$data" --output "$output" "$@"
