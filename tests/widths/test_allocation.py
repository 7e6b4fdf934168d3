"""Budgets, widths, rounds, and the fast kernels that widths lose."""

import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from models import build, config, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from optimum_structprune import StructPruneConfig, StructPruneError, StructPruner, dry_run
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import GROUP, ArchSpec, Space
from optimum_structprune.dryrun import lost_kernels
from optimum_structprune.widths.allocation import ranked_widths, widths_for_sparsity
from optimum_structprune.widths.legal import LEAST_KEPT, multiple_of
from optimum_structprune.widths.schedule import removal_steps, round_widths


def arch_of(layers: int, groups: int, group_cost: int, channels: int, channel_cost: int) -> ArchSpec:
    spaces = []
    for layer in range(layers):
        heads = (("kv_heads", 1), ("heads", 2))
        spaces.append(Space("attention", layer, groups, (), (), heads, (), group_cost, unit=GROUP))
        spaces.append(Space("mlp", layer, channels, (), (), (("ffn", 1),), (), channel_cost))
    params = groups * group_cost + channels * channel_cost + 7
    return ArchSpec("toy", (("layers", layers),), (params,) * layers, tuple(spaces))


archs = st.builds(
    arch_of, st.integers(1, 4), st.integers(1, 9), st.integers(500, 5000), st.integers(64, 2048), st.integers(5, 50)
)


def removed(arch: ArchSpec, widths: dict[str, int]) -> int:
    return sum((space.size - widths.get(space.name, space.size)) * space.unit_params for space in arch.spaces)


@settings(deadline=None, max_examples=60)
@given(arch=archs, sparsity=st.floats(0.02, 0.9), round_to=st.sampled_from([1, 8, 64]))
def test_sparsity_is_met_within_half_a_step(arch, sparsity, round_to):
    legal = {name: list(range(1, arch.of(name)[0].size + 1)) for name in arch.names}
    steps = {"attention": 1, "mlp": round_to}
    most = {"attention": 1, "mlp": round_to if round_to < arch.of("mlp")[0].size else 1}
    if sparsity * sum(arch.layer_params) > removed(arch, most):
        with pytest.raises(StructPruneError, match="is too large"):
            widths_for_sparsity(arch, sparsity, legal, steps)
        return
    widths = widths_for_sparsity(arch, sparsity, legal, steps)
    assert all(width in legal[name] for name, width in widths.items())
    channels = arch.of("mlp")[0]
    assume(widths["mlp"] < channels.size)
    step = most["mlp"] * channels.unit_params * arch.num_layers
    assert abs(removed(arch, widths) - sparsity * sum(arch.layer_params)) <= step / 2 + 1e-6


def test_auto_grows_with_the_model():
    shapes = ((4096, 14336, 256, 256), (2048, 5632, 128, 128), (576, 1536, 32, 32), (64, 172, 4, 4))
    for hidden, channels, expected, shared in shapes:
        sizes = {"hidden_size": hidden, "intermediate_size": channels, "num_attention_heads": 8}
        with torch.device("meta"):
            fields = LlamaConfig(vocab_size=64, num_key_value_heads=4, num_hidden_layers=5, **sizes)
            arch = describe(LlamaForCausalLM(fields))
        plain, two = (config(sparsity=0.2, **more) for more in ({}, {"tensor_parallel": 2}))
        assert (multiple_of(plain, arch, "mlp"), multiple_of(plain, arch, "attention")) == (expected, 1)
        assert (multiple_of(two, arch, "mlp"), multiple_of(two, arch, "attention")) == (shared, 2)
        assert multiple_of(config(sparsity=0.2, round_to=6), arch, "mlp") == 6


@settings(deadline=None, max_examples=30)
@example(rounds=3, mlp=5, attention=4)
@given(rounds=st.integers(1, 8), mlp=st.integers(1, 40), attention=st.integers(1, 4))
def test_rounds_go_down_and_end_at_the_target(rounds, mlp, attention):
    arch = arch_of(2, 4, 100, 40, 10)
    widths = {"mlp": mlp, "attention": attention}
    steps = round_widths(StructPruneConfig(widths=widths, rounds=rounds), arch, widths)
    assert len(steps) == rounds and steps[-1] == widths
    if rounds == 3 and mlp == 5:
        assert [step["mlp"] for step in steps] == [20, 10, 5], "every round keeps the same share"
    for name in widths:
        series = [arch.of(name)[0].size, *(step[name] for step in steps)]
        assert series == sorted(series, reverse=True)


@settings(deadline=None, max_examples=60)
@given(arch=archs, sparsity=st.floats(0.02, 0.9), round_to=st.sampled_from([1, 8, 64]), seed=st.integers(0, 9))
def test_one_ranking_meets_the_budget_within_half_of_its_cheapest_step(arch, sparsity, round_to, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {(space.layer, space.name): torch.randn(space.size, generator=generator) for space in arch.spaces}
    legal = {name: list(range(1, arch.of(name)[0].size + 1)) for name in arch.names}
    chosen = StructPruneConfig(allocation="sensitivity", sparsity=sparsity, round_to=round_to)
    try:
        widths = ranked_widths(chosen, arch, legal, scores)
    except StructPruneError as error:
        assert "layer keeps 10% of its units" in str(error)
        return
    steps = []
    for space in arch.spaces:
        width = widths[space.name][space.layer]
        least = max(1, LEAST_KEPT * space.size)
        multiple = round_to if space.name == "mlp" and round_to < space.size else 1
        lower = [w for w in range(1, width) if w % multiple == 0 and w >= least]
        steps += [space.unit_params * (width - lower[-1])] if lower else []
        assert width >= LEAST_KEPT * space.size or width == space.size
    gone = sum((space.size - widths[space.name][space.layer]) * space.unit_params for space in arch.spaces)
    assert abs(gone - sparsity * sum(arch.layer_params)) <= min(steps, default=gone) / 2 + 1e-6


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), mean=st.integers(40, 90))
def test_one_ranking_keeps_what_scores_highest(seed, mean):
    arch = arch_of(3, 4, 100, 100, 10)
    generator = torch.Generator().manual_seed(seed)
    scores = {(layer, "mlp"): torch.randn(100, generator=generator) + layer / 4 for layer in range(3)}
    chosen = StructPruneConfig(widths={"mlp": mean}, allocation="sensitivity", round_to=1)
    widths = ranked_widths(chosen, arch, {"mlp": list(range(1, 101))}, scores)["mlp"]
    assert sum(widths.values()) == 3 * mean
    kept = min(float(scores[layer, "mlp"].sort().values[100 - width]) for layer, width in widths.items())
    gone = max(float(scores[layer, "mlp"].sort().values[99 - width]) for layer, width in widths.items() if width < 100)
    assert gone <= kept


