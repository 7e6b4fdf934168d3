"""Whole layers: pruned ≡ skipped, the config loses the entries of removed layers, and the choice of layers."""

from contextlib import ExitStack, contextmanager
from copy import deepcopy

import pytest
import torch
from helpers import count_hooks, logits, outputs, same_weights, with_long
from models import CASES, OTHER_STRUCTURES, STRUCTURES, build, config, described, random_model, token_ids, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError, StructPruner, prune_model, register_criterion
from optimum_structprune.arch.hooks import hidden_states_of
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.arch.shrink import cut_depth_
from optimum_structprune.arch.spec import HIDDEN, LAYER, MODEL
from optimum_structprune.criteria.block_influence import block_influence
from optimum_structprune.domains.load import given_domains
from optimum_structprune.method.layers import Batch, InMemory
from optimum_structprune.method.resize import drop_layers_
from optimum_structprune.steps.data import CalibrationData, batches_of
from optimum_structprune.steps.layers import remove_layers_


# The structures, and models whose configs describe single layers in other ways.
DEEPER = [*STRUCTURES, "bloom", "smollm3", "qwen3_moe", "jamba", "lfm2_moe", "llama4_text", "exaone_moe"]
DEEPER += [case for case in OTHER_STRUCTURES if case != "vit"]
KEEP = (1, 3, 4)
# The layers of a case that keeps its first layer in every run.
KEEP_FIRST = {"nemotron_h": (0, 2, 4)}


def deep(case):
    """Build a case with five layers, whose types do not alternate evenly."""
    auto, model_type, fields = deepcopy(described(case))
    text = fields.get("text_config", fields)
    depth = next((name for name in ("n_layer", "n_layers", "num_layers") if name in text), "num_hidden_layers")
    text[depth] = 5

    if "layer_types" in text:
        text["layer_types"] = [text["layer_types"][index] for index in (0, 1, 1, 0, 1)]
    by_layer = {"no_rope_layers": [1, 0, 1, 1, 0], "mlp_only_layers": [0, 3], "first_k_dense_replace": 2}
    text.update({name: value for name, value in by_layer.items() if name in text})
    return random_model(auto, model_type, fields)


@register_criterion("last_layers", judges=LAYER)
def last_layers(model, arch, batches):
    """Return scores that keep the last layers."""
    return torch.arange(float(arch.num_layers))


@contextmanager
def skipped_layers(model, keep):
    """Let the layers that are not kept return their input."""

    def return_input(layer, args, kwargs, output):
        hidden = hidden_states_of(args, kwargs)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        return hidden

    with ExitStack() as stack:
        for index, layer in enumerate(layer_list(model, describe(model))):
            if index not in keep:
                stack.enter_context(layer.register_forward_hook(return_input, with_kwargs=True))
        yield


@pytest.mark.parametrize("case", [case for case in DEEPER if LAYER in describe(deep(case)).offered])
def test_pruned_equals_skipped_and_reloads_and_generates(case, tmp_path):
    model = deep(case)
    keep = KEEP_FIRST.get(case, KEEP)
    original_outputs = outputs(model)
    small = deepcopy(model)
    drop_layers_(small, describe(small), keep)

    with skipped_layers(model, keep):
        torch.testing.assert_close(outputs(small), outputs(model), atol=1e-5, rtol=0)
    assert not torch.allclose(outputs(small), original_outputs, atol=1e-3), "pruning changed nothing"
    assert len(layer_list(small, describe(small))) == 3
    assert count_hooks(small) == 0

    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(small))

    if describe(model).causal:
        options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
        cached = small.generate(token_ids(1, 6), use_cache=True, **options)
        uncached = small.generate(token_ids(1, 6), use_cache=False, **options)
        assert torch.equal(cached, uncached)
        assert cached.shape == (1, 14)


@pytest.mark.parametrize("case", [case for case in DEEPER if case in CASES and LAYER in describe(deep(case)).offered])
def test_a_model_that_loses_its_first_layers_generates_with_its_cache(case):
    model = deep(case)
    depth = max(describe(model).of(LAYER)[0].min_size, 2)
    small = prune_model(model, config(widths={LAYER: depth}, criterion="last_layers"), tokenizer())
    assert len(layer_list(small, describe(small))) == depth

    options = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
    cached = small.generate(token_ids(1, 6), use_cache=True, **options)
    assert torch.equal(cached, small.generate(token_ids(1, 6), use_cache=False, **options))


