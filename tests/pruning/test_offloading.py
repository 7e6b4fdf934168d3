"""A model whose layers are on the disk, or in another memory, is pruned as one that is in memory."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import logits
from models import build, config, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner
from optimum_structprune.arch.load import describe, layer_list
from optimum_structprune.system.offloading import is_offloaded, weight_of


PLACES = ("disk", "memory")


def offloaded(case, place, folder):
    """A model whose layers are brought in only when they run."""
    model = build(case)
    if place == "memory":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    model.save_pretrained(folder / "dense")
    base = model.base_model_prefix
    places = {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children()}
    places |= {name: "cpu" for name, _ in model.named_children() if name != base}
    places[describe(model).layer_path] = "disk"
    return AutoModelForCausalLM.from_pretrained(
        folder / "dense", device_map=places, offload_folder=folder / "offload", dtype=model.dtype
    ).eval()


def pruned(model, **fields):
    pruner = StructPruner(config(**fields))
    return pruner, pruner.prune_model(model, tokenizer(), inplace=True)


RUNS = {
    "llama-untied": {"widths": {"mlp": 24, "attention": 2}},
    "llama-bias": {"widths": {"mlp": 24}, "refit": "bias", "criterion": "flap"},
    "qwen2": {"widths": {"mlp": 24}, "rounds": 3, "adaptive_rate": 1.0},
    "qwen3": {"sparsity": 0.25, "allocation": "global", "round_to": 1},
    "gemma2": {"sparsity": 0.25, "allocation": "sensitivity", "round_to": 1, "targets": ("mlp",)},
    "gpt2-tied": {"widths": {"mlp": 24}},
    "mixtral": {"widths": {"expert": 3, "mlp": 24}},
    "llama-tied": {"widths": {"layer": 1, "mlp": 24}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", RUNS)
def test_it_is_pruned_as_in_memory(case, place, tmp_path):
    fields = {**RUNS[case], "widths": RUNS[case].get("widths")}
    theirs, expected = pruned(build(case), **fields)
    model = offloaded(case, place, tmp_path)
    assert is_offloaded(model)
    ours, small = pruned(model, **fields)
    assert is_offloaded(small) and all(tensor.is_meta for tensor in layer_list(small, describe(small))[0].parameters())
    assert ours.plan.to_dict() == theirs.plan.to_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weight_of(small, name), tensor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(small), logits(expected), rtol=1e-4, atol=1e-5)
    for name, values in theirs.report.perplexity.items():
        assert ours.report.perplexity[name] == pytest.approx(values, rel=1e-4)
    ours.save(small, tmp_path / "small", tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(again), logits(expected), rtol=1e-4, atol=1e-5)