@pytest.mark.parametrize(("widths", "expected"), [
    ({"mlp": {1: 16}, "attention": 2}, {"mlp": {0: 40, 1: 16}, "attention": {0: 2, 1: 2}}),
    ({"mlp": [24, 24]}, {"mlp": {0: 24, 1: 24}}),
])  # fmt: skip
@pytest.mark.parametrize("rounds", [1, 2])
def test_every_layer_may_be_given_its_own_width(widths, expected, rounds):
    pruner = StructPruner(config(widths=widths, rounds=rounds))
    small = pruner.prune_model(build("llama-tied"), tokenizer())
    assert pruner.report.widths == expected
    assert [layer.mlp.down_proj.in_features for layer in small.model.layers] == list(expected["mlp"].values())
    assert small.config.is_heterogeneous == (len({*expected["mlp"].values()}) > 1)
    again = StructPruneConfig.from_dict(json.loads(json.dumps(pruner.config.to_dict())))
    assert again.widths == pruner.config.widths


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_the_only_dense_layer_of_a_mixture_may_be_skipped(allocation):
    pruner = StructPruner(config(widths=None, sparsity=0.1, skip_layers=(0,), allocation=allocation))
    pruner.prune_model(build("deepseek_v2"), tokenizer())
    assert {layer for layer, _ in pruner.plan.keep} == {1}


def test_steps_of_removal():
    for rounds, schedule, steps in (
        (4, (0.2, 1.0, None), [2, 5, 7, 10]),
        (1, (1.0, None, None), [10]),
        (4, (2, 9, 3), [2, 5, 8]),
        (1, (0.0, None, None), [1]),
    ):
        assert removal_steps(config(rounds=rounds), *schedule, 10) == steps
    for schedule, message in (
        ((0.2, 0.8, None), "end=0.8 divides the removal.*rounds=1 removes everything at once; set rounds=4"),
        ((0.5, 0.2, None), "end=0.2 is step 2, before start=0.5, step 5"),
        ((-3, None, None), "start is a step, or a share of all steps from 0.0 to 1.0, got -3"),
        ((1.5, None, None), "got 1.5"),
        ((float("nan"), None, None), "got nan"),
        (("0.5", None, None), "got '0.5'"),
        ((2, 8, 0), "every is a number of steps, 1 or more, got 0"),
        ((2, None, 3), "every=3 divides the removal up to end; name end, or leave every out"),
        ((2, 11, 3), "is after step 11, but training has 10 steps"),
    ):
        with pytest.raises(StructPruneError, match=message):
            removal_steps(config(), *schedule, 10)


SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
WIDE = LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZES)


@pytest.mark.parametrize(("widths", "devices", "lost"), [
    ({"mlp": 2048}, 1, []),
    ({"mlp": 2048, "attention": 4}, 4, []),
    ({"mlp": 1152}, 1, ["256"]),
    ({"mlp": {0: 3072, 1: 1120}}, 1, ["64", "128", "256"]),
    ({"mlp": 1152}, 2, ["256", "256"]),  # K-quants, and groups of 128 on each of two devices
    ({"mlp": 2000}, 1, ["32", "64", "128", "256"]),
    ({"attention": 3}, 2, ["2"]),
])  # fmt: skip
def test_what_is_lost(widths, devices, lost):
    with torch.device("meta"):
        arch = describe(LlamaForCausalLM(WIDE))
    notes = [*lost_kernels(config(widths=widths, tensor_parallel=devices), arch, widths)]
    assert len(notes) == bool(lost)
    assert [part.split(")")[0] for note in notes for part in note.split("multiples of ")[1:]] == lost


def test_widths_that_follow_from_a_share_suit_engines():
    large = LlamaConfig(vocab_size=64, num_hidden_layers=2, **{**SIZES, "intermediate_size": 12800})
    assert dry_run(large, config(sparsity=0.2, tensor_parallel=2)).notes == ()
    fields = {"num_experts": 64, "moe_intermediate_size": 8, "hidden_size": 16, "vocab_size": 64}
    wide = Qwen3MoeConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, **fields)
    share = config(sparsity=0.2, targets=("expert",), tensor_parallel=16)
    (experts,) = (space for space in dry_run(wide, share).spaces if space.name == "expert")
    assert experts.after == 48
    for width, devices, lost in ((50, 4, ["4", "8"]), (48, 16, []), (40, 16, ["16"])):
        outcome = str(dry_run(wide, config(widths={"expert": width}, tensor_parallel=devices)))
        assert outcome.count("warning: expert") == bool(lost)
        assert [part.split(")")[0] for part in outcome.split("multiples of ")[1:]] == lost