def test_kept_layers_of_different_widths_keep_their_widths(tmp_path):
    model = prune_model(deep("llama-tied"), config(widths={"mlp": 24}, skip_layers=(0, 3)), tokenizer())
    narrow = prune_model(model, config(widths={HIDDEN: 24}), tokenizer())
    assert [space.size for space in describe(narrow).of("mlp")] == [40, 24, 24, 40, 24]

    small = deepcopy(model)
    drop_layers_(small, describe(small), KEEP)
    assert [space.size for space in describe(small).of("mlp")] == [24, 40, 24]
    with skipped_layers(model, KEEP):
        torch.testing.assert_close(outputs(small), outputs(model), atol=1e-5, rtol=0)

    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(small))

    for uneven, widths in ((model, 24), (deep("llama-tied"), {0: 24})):
        with pytest.raises(StructPruneError, match="Prune 'layer' in a separate run"):
            prune_model(uneven, config(widths={LAYER: 3, "mlp": widths}), tokenizer())


@pytest.mark.parametrize("widths", [{"dense_mlp": 24, "mlp": 24}, {"expert": 3}])
def test_widths_are_reached_even_if_all_layers_with_a_space_are_removed(widths):
    small = prune_model(build("qwen3_moe"), config(widths={LAYER: 1, **widths}), tokenizer())
    arch = describe(small)
    for name, width in widths.items():
        assert not arch.of(name) or arch.of(name)[0].width == width


def test_a_list_of_token_ids_as_long_as_the_layers_is_unchanged():
    settings = deep("llama-tied").config
    settings.eos_token_id = [2, 3, 4, 5, 6]
    settings.stop_token_ids = [2, 3, 4, 5, 6]
    settings.elsewhere = ["a", "b", "c", "d", "e"]

    cut_depth_(settings, KEEP, 5)

    assert settings.eos_token_id == [2, 3, 4, 5, 6]
    assert settings.stop_token_ids == [2, 3, 4, 5, 6]
    assert settings.elsewhere == ["b", "d", "e"]


@pytest.mark.parametrize("criterion", ["wanda", "block_influence"])
def test_a_layer_without_effect_is_removed_first(criterion):
    model = deep("qwen2")
    layer = layer_list(model, describe(model))[2]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)

    pruner = StructPruner(config(widths={LAYER: 4}, criterion=criterion))
    small = pruner.prune_model(model, tokenizer())
    assert pruner.result.plan.keep == {(MODEL, LAYER): (0, 1, 3, 4)}
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)


@torch.no_grad()
def test_block_influence_is_the_mean_angle():
    model = deep("llama-tied")
    ids = token_ids(3)
    batches = [Batch(0, ids[:2]), Batch(0, ids[2:]), Batch(1, token_ids(seed=4), counts=False)]
    scores = block_influence.score(model, describe(model), batches)

    states = model(ids, output_hidden_states=True).hidden_states
    for index in range(4):  # transformers applies the final norm to the last states
        cosine = nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1)
        assert float(scores[index]) == pytest.approx(float((1 - cosine).mean()), abs=1e-6)


@torch.no_grad()
def final_states(model, batches):
    """Return the hidden states behind the last layer."""
    runner = InMemory(model, describe(model), batches)
    for layer in range(describe(model).num_layers):
        runner.pass_through(layer)
    return torch.cat(runner.hidden)


@pytest.mark.parametrize("case", with_long(["llama-tied", "gpt2-tied", "gpt_neox", "gemma2"], ["gemma2"]))
def test_the_layer_before_a_gap_compensates_for_it(case):
    model = deep(case)
    domains = given_domains({"a": token_ids(24, 24)}, 0.1)
    batches = batches_of(domains, 4)

    def remove_layers(keep, **fields):
        """Return the pruned model and its error."""
        small = deepcopy(model)
        remove_layers_(small, describe(small), CalibrationData(config(**fields), domains), keep)
        error = (final_states(small, batches) - final_states(model, batches)).square().mean()
        return small, float(error)

    _, plain_error = remove_layers((0, 1, 2), refit="none")
    _, error_without_feedback = remove_layers((0, 1, 2), error_feedback=0.0)
    _, error_with_half = remove_layers((0, 1, 2), error_feedback=0.5)
    _, error_with_all = remove_layers((0, 1, 2), error_feedback=1.0)
    assert error_without_feedback == plain_error
    assert error_with_all < error_with_half < plain_error

    # No layer before a gap at the beginning could compensate for it.
    refitted, refitted_error = remove_layers((2, 3, 4))
    plain, plain_error = remove_layers((2, 3, 4), refit="none")
    assert refitted_error == plain_error
    assert same_weights(refitted, plain)


@pytest.mark.parametrize("case", ["qwen2_moe", "olmo2"])
def test_removed_layers_behind_a_gate_or_a_zero_norm_are_refitted_to_finite_weights(case):
    model = deep(case)
    if case == "olmo2":
        for layer in model.model.layers:
            nn.init.zeros_(layer.post_feedforward_layernorm.weight)

    small = prune_model(model, config(widths={"layer": 3}), tokenizer())
    assert all(parameter.isfinite().all() for parameter in small.parameters())
