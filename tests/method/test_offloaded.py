"""A model whose layers are on the disk or in another memory is pruned as a model in memory."""

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
from optimum_structprune.measure.losses import measure_all
from optimum_structprune.measure.text import Text
from optimum_structprune.method.offloaded import Offloaded
from optimum_structprune.system import fingerprint
from optimum_structprune.system.fingerprint import checksums
from optimum_structprune.system.offloading import bring_in, weight_of


def layer_in_memory(model, layer):
    """Load the weights of a layer inside `with`, as a source without samples."""
    return Offloaded.at(SimpleNamespace(model=model, arch=describe(model)), layer)


def is_on_meta(layer):
    """Return whether no parameter of a layer is in memory."""
    return all(tensor.is_meta for tensor in layer.parameters())


def build_offloaded(case, place, folder):
    """Return a model of which accelerate offloads some or all layers to the disk or to another memory."""
    model = build(case)
    arch = describe(model)
    cpu = torch.device("cpu")
    if place == "memory":
        return cpu_offload(model, execution_device=cpu, offload_buffers=True)
    if place == "disk_offload":
        return disk_offload(model, folder / "offload", execution_device=cpu)

    places = layer_device_map(model.config, "cpu", "disk")
    if place != "disk":
        del places[arch.layer_path]
        for layer in range(arch.num_layers):
            places[f"{arch.layer_path}.{layer}"] = ("cpu", "disk")[layer % 2]
    if place == "dispatch":
        return dispatch_model(model, places, main_device="cpu", offload_dir=folder / "offload")

    settings = {"device_map": places, "offload_folder": folder / "offload", "dtype": model.dtype}
    if place == "auto":
        layer_size = sum(tensor.nbytes for tensor in layer_list(model, arch)[0].parameters())
        size = sum(tensor.nbytes for tensor in model.parameters())
        settings["device_map"] = "auto"
        settings["max_memory"] = {"cpu": size - layer_size // 2}
    model.save_pretrained(folder / "original", max_shard_size="20KB")
    return AutoModelForCausalLM.from_pretrained(folder / "original", **settings).eval()


def prune_in_place(model, **fields):
    """Return the pruner and the pruned model."""
    pruner = StructPruner(config(**fields))
    return pruner, pruner.prune_model(model, tokenizer(), inplace=True)


@cache
def run_in_memory(case):
    """Return the pruner and the pruned model of a run with a model in memory. Tests must not change them."""
    return prune_in_place(build(case), **RUNS[case])


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
PLACES = [(case, "disk") for case in RUNS]
PLACES += [("llama-bias", "memory"), ("mixtral", "memory"), ("mixtral", "auto")]
PLACES += [("llama-tied", place) for place in ("half", "memory", "disk_offload", "dispatch", "auto")]
SHORT = ["llama-bias", "llama-tied", "llama-untied", "mixtral", "qwen2"]


@pytest.mark.parametrize(("case", "place"), with_long(PLACES, SHORT))
def test_an_offloaded_model_is_pruned_as_in_memory(case, place, tmp_path):
    expected_pruner, expected = run_in_memory(case)
    model = build_offloaded(case, place, tmp_path)
    assert is_offloaded(model)

    pruner, small = prune_in_place(model, **RUNS[case])

    assert is_offloaded(small)
    assert is_on_meta(layer_list(small, describe(small))[-1])
    assert pruner.result.plan.to_dict() == expected_pruner.result.plan.to_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weight_of(small, name), tensor, rtol=1e-5, atol=1e-5)
    for _ in range(2):  # the second pass reads the weights that the hooks offloaded after the first
        torch.testing.assert_close(logits(small), logits(expected), rtol=1e-4, atol=1e-5)

    for name, domain in expected_pruner.result.report.domains.items():
        perplexities = pruner.result.report.domains[name].perplexity.values
        assert perplexities == pytest.approx(domain.perplexity.values, rel=1e-4)
    assert pruner.result.report.original == expected_pruner.result.report.original
    assert pruner.result.report.pruned == expected_pruner.result.report.pruned

    pruner.save(small, tmp_path / "small", tokenizer())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(reloaded), logits(expected), rtol=1e-4, atol=1e-5)
    assert sum(tensor.numel() for tensor in reloaded.parameters()) == expected.num_parameters()


def test_only_the_layer_in_use_is_in_memory(tmp_path):
    model = build_offloaded("llama-untied", "disk", tmp_path)
    layers = list(layer_list(model, describe(model)))
    for number, layer in enumerate(layers):
        with layer_in_memory(model, number):
            assert not any(tensor.is_meta for tensor in layer.parameters())
            assert all(is_on_meta(unused) for unused in layers if unused is not layer)

    with pytest.raises(KeyboardInterrupt), layer_in_memory(model, 0):
        raise KeyboardInterrupt
    assert all(is_on_meta(layer) for layer in layers)


def test_a_gpu_holds_weights_from_the_disk_once():
    class Disk(dict):
        def __getitem__(self, name):
            return torch.empty(64, 64, device=CARD)

    layer = nn.Linear(64, 64, bias=False, device="meta")
    with card() as memory:
        hook = AlignDevicesHook(execution_device=CARD, offload=True, weights_map=Disk())
        bring_in(add_hook_to_module(layer, hook))

    assert memory.peak == 4 * 64 * 64
    assert memory.now() == 4 * 64 * 64


def test_checksums_hold_at_most_one_weight_from_the_disk(tmp_path, monkeypatch):
    references = []

    def weight_with_reference(model, name):
        assert sum(reference() is not None for reference in references) <= 1
        weight = weight_of(model, name)
        references.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(fingerprint, "weight_of", weight_with_reference)
    sums = checksums(build_offloaded("llama-untied", "disk", tmp_path))

    assert len(references) > 10
    assert sums == checksums(AutoModelForCausalLM.from_pretrained(tmp_path / "original"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    model = build_offloaded("llama-untied", "disk", tmp_path)
    for file in (tmp_path / "original").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(StructPruneError, match=r"offloaded .*model\.layers\.0.* cannot be read"):
        with layer_in_memory(model, 0):
            pass


def references_to_layers(model):
    """Return weak references to the modules of all layers."""
    references = []
    for layer in layer_list(model, describe(model)):
        references += [weakref.ref(module) for module in layer.modules()]
    return references


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_replaced_layer_is_freed_at_once(place, tmp_path):
    """Without a garbage collection, an offloaded model must not hold all of its layers in memory."""
    model = build_offloaded("llama-untied", place, tmp_path)
    references = references_to_layers(model)

    gc.collect()
    gc.disable()
    try:
        prune_in_place(model, widths={"mlp": 24, "attention": 2})
        assert not [reference() for reference in references if reference() is not None]
    finally:
        gc.enable()


def test_text_of_two_lengths_is_measured_as_in_memory(tmp_path):
    texts = {"a": Text(list(token_ids(4, 24))), "unseen": Text(list(token_ids(3, 40)))}

    def original_losses(model):
        measured = measure_all(model, texts, arch=describe(model))
        return {name: torch.cat(losses.loss) for name, losses in measured.items()}

    expected = original_losses(build("llama-untied"))
    losses = original_losses(build_offloaded("llama-untied", "disk", tmp_path))

    assert losses.keys() == expected.keys()
    for name, domain_losses in expected.items():
        torch.testing.assert_close(losses[name], domain_losses)
