#!/usr/bin/env bash
# Train on several processes, each with its own part of every batch.
#
#     bash examples/distributed.sh MODEL OUTPUT [flags of prune_and_recover.py]
#     bash examples/distributed.sh sft PRUNED OUTPUT --teacher DENSE [flags of recover_sft.py]
#
# The first form prunes a model and recovers it; every process holds both models. The second form recovers a pruned
# model, also under FSDP2 or DeepSpeed ZeRO-3: CONFIG names a file for `accelerate launch`, see
# docs/recovery_many_gpus.md.
#
# PROCESSES sets the number of processes, by default one per GPU. Further words for `accelerate launch`, such as the
# address of another machine, go into ACCELERATE_FLAGS.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash examples/distributed.sh MODEL OUTPUT [flags of prune_and_recover.py]" >&2
    echo "       bash examples/distributed.sh sft PRUNED OUTPUT --teacher DENSE [flags of recover_sft.py]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=prune_and_recover.py
if [ "$1" = sft ]; then
    script=recover_sft.py
    shift
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
flags=(--num_processes "$processes")
if [ "$gpus" -eq 0 ]; then
    export ACCELERATE_USE_CPU=true
fi
if [ -n "${CONFIG:-}" ]; then
    flags+=(--config_file "$CONFIG")
else
    flags+=(--num_machines 1 --mixed_precision no --dynamo_backend no)
    # The name of this flag stands for several processes, on CPUs too: `--cpu` would start only one.
    if [ "$processes" -gt 1 ]; then
        flags+=(--multi_gpu)
    fi
fi

# shellcheck disable=SC2086  # ACCELERATE_FLAGS holds several words
exec accelerate launch "${flags[@]}" ${ACCELERATE_FLAGS:-} "$here/$script" "$@"
