"""Channels of the residual stream: pruned ≡ the model whose removed channels are zero, and which channels go."""

from copy import deepcopy

import pytest
import torch
from helpers import assert_remembers_its_own_config, logits
from models import STRUCTURES, build, config, token_ids, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import HIDDEN, LAYER, MODEL
from optimum_structprune.domains.load import given_domains
from optimum_structprune.steps.resize import narrow_


WIDTH = 24


def random_keep():
    return tuple(torch.randperm(32, generator=torch.Generator().manual_seed(3))[:WIDTH].sort().values.tolist())


@torch.no_grad()
def masked(model, gone):
    """The model whose residual stream is zero in some channels: nothing is embedded there, and nothing is written."""
    model = deepcopy(model)
    residual = describe(model).residual
    for axis in residual.space.producers:
        if axis.param in (residual.embed, *residual.writers):
            tensor = model.get_parameter(axis.param)
            tensor.index_fill_(axis.dim, torch.tensor(gone), 0)
    return model


def others(keep, size=32):
    return [channel for channel in range(size) if channel not in keep]


@pytest.mark.parametrize("case", [case for case in STRUCTURES if describe(build(case)).residual is not None])
def test_pruned_equals_masked_and_reloads(case, tmp_path):
    model = build(case)
    dense, keep = logits(model), random_keep()
    small = deepcopy(model)
    narrow_(small, describe(small), keep, {})
    torch.testing.assert_close(logits(small), logits(masked(model, others(keep))), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), dense, atol=1e-3), "pruning changed nothing, so the test shows nothing"
    tied = [one.get_input_embeddings().weight is one.get_output_embeddings().weight for one in (model, small)]
    assert tied[0] == tied[1]
    assert_remembers_its_own_config(small)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.hidden_size == WIDTH
    torch.testing.assert_close(logits(again), logits(small), atol=1e-6, rtol=0)
    assert again.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("refit", ["none", "least_squares"])
@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "olmo2", "qwen2_moe", "llama4_text"])
def test_dead_channels_go_first_and_nothing_changes(case, refit):
    model = masked(build(case), others(random_keep()))
    pruner = StructPruner(config(widths={HIDDEN: WIDTH}, refit=refit))
    small = pruner.prune_model(model, tokenizer())
    assert pruner.plan.keep == {(MODEL, HIDDEN): random_keep()}
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["llama-untied", "exaone4", "gemma3_text", "gpt_oss"])
def test_refit_lets_a_channel_stand_in_for_its_twin(case, monkeypatch):
    model = build(case)
    residual = describe(model).residual
    weaker = torch.arange(24, 32)
    for name in (residual.embed, *residual.writers):  # channels 24.. follow 16.. at a quarter of their size
        axis = next(axis for axis in residual.space.producers if axis.param == name)
        tensor = model.get_parameter(name).data
        tensor.index_copy_(axis.dim, weaker, 0.25 * tensor.index_select(axis.dim, weaker - 8))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1 - residual.norm_offset)
    distance = {}
    monkeypatch.setattr(StructPruneConfig, "damping", 1e-6)
    for refit in ("none", "least_squares"):
        pruner = StructPruner(config(widths={HIDDEN: WIDTH}, refit=refit))
        small = pruner.prune_model(model, tokenizer())
        with torch.no_grad():
            ours, dense = (one.model(token_ids()).last_hidden_state for one in (small, model))
        distance[refit] = float((ours - dense[..., list(pruner.plan.keep[MODEL, HIDDEN])]).square().mean())
    assert distance["least_squares"] < 0.2 * distance["none"]


@torch.no_grad()
def test_norms_make_up_for_the_energy_that_is_gone():
    """Of a domain it is the mean over tokens, each of which counts by what its channels have of its energy."""
    model, inputs = build("llama-tied"), {"a": token_ids(6), "b": token_ids(6, seed=2)}
    pruners = [StructPruner(config(widths={HIDDEN: WIDTH}, refit=refit)) for refit in ("none", "least_squares")]
    plain, refitted = (pruner.prune_model(model, inputs=inputs) for pruner in pruners)
    keep, reads = list(pruners[1].plan.keep[MODEL, HIDDEN]), describe(model).residual.reads
    domains = given_domains(inputs, 0.125)
    states = [model(domain.samples, output_hidden_states=True).hidden_states for domain in domains]
    for layer, read in enumerate(reads[:4:2]):
        shares = [of[layer].square() / of[layer].square().mean(-1, keepdim=True) for of in states]
        energy = sum(share.flatten(0, 1).mean(0) for share in shares) / 2
        ratio = refitted.get_submodule(read.tap).weight / plain.get_submodule(read.tap).weight
        torch.testing.assert_close(ratio, (energy[keep].sum() / 32).sqrt().expand(WIDTH), rtol=1e-3, atol=0)


def test_all_spaces_in_one_run(tmp_path):
    widths = {"mlp": 24, "attention": 2, "expert": 3, HIDDEN: WIDTH, LAYER: 1}
    model = build("mixtral")
    pruner = StructPruner(config(widths=widths, rounds=2))
    small = pruner.prune_model(model, tokenizer())
    assert {layer for layer, _ in pruner.plan.keep} == {MODEL, *pruner.plan.keep[MODEL, LAYER]}
    assert {name: {*at.values()} for name, at in pruner.report.widths.items()} == {n: {widths[n]} for n in widths}
    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(small), atol=1e-6, rtol=0)


def test_in_place_keeps_parameters_ties_dtype_and_requires_grad():
    model = build("gemma3_text").to(torch.bfloat16).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, pruner = dict(model.named_parameters()), StructPruner(config(sparsity=0.25, targets=(HIDDEN,)))
    small = pruner.prune_model(model, tokenizer(), inplace=True)
    assert small is model and small.config.hidden_size == WIDTH and small.training
    assert pruner.report.sparsity == pytest.approx(0.25, abs=0.02)
    after = dict(small.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    assert {parameter.dtype for parameter in after.values()} == {torch.bfloat16}
    assert {name for name in after if not after[name].requires_grad} == {"model.embed_tokens.weight"}
