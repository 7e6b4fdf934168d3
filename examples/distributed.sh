#!/usr/bin/env bash
# Prune a model and train it on several processes, each with its own part of every batch.
#
#     bash examples/distributed.sh MODEL OUTPUT [flags of prune_and_recover.py]
#
# PROCESSES sets their number, by default one per GPU. Further words for `accelerate launch`, such as the address of
# another machine, go into ACCELERATE_FLAGS.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash examples/distributed.sh MODEL OUTPUT [flags of prune_and_recover.py]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
flags=(--num_processes "$processes" --num_machines 1 --mixed_precision no --dynamo_backend no)
if [ "$gpus" -eq 0 ]; then
    export ACCELERATE_USE_CPU=true
fi
# The name of this flag stands for several processes, on CPUs too: `--cpu` would start only one.
if [ "$processes" -gt 1 ]; then
    flags+=(--multi_gpu)
fi

# shellcheck disable=SC2086  # ACCELERATE_FLAGS holds several words
exec accelerate launch "${flags[@]}" ${ACCELERATE_FLAGS:-} "$here/prune_and_recover.py" "$@"
