"""Several processes train one model: their checkpoints say which training they belong to."""

import pytest
from helpers import on_two_ranks

from optimum_structprune.recovery.identity import IDENTITY_NAME


# The checkpoints of a training, the same one resumed, and another one that must not take them up.
SCRIPT = """
import os, sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import logits, recovery_config
from models import build, config, tokenizer

from optimum_structprune import StructPruneError, prune_model, recover
from optimum_structprune.recovery.identity import weights_hash

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
pruned = prune_model(build("llama-tied"), config(), tokenizer())


def trained(resume, **training):
    training = {"output_dir": str(folder), "save_steps": 2, "save_total_limit": 9, **training}
    return recover(deepcopy(pruned), tokenizer(), recovery_config(tokens=288, training=training), resume=resume)


expected = logits(trained(False))
dist.barrier()  # the first process may still be writing
print(f"rank {rank} saw", sorted(path.name for path in folder.iterdir()), flush=True)
dist.barrier()
if rank == 0:
    # What a kill while the last checkpoint is written leaves.
    last = max(folder.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    (last / "trainer_state.json").write_text("{")
dist.barrier()
torch.testing.assert_close(logits(trained(True)), expected)
try:
    trained(True, learning_rate=0.5)
except StructPruneError as error:
    print(f"rank {rank} refused: {error}", flush=True)
for train in ("full", "scales"):
    model = recover(deepcopy(pruned), tokenizer(), recovery_config(tokens=288, train=train, lora={}))
    changed = weights_hash(model) != weights_hash(pruned)
    print(f"rank {rank} trained {train}: {changed} {weights_hash(model)}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_checkpoints_of_two_processes(tmp_path):
    done = on_two_ranks(SCRIPT, tmp_path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) > 1 and all((path / IDENTITY_NAME).is_file() for path in checkpoints)
    for rank in (0, 1):
        assert f"rank {rank} saw {[path.name for path in checkpoints]}" in done.stdout
        assert f"rank {rank} refused: " in done.stdout
    for train in ("full", "scales"):
        said = [line.split()[-2:] for line in done.stdout.splitlines() if f"trained {train}: " in line]
        assert len(said) == 2 and said[0] == said[1] and said[0][0] == "True"
    assert done.stdout.count("learning_rate=0.01 there and 0.5 here") == 2
    assert done.stderr.count("is passed over: ") >= 2
