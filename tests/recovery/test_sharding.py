"""FSDP: where it cannot work it is refused, and what was trained in shards comes back whole."""

from types import SimpleNamespace

import pytest
import torch
from helpers import recovery_config
from models import build, config
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.tensor import DTensor, distribute_tensor

from optimum_structprune import StructPruneError, prune_model
from optimum_structprune.recovery.recover import check_recovery
from optimum_structprune.recovery.sharding import check_sharding, take_over_


def test_what_does_not_shard_is_refused():
    with pytest.raises(StructPruneError, match="fsdp shards a model over GPUs, and on 'cpu' accelerate ignores it"):
        check_recovery(recovery_config(training={"fsdp": True}), config(), build("llama-tied"))
    for settings, message in (({"version": 1}, "fsdp_config has version 1"), ({}, "and this one is alone")):
        arguments = SimpleNamespace(fsdp=True, fsdp_config=settings, world_size=2 if settings else 1)
        with pytest.raises(StructPruneError, match=message):
            check_sharding(arguments, "cuda")


def test_a_model_in_shards_is_not_pruned_and_what_was_trained_in_them_comes_back_whole():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded, mesh = build("llama-tied"), init_device_mesh("cpu", (1,))
        for name, parameter in list(sharded.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(sharded.get_submodule(path), leaf, nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
        with pytest.raises(StructPruneError, match="weights of this LlamaForCausalLM are spread over processes"):
            prune_model(sharded, config())
        model = build("llama-tied")
        with torch.no_grad():
            model.model.norm.weight.zero_()
        model.lm_head.requires_grad_(False)
        take_over_(model, sharded)
    finally:
        destroy_process_group()
    for name, tensor in build("llama-tied").state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
        assert not isinstance(model.state_dict()[name], DTensor)
