"""Several processes train one model: the same weights in each, whole or in shards, and checkpoints of their run."""

import pytest
from helpers import on_two_ranks


# Accelerate shards on GPUs alone. Told that the CPU is one, it runs the same code with gloo.
SCRIPT = """
import os, shutil, sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import logits, recovery_config
from models import build, config, tokenizer
from torch.distributed.fsdp import FSDPModule

from optimum_structprune import StructPruneError, prune_model, recover
from optimum_structprune.recovery import checks, trainer
from optimum_structprune.recovery import recover as module
from optimum_structprune.recovery.resume import weights_hash

folder, rank, plugins, sharded = Path(sys.argv[1]), int(os.environ["RANK"]), [], []
set_up = AcceleratorState.__init__


def sharding_on_the_cpu(self, *args, **kwargs):
    set_up(self, *args, **kwargs)
    if kwargs.get("_from_accelerator"):
        plugins[:] = [kwargs.get("fsdp_plugin")]
    if plugins and plugins[0] is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]


class Watched(trainer.DistillTrainer):
    def compute_loss(self, model, *args, **kwargs):
        sharded.append(isinstance(model, FSDPModule))
        return super().compute_loss(model, *args, **kwargs)


AcceleratorState.__init__ = sharding_on_the_cpu
checks.SHARDING_DEVICES.append("cpu")
module.DistillTrainer = Watched
pruned = prune_model(build("llama-tied"), config(), tokenizer())
WAYS = {"lora": {}, "full": {"train": "full", "lora": {}}}


def trained(way, fsdp=False, resume=False, **training):
    if fsdp:
        training["fsdp"] = True
    sharded.clear()
    settings = recovery_config(tokens=288, training=training, **WAYS[way])
    model = recover(deepcopy(pruned), tokenizer(), settings, pruned, resume=resume)
    assert sharded and all(each == fsdp for each in sharded)
    assert not any(isinstance(each, FSDPModule) for each in model.modules())
    assert all(type(each) is torch.nn.Parameter for each in model.parameters())
    return model


for way in WAYS:
    whole = trained(way)
    print(f"rank {rank} trained {way}: {weights_hash(whole)}", flush=True)
    torch.testing.assert_close(logits(trained(way, fsdp=True)), logits(whole), rtol=1e-4, atol=1e-5)
for way, fsdp in (("lora", False), ("full", True)):
    kept = {"output_dir": str(folder / way), "save_steps": 2, "save_total_limit": 9}
    expected = logits(trained(way, fsdp, **kept))
    dist.barrier()  # the first process may still be writing
    if rank == 0:
        # What a kill while the last checkpoint is written leaves.
        last = max((folder / way).iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
        (last / "trainer_state.json").write_text("{")
    dist.barrier()
    torch.testing.assert_close(logits(trained(way, fsdp, resume=True, **kept)), expected)
    try:
        trained(way, fsdp, resume=True, **kept, learning_rate=0.5)
    except StructPruneError as error:
        print(f"rank {rank} refused {way}: {error}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    done = on_two_ranks(SCRIPT, tmp_path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for way in ("lora", "full"):
        hashes = [line.split()[-1] for line in done.stdout.splitlines() if f"trained {way}: " in line]
        assert len(hashes) == 2 and hashes[0] == hashes[1]
        assert all(f"rank {rank} refused {way}: " in done.stdout for rank in (0, 1))
    assert done.stdout.count("learning_rate 0.01 there and 0.5 here") == 4
    assert done.stderr.count("is passed over: ") >= 4
