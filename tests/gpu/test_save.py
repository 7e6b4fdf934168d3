"""A model on one or several simulated GPUs is saved and read back without a second copy on one of them."""

import pytest
import torch
from accelerate import dispatch_model
from gpu.compare import assert_same_on_gpus, spread, weights
from gpu.simulator import simulated_gpus
from models import build, config, token_ids
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner, layer_device_map
from optimum_structprune.system.offloading import places


INPUTS = {"a": token_ids(6, 24)}


def saved(folder):
    """Return work that prunes and saves a model, and returns the weights that plain transformers reads back."""

    def work(model):
        pruner = StructPruner(config(widths={"mlp": 24, "attention": 2}))
        small = pruner.prune_model(model, inplace=True, inputs=INPUTS)
        pruner.save(small, folder, overwrite=True)
        return weights(AutoModelForCausalLM.from_pretrained(folder))

    return work


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_saved_model_reloads(tmp_path, count):
    assert_same_on_gpus(saved(tmp_path / "small"), lambda: build("llama-untied"), count)


def offloaded(tmp_path, place):
    def load(model):
        model.save_pretrained(tmp_path / "dense")
        places = layer_device_map(model.config, "cuda:0", place) if isinstance(place, str) else place
        folder = tmp_path / "offloaded"
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map=places, offload_folder=folder)

    return load


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
def test_an_offloaded_model(tmp_path, place):
    count = 2 if place is MIXED else 1
    make = offloaded(tmp_path, place)
    assert_same_on_gpus(saved(tmp_path / "small"), lambda: build("llama-untied"), count, make)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_saved_model_is_read_back_where_there_is_room(tmp_path, monkeypatch, count, fits):
    pruner = StructPruner(config(widths={"mlp": 24}))
    small = pruner.prune_model(build("llama-untied"), inputs=INPUTS)
    read = type(small).from_pretrained
    maps = []

    def see(*args, device_map=None, **kwargs):
        maps.append(device_map)
        return read(*args, device_map=device_map, **kwargs)

    monkeypatch.setattr(type(small), "from_pretrained", see)
    if not fits:
        monkeypatch.setattr("optimum_structprune.saving.save.free_bytes", lambda device: 0)
    with simulated_gpus(count):
        small = small.to("cuda") if count == 1 else spread(count)(small)
        pruner.save(small, tmp_path / "small")
        if not fits:
            expected = layer_device_map(small.config, "cuda:0", "disk")
        elif count == 1:
            expected = torch.device("cuda", 0)
        else:
            expected = places(small)
    assert maps == [expected]
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_places_are_whole_layers():
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
        again = dispatch_model(build("llama-untied"), places(model), main_device="cuda:0")
        ids = torch.arange(3, 15)[None]
        assert torch.equal(again(ids.cuda()).logits.cpu(), model(ids.cuda()).logits.cpu())
