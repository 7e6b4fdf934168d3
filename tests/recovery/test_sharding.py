"""Trainings that are to spread the weights over processes."""

from types import SimpleNamespace

import pytest
import torch
from helpers import on_two_ranks, recovery_config
from models import build, config
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.tensor import DTensor, distribute_tensor

from optimum_structprune import StructPruneError, prune_model
from optimum_structprune.recovery.checks import check_recovery
from optimum_structprune.recovery.sharding import check_sharding, take_over_
from optimum_structprune.system.processes import across_processes


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
from optimum_structprune.recovery import sharding, trainer

rank, folder, plugins = int(os.environ["RANK"]), sys.argv[1], []
set_up = AcceleratorState.__init__


def sharding_on_the_cpu(self, *args, **kwargs):
    set_up(self, *args, **kwargs)
    if kwargs.get("_from_accelerator"):
        plugins[:] = [kwargs.get("fsdp_plugin")]
    if plugins and plugins[0] is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]


AcceleratorState.__init__ = sharding_on_the_cpu
sharding.DEVICES.append("cpu")
pruned = prune_model(build("llama-tied"), config(), tokenizer())
seen = []


class Watched(trainer.DistillTrainer):
    def compute_loss(self, model, *args, **kwargs):
        seen.append(isinstance(model, FSDPModule))
        return super().compute_loss(model, *args, **kwargs)


from optimum_structprune.recovery import recover as module

module.DistillTrainer = Watched


def trained(fsdp, resume=False, **fields):
    training = {**fields.pop("training", {}), **({"fsdp": True} if fsdp else {})}
    seen.clear()
    found = recover(
        deepcopy(pruned), tokenizer(), recovery_config(tokens=288, training=training, **fields), pruned, resume=resume
    )
    assert seen and all(each == fsdp for each in seen)
    assert not any(isinstance(each, FSDPModule) for each in found.modules())
    assert all(type(each) is torch.nn.Parameter for each in found.parameters())
    return found


for fields in ({}, {"train": "full", "lora": {}}):
    torch.testing.assert_close(logits(trained(True, **fields)), logits(trained(False, **fields)), rtol=1e-4, atol=1e-5)
    print(f"rank {rank} trained {fields.get('train', 'lora')}", flush=True)
kept = {"output_dir": folder, "save_steps": 2, "save_total_limit": 9}
whole = logits(trained(True, training=kept, train="full", lora={}))
dist.barrier()
if rank == 0:
    shutil.rmtree(max(Path(folder).iterdir()))  # so that there is something left to train
dist.barrier()
torch.testing.assert_close(logits(trained(True, True, training=kept, train="full", lora={})), whole)
print(f"rank {rank} resumed", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_training_gives_what_whole_weights_give(tmp_path):
    done = on_two_ranks(SCRIPT, tmp_path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert done.stdout.count(f"rank {rank} trained") == 2 and f"rank {rank} resumed" in done.stdout


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"fsdp": True}, "fsdp shards a model over GPUs, and on 'cpu' accelerate ignores it"),
        ({"deepspeed": "zero3.json"}, "deepspeed is not supported"),
    ],
)
def test_what_does_not_run_is_refused(training, message):
    with pytest.raises(StructPruneError, match=message):
        check_recovery(recovery_config(training=training), config(), build("llama-tied"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"version": 1}, "fsdp_config has version 1"), ({}, "over several processes, and this one is alone")],
)
def test_fsdp_takes_several_processes_and_its_second_version(settings, message):
    arguments = SimpleNamespace(fsdp=True, fsdp_config=settings, world_size=2 if settings else 1)
    with pytest.raises(StructPruneError, match=message):
        check_sharding(arguments, "cuda")


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_a_launch_that_shards_is_refused(variable, name, monkeypatch):
    """Pruning in it would see empty weights in all processes but one."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(StructPruneError, match=f"accelerate was told to use {name}.*torchrun"):
        check_recovery(recovery_config(), config(), build("llama-tied"))
    with pytest.raises(StructPruneError, match=f"accelerate was told to use {name}"), across_processes():
        pass


@pytest.fixture
def sharded():
    """A model whose weights are DTensors, in a group of one process."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model, mesh = build("llama-tied"), init_device_mesh("cpu", (1,))
        for name, parameter in list(model.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
        yield model
    finally:
        destroy_process_group()


def test_a_model_in_shards_is_not_pruned(sharded):
    with pytest.raises(StructPruneError, match="weights of this LlamaForCausalLM are spread over processes"):
        prune_model(sharded, config())


def test_what_was_trained_in_shards_comes_back_whole(sharded):
    model = build("llama-tied")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.lm_head.requires_grad_(False)
    take_over_(model, sharded)
    expected = build("llama-tied").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
        assert not isinstance(tensor, DTensor)
