"""Whole layers: pruned ≡ skipped, what the config says of single layers goes with them, and which ones go."""

from contextlib import ExitStack, contextmanager
from copy import deepcopy

import pytest
import torch
from helpers import count_hooks, logits, outputs, same_weights, with_long
from models import OTHER_STRUCTURES, STRUCTURES, build, config, described, random_model, token_ids, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError, StructPruner, prune_model
from optimum_structprune.arch.hooks import hidden_states_of
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.arch.shrink import cut_depth_
from optimum_structprune.arch.spec import HIDDEN, LAYER, MODEL
from optimum_structprune.criteria.block_influence import block_influence
from optimum_structprune.domains.load import given_domains
from optimum_structprune.method.layers import Batch, InMemory
from optimum_structprune.sources.data import CalibrationData, batches_of
from optimum_structprune.steps.layers import remove_layers_
from optimum_structprune.steps.resize import drop_layers_


# The structures, and those whose configs say something else of single layers.
DEEPER = [*STRUCTURES, "bloom", "smollm3", "qwen3_moe", "jamba", "lfm2_moe", "llama4_text", "exaone_moe"]
DEEPER += [case for case in OTHER_STRUCTURES if case != "vit"]
KEEP = (1, 3, 4)


def deep(case):
    """The case with five layers, whose types do not alternate evenly."""
    auto, model_type, fields = deepcopy(described(case))
    text = fields.get("text_config", fields)
    key = next((key for key in ("n_layer", "n_layers", "num_layers") if key in text), "num_hidden_layers")
    text[key] = 5
    if "layer_types" in text:
        text["layer_types"] = [text["layer_types"][index] for index in (0, 1, 1, 0, 1)]
    of_layers = {"no_rope_layers": [1, 0, 1, 1, 0], "mlp_only_layers": [0, 3], "first_k_dense_replace": 2}
    text |= {name: value for name, value in of_layers.items() if name in text}
    return random_model(auto, model_type, fields)


@contextmanager
def without(model, keep):
    """Layers that are not kept hand on what they get."""

    def handing_on(layer, args, kwargs, output):
        hidden = hidden_states_of(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for index, layer in enumerate(layer_list(model, describe(model))):
            if index not in keep:
                stack.enter_context(layer.register_forward_hook(handing_on, with_kwargs=True))
        yield


@pytest.mark.parametrize("case", [case for case in DEEPER if LAYER in describe(deep(case)).offered])
def test_pruned_equals_skipped_and_reloads_and_generates(case, tmp_path):
    model = deep(case)
    dense = outputs(model)
    small = deepcopy(model)
    drop_layers_(small, describe(small), KEEP)
    with without(model, KEEP):
        torch.testing.assert_close(outputs(small), outputs(model), atol=1e-5, rtol=0)
    assert not torch.allclose(outputs(small), dense, atol=1e-3), "pruning changed nothing, so the test shows nothing"
    assert len(layer_list(small, describe(small))) == 3 and count_hooks(small) == 0
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(small))
    if describe(model).causal:
        how = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
        cached, plain = (small.generate(token_ids(1, 6), use_cache=use, **how) for use in (True, False))
        assert torch.equal(cached, plain) and cached.shape == (1, 14)


def test_layers_of_different_widths_keep_theirs(tmp_path):
    model = prune_model(deep("llama-tied"), config(widths={"mlp": 24}, skip_layers=(0, 3)), tokenizer())
    narrow = prune_model(model, config(widths={HIDDEN: 24}), tokenizer())
    assert [space.size for space in describe(narrow).of("mlp")] == [40, 24, 24, 40, 24]
    small = deepcopy(model)
    drop_layers_(small, describe(small), KEEP)
    assert [space.size for space in describe(small).of("mlp")] == [24, 40, 24]
    with without(model, KEEP):
        torch.testing.assert_close(outputs(small), outputs(model), atol=1e-5, rtol=0)
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(small))
    for wide, widths in ((model, 24), (deep("llama-tied"), {0: 24})):
        with pytest.raises(StructPruneError, match="Prune 'layer' in a separate run"):
            prune_model(wide, config(widths={LAYER: 3, "mlp": widths}), tokenizer())


