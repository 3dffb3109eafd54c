#!/usr/bin/env bash
# Train with a recipe on one machine or several: the same line on each of them, RANK apart.
# Usage: [RECIPE=recipes/code.yaml] [MACHINES=4 RANK=0 HEAD=10.0.0.1 [PORT=29500]] [GPUS=8] \
#            recipes/paper.sh DATA OUTPUT [flags of ip2p train]
# DATA, OUTPUT and the cache (--cache, by default ~/.cache/ip2p) lie on a disk that all machines share.
# Killed or stopped, the same line goes on from the newest checkpoint.
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
data=$1
output=$2
shift 2
recipe=${RECIPE:-$(dirname "$0")/paper.yaml}
machines=${MACHINES:-1}
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
