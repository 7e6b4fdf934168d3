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
# PROCESSES sets the number of processes on each machine, by default one per GPU. Further words for `accelerate launch`
# go into ACCELERATE_FLAGS. Under Slurm, `srun --ntasks-per-node 1 bash examples/distributed.sh ...` uses all nodes.
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

machines=1
flags=()
# srun starts the script once on each node.
if [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
    machines=$SLURM_STEP_NUM_NODES
    first_node=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    flags+=(--machine_rank "$SLURM_NODEID" --main_process_ip "$first_node" --main_process_port "${PORT:-29500}")
fi
processes=$((processes * machines))
flags+=(--num_machines "$machines" --num_processes "$processes")

if [ "$gpus" -eq 0 ]; then
    export ACCELERATE_USE_CPU=true
fi
if [ -n "${CONFIG:-}" ]; then
    flags+=(--config_file "$CONFIG")
else
    flags+=(--mixed_precision no --dynamo_backend no)
    # The name of this flag stands for several processes, on CPUs too: `--cpu` would start only one.
    if [ "$processes" -gt 1 ]; then
        flags+=(--multi_gpu)
    fi
fi

# shellcheck disable=SC2086  # ACCELERATE_FLAGS holds several words
exec accelerate launch "${flags[@]}" ${ACCELERATE_FLAGS:-} "$here/$script" "$@"
