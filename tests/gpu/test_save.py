"""A model on one or several simulated GPUs is saved and reloaded, and no GPU holds a second copy."""

import pytest
import torch
from accelerate import dispatch_model
from gpu.compare import assert_same_on_gpus, on_gpu, spread, weights
from gpu.simulator import simulated_gpus
from models import build, config, token_ids
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner, layer_device_map
from optimum_structprune.system.offloading import places


INPUTS = {"a": token_ids(6, 24)}


def prune_and_save(folder):
    """Return work that prunes and saves a model, and returns the weights that transformers reloads."""

    def work(model):
        pruner = StructPruner(config(widths={"mlp": 24, "attention": 2}))
        small = pruner.prune_model(model, inplace=True, inputs=INPUTS)
        pruner.save(small, folder, overwrite=True)
        return weights(AutoModelForCausalLM.from_pretrained(folder))

    return work


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_saved_model_reloads(tmp_path, count):
    assert_same_on_gpus(prune_and_save(tmp_path / "small"), lambda: build("llama-untied"), count)


MIXED = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": "cpu",
    "model.layers.1": 1,
    "model.norm": 1,
    "lm_head": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu", "disk", MIXED], ids=["cpu", "disk", "one layer on the CPU, one on cuda:1"])
def test_an_offloaded_model_is_saved_and_reloads(tmp_path, place):
    def offload(model):
        model.save_pretrained(tmp_path / "original")
        device_map = place
        if place is not MIXED:
            device_map = layer_device_map(model.config, "cuda:0", place)
        folder = tmp_path / "offloaded"
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "original", device_map=device_map, offload_folder=folder
        )

    count = 2 if place is MIXED else 1
    assert_same_on_gpus(prune_and_save(tmp_path / "small"), lambda: build("llama-untied"), count, offload)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_saved_model_is_reloaded_on_its_gpus_if_they_have_room(tmp_path, monkeypatch, count, fits):
    pruner = StructPruner(config(widths={"mlp": 24}))
    small = pruner.prune_model(build("llama-untied"), inputs=INPUTS)
    original_load = type(small).from_pretrained
    device_maps = []

    def load(*args, device_map=None, **kwargs):
        device_maps.append(device_map)
        return original_load(*args, device_map=device_map, **kwargs)

    monkeypatch.setattr(type(small), "from_pretrained", load)
    if not fits:
        monkeypatch.setattr("optimum_structprune.saving.save.free_bytes", lambda device: 0)

    with simulated_gpus(count):
        if count == 1:
            small = on_gpu(small)
        else:
            small = spread(count)(small)
        pruner.save(small, tmp_path / "small")

        if not fits:
            expected = layer_device_map(small.config, "cuda:0", "disk")
        elif count == 1:
            expected = torch.device("cuda", 0)
        else:
            expected = places(small)

    assert device_maps == [expected]
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_the_places_of_a_spread_model_are_a_device_map():
    with simulated_gpus(2):
        model = spread(2)(build("llama-untied"))
        assert places(model) == {
            "model.embed_tokens": "cuda:0",
            "model.layers.0": "cuda:0",
            "model.layers.1": "cuda:1",
            "model.norm": "cuda:1",
            "model.rotary_emb": "cuda:0",
            "lm_head": "cuda:1",
        }

        copied = dispatch_model(build("llama-untied"), places(model), main_device="cuda:0")
        ids = torch.arange(3, 15)[None].cuda()
        assert torch.equal(copied(ids).logits.cpu(), model(ids).logits.cpu())
