"""A model whose layers are on the disk, or in another memory, is pruned as one that is in memory."""

import gc
import weakref
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import CARD, card, logits, with_long
from models import build, config, token_ids, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError, StructPruner, layer_device_map
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import is_offloaded
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.domains.packing import Domain
from optimum_structprune.pruning.measure import Measure
from optimum_structprune.sources.offloaded import Offloaded
from optimum_structprune.system.offloading import bring_in, weight_of


def layer_in_memory(model, layer):
    """What a source does with a layer, here without samples."""
    return Offloaded.at(SimpleNamespace(model=model, arch=describe(model)), layer)


def offloaded(case, place, folder):
    """A model whose layers accelerate has put on the disk or into another memory, all of them or some."""
    model, main = build(case), torch.device("cpu")
    arch = describe(model)
    if place == "memory":
        return cpu_offload(model, execution_device=main, offload_buffers=True)
    if place == "disk_offload":
        return disk_offload(model, folder / "offload", execution_device=main)
    places = layer_device_map(model.config, "cpu", "disk")
    if place != "disk":
        del places[arch.layer_path]
        places |= {f"{arch.layer_path}.{layer}": ("cpu", "disk")[layer % 2] for layer in range(arch.num_layers)}
    if place == "dispatch":
        return dispatch_model(model, places, main_device="cpu", offload_dir=folder / "offload")
    model.save_pretrained(folder / "dense", max_shard_size="20KB")
    settings = {"offload_folder": folder / "offload", "dtype": model.dtype}
    if place == "auto":
        layer = sum(tensor.nbytes for tensor in layer_list(model, arch)[0].parameters())
        size = sum(tensor.nbytes for tensor in model.parameters())
        settings["max_memory"] = {"cpu": size - layer // 2}
        places = "auto"
    return AutoModelForCausalLM.from_pretrained(folder / "dense", device_map=places, **settings).eval()


def pruned(model, **fields):
    pruner = StructPruner(config(**fields))
    return pruner, pruner.prune_model(model, tokenizer(), inplace=True)


@cache
def in_memory(case):
    """The pruner and the model of the same run with a model in memory, which the tests only read."""
    return pruned(build(case), **RUNS[case])


RUNS = {
    "llama-untied": {"widths": {"mlp": 24, "attention": 2}},
    "llama-bias": {"criterion": "flap"},
    "qwen2": {"rounds": 3},
    "qwen3": {"widths": {"mlp": {0: 24}}},
    "gemma2": {"sparsity": 0.25, "allocation": "sensitivity", "round_to": 1, "targets": ("mlp",)},
    "gpt2-tied": {},
    "mixtral": {"widths": {"expert": 3, "mlp": 24}},
    "deepseek_v2": {"widths": {"expert": 2}},
    "gpt_oss": {},
    "granite": {"widths": {"layer": 1, "mlp": 24}},
    "llama-tied": {"widths": None, "budget": {"parameters": 0.9}},
}
PLACES = [*((case, "disk") for case in RUNS), ("llama-bias", "memory"), ("mixtral", "memory"), ("mixtral", "auto")]
PLACES += [("llama-tied", place) for place in ("half", "memory", "disk_offload", "dispatch", "auto")]


@pytest.mark.parametrize(
    ("case", "place"), with_long(PLACES, ["llama-bias", "llama-tied", "llama-untied", "mixtral", "qwen2"])
)
def test_it_is_pruned_as_in_memory(case, place, tmp_path):
    theirs, expected = in_memory(case)
    model = offloaded(case, place, tmp_path)
    assert is_offloaded(model)
    ours, small = pruned(model, **RUNS[case])
    *_, last = layer_list(small, describe(small))
    assert is_offloaded(small) and all(tensor.is_meta for tensor in last.parameters())
    assert ours.plan.to_dict() == theirs.plan.to_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weight_of(small, name), tensor, rtol=1e-5, atol=1e-5)
    for _ in range(2):  # the hooks go on with what has gone back
        torch.testing.assert_close(logits(small), logits(expected), rtol=1e-4, atol=1e-5)
    for name, domain in theirs.report.domains.items():
        perplexities = pytest.approx(domain.perplexity.by_model(), rel=1e-4)
        assert ours.report.domains[name].perplexity.by_model() == perplexities
    assert (ours.report.dense, ours.report.pruned) == (theirs.report.dense, theirs.report.pruned)
    ours.save(small, tmp_path / "small", tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(again), logits(expected), rtol=1e-4, atol=1e-5)
    assert sum(tensor.numel() for tensor in again.parameters()) == expected.num_parameters()


def test_no_layer_but_the_one_in_use_is_in_memory(tmp_path):
    model = offloaded("llama-untied", "disk", tmp_path)
    arch = describe(model)
    layers = layer_list(model, arch)
    for layer in range(arch.num_layers):
        with layer_in_memory(model, layer):
            assert not any(tensor.is_meta for tensor in layers[layer].parameters())
            others = [each for each in layers if each is not layers[layer]]
            assert all(tensor.is_meta for each in others for tensor in each.parameters())
    with pytest.raises(KeyboardInterrupt), layer_in_memory(model, 0):
        raise KeyboardInterrupt
    assert all(tensor.is_meta for layer in layers for tensor in layer.parameters())


def test_a_card_holds_what_is_read_from_the_disk_once():
    class Disk(dict):
        def __getitem__(self, name):
            return torch.empty(64, 64, device=CARD)

    layer = nn.Linear(64, 64, bias=False, device="meta")
    with card() as found:
        hook = AlignDevicesHook(execution_device=CARD, offload=True, weights_map=Disk())
        bring_in(add_hook_to_module(layer, hook))
    assert found.peak == found.now() == 4 * 64 * 64


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    model = offloaded("llama-untied", "disk", tmp_path)
    for file in (tmp_path / "dense").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StructPruneError, match=r"offloaded .*model\.layers\.0.* cannot be read"):
        with layer_in_memory(model, 0):
            pass


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_layer_is_gone_once_a_smaller_one_has_taken_its_place(place, tmp_path):
    """Without a garbage collection: a model that streams must not come to hold all of its layers."""
    model = offloaded("llama-untied", place, tmp_path)
    parts = [weakref.ref(module) for layer in layer_list(model, describe(model)) for module in layer.modules()]
    gc.collect()
    gc.disable()
    try:
        pruned(model, widths={"mlp": 24, "attention": 2})
        assert not [part() for part in parts if part() is not None]
    finally:
        gc.enable()


def test_text_of_two_lengths_is_measured_as_in_memory(tmp_path):
    rows = {"a": token_ids(4, 24), "b": token_ids(3, 40)}
    whole, away = build("llama-untied"), offloaded("llama-untied", "disk", tmp_path)
    domains = [Domain("a", 1.0, rows["a"], rows["a"])]
    both = (Measure(model, domains, describe(model), 480, unseen=[*rows["b"]]) for model in (whole, away))
    expected, found = (measure.dense_losses for measure in both)
    assert {len(row) for row in rows["b"]} == {40} and expected.keys() == found.keys()
    for name, losses in expected.items():
        torch.testing.assert_close(found[name], losses)
