"""Channels of the residual stream: pruned ≡ the model with zeros in the removed channels, and the chosen channels."""

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
from optimum_structprune.method.resize import narrow_


WIDTH = 24


def random_keep():
    return tuple(torch.randperm(32, generator=torch.Generator().manual_seed(3))[:WIDTH].sort().values.tolist())


def removed_channels(keep, size=32):
    return [channel for channel in range(size) if channel not in keep]


@torch.no_grad()
def mask_channels(model, channels):
    """Return a copy of a model that neither embeds nor writes anything in some channels of the residual stream."""
    model = deepcopy(model)
    residual = describe(model).residual
    for axis in residual.space.producers:
        if axis.param in (residual.embed, *residual.writers):
            tensor = model.get_parameter(axis.param)
            tensor.index_fill_(axis.dim, torch.tensor(channels), 0)
    return model


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("case", [case for case in STRUCTURES if describe(build(case)).residual is not None])
def test_pruned_equals_masked_and_reloads(case, tmp_path):
    model = build(case)
    original_logits = logits(model)
    keep = random_keep()
    small = deepcopy(model)
    narrow_(small, describe(small), keep, {})

    masked = mask_channels(model, removed_channels(keep))
    torch.testing.assert_close(logits(small), logits(masked), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), original_logits, atol=1e-3), "pruning changed nothing"
    assert is_tied(small) == is_tied(model)
    assert_remembers_its_own_config(small)

    small.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert reloaded.config.hidden_size == WIDTH
    torch.testing.assert_close(logits(reloaded), logits(small), atol=1e-6, rtol=0)
    assert reloaded.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("refit", ["none", "least_squares"])
@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "olmo2", "qwen2_moe", "llama4_text"])
def test_dead_channels_are_removed_first_and_no_output_changes(case, refit):
    model = mask_channels(build(case), removed_channels(random_keep()))
    pruner = StructPruner(config(widths={HIDDEN: WIDTH}, refit=refit))
    small = pruner.prune_model(model, tokenizer())

    assert pruner.result.plan.keep == {(MODEL, HIDDEN): random_keep()}
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)


def with_twin_channels(case):
    """Return a model whose channels from 24 on equal the channels from 16 on at a quarter of their size."""
    model = build(case)
    residual = describe(model).residual
    weaker = torch.arange(24, 32)
    for name in (residual.embed, *residual.writers):
        tensor = model.get_parameter(name).data
        dim = next(axis.dim for axis in residual.space.producers if axis.param == name)
        tensor.index_copy_(dim, weaker, 0.25 * tensor.index_select(dim, weaker - 8))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1 - residual.norm_offset)
    return model


@pytest.mark.parametrize("case", ["llama-untied", "exaone4", "gemma3_text", "gpt_oss"])
def test_refit_lets_a_channel_stand_in_for_its_twin(case, monkeypatch):
    model = with_twin_channels(case)
    monkeypatch.setattr(StructPruneConfig, "damping", 1e-6)
    with torch.no_grad():
        original = model.model(token_ids()).last_hidden_state

    errors = {}
    for refit in ("none", "least_squares"):
        pruner = StructPruner(config(widths={HIDDEN: WIDTH}, refit=refit))
        small = pruner.prune_model(model, tokenizer())
        keep = list(pruner.result.plan.keep[MODEL, HIDDEN])
        with torch.no_grad():
            states = small.model(token_ids()).last_hidden_state
        errors[refit] = float((states - original[..., keep]).square().mean())
    assert errors["least_squares"] < 0.2 * errors["none"]


@torch.no_grad()
def test_norms_compensate_for_the_energy_of_removed_channels():
    """The energy of a domain is the mean over its tokens of each channel's share in the energy of the token."""
    model = build("llama-tied")
    inputs = {"a": token_ids(6), "b": token_ids(6, seed=2)}
    plain = StructPruner(config(widths={HIDDEN: WIDTH}, refit="none")).prune_model(model, inputs=inputs)
    pruner = StructPruner(config(widths={HIDDEN: WIDTH}, refit="least_squares"))
    refitted = pruner.prune_model(model, inputs=inputs)
    keep = list(pruner.result.plan.keep[MODEL, HIDDEN])

    domains = given_domains(inputs, 0.125)
    states = [model(domain.samples, output_hidden_states=True).hidden_states for domain in domains]
    norms = describe(model).residual.reads[:4:2]
    for layer, norm in enumerate(norms):
        energies = [hidden[layer].square() for hidden in states]
        shares = [energy / energy.mean(-1, keepdim=True) for energy in energies]
        mean_share = sum(share.flatten(0, 1).mean(0) for share in shares) / 2

        expected = (mean_share[keep].sum() / 32).sqrt().expand(WIDTH)
        ratio = refitted.get_submodule(norm.tap).weight / plain.get_submodule(norm.tap).weight
        torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=0)


def test_all_spaces_in_one_run(tmp_path):
    widths = {"mlp": 24, "attention": 2, "expert": 3, HIDDEN: WIDTH, LAYER: 1}
    model = build("mixtral")
    pruner = StructPruner(config(widths=widths, rounds=2))
    small = pruner.prune_model(model, tokenizer())

    assert {layer for layer, _ in pruner.result.plan.keep} == {MODEL, *pruner.result.plan.keep[MODEL, LAYER]}
    reported = {name: set(by_layer.values()) for name, by_layer in pruner.result.report.widths.items()}
    assert reported == {name: {width} for name, width in widths.items()}

    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(small), atol=1e-6, rtol=0)


def test_in_place_keeps_parameters_ties_dtype_and_requires_grad():
    model = build("gemma3_text").to(torch.bfloat16).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    original = dict(model.named_parameters())
    pruner = StructPruner(config(sparsity=0.25, targets=(HIDDEN,)))
    small = pruner.prune_model(model, tokenizer(), inplace=True)

    assert small is model
    assert small.config.hidden_size == WIDTH
    assert small.training
    assert pruner.result.report.sparsity == pytest.approx(0.25, abs=0.02)

    parameters = dict(small.named_parameters())
    assert parameters.keys() == original.keys()
    assert all(parameters[name] is original[name] for name in parameters)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    assert {name for name in parameters if not parameters[name].requires_grad} == {"model.embed_tokens.weight"}