@pytest.mark.parametrize("rest", [{"dense_mlp": 24, "mlp": 24}, {"expert": 3}])
def test_what_went_with_all_layers_that_have_it_is_done(rest):
    left = describe(prune_model(build("qwen3_moe"), config(widths={LAYER: 1, **rest}), tokenizer()))
    assert all(left.of(name)[0].width == width for name, width in rest.items() if left.of(name))


def test_a_list_that_is_only_as_long_as_there_are_layers_stays():
    settings = deep("llama-tied").config
    settings.eos_token_id, settings.elsewhere = [2, 3, 4, 5, 6], ["a", "b", "c", "d", "e"]
    settings.stop_token_ids = [2, 3, 4, 5, 6]
    cut_depth_(settings, KEEP, 5)
    assert settings.eos_token_id == settings.stop_token_ids == [2, 3, 4, 5, 6]
    assert settings.elsewhere == ["b", "d", "e"]


@pytest.mark.parametrize("criterion", ["wanda", "block_influence"])
def test_a_layer_that_does_nothing_goes_first(criterion):
    model = deep("qwen2")
    layer = layer_list(model, describe(model))[2]
    for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
        nn.init.zeros_(parameter)
    pruner = StructPruner(config(widths={LAYER: 4}, criterion=criterion))
    small = pruner.prune_model(model, tokenizer())
    assert pruner.plan.keep == {(MODEL, LAYER): (0, 1, 3, 4)}
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)


@torch.no_grad()
def test_block_influence_is_the_mean_angle():
    model = deep("llama-tied")
    ids = token_ids(3)
    batches = [Batch(0, ids[:2]), Batch(0, ids[2:]), Batch(1, token_ids(seed=4), counts=False)]
    found = block_influence.score(model, describe(model), batches)
    states = model(ids, output_hidden_states=True).hidden_states
    for index in range(4):  # transformers puts the last one through the final norm
        cosine = nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1)
        assert float(found[index]) == pytest.approx(float((1 - cosine).mean()), abs=1e-6)


@pytest.mark.parametrize("case", with_long(["llama-tied", "gpt2-tied", "gpt_neox", "gemma2"], ["gemma2"]))
def test_the_layer_in_front_of_a_gap_makes_up_for_it(case):
    model = deep(case)
    domains = given_domains({"a": token_ids(24, 24)}, 0.1)
    batches = batches_of(domains, 4)

    @torch.no_grad()
    def stream(model):
        runner = InMemory(model, describe(model), batches)
        for layer in range(describe(model).num_layers):
            runner.pass_through(layer)
        return torch.cat(runner.hidden)

    def lost(keep, **fields):
        small = deepcopy(model)
        remove_layers_(small, describe(small), CalibrationData(config(**fields), domains), keep)
        return small, float((stream(small) - stream(model)).square().mean())

    plain = lost((0, 1, 2), refit="none")[1]
    assert lost((0, 1, 2), error_feedback=0.0)[1] == plain
    assert lost((0, 1, 2), error_feedback=1.0)[1] < lost((0, 1, 2), error_feedback=0.5)[1] < plain
    # A gap in front of all layers has none that could make up for it.
    small, without = lost((2, 3, 4)), lost((2, 3, 4), refit="none")
    assert small[1] == without[1] and same_weights(small[0], without[0])


@pytest.mark.parametrize("case", ["qwen2_moe", "olmo2"])
def test_what_a_gate_weighs_token_by_token_and_a_norm_that_lets_nothing_through_make_up_for_nothing(case):
    model = deep(case)
    for layer in model.model.layers if case == "olmo2" else ():
        nn.init.zeros_(layer.post_feedforward_layernorm.weight)
    small = prune_model(model, config(widths={"layer": 3}), tokenizer())
    assert all(parameter.isfinite().all() for parameter in small.parameters())
