"""Test widths by sparsity and by losses, their rounds, and the warnings about widths without fast kernels."""

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
from optimum_structprune.pruning.dryrun import lost_kernels
from optimum_structprune.widths.allocation import ranked_widths, widths_for_sparsity
from optimum_structprune.widths.legal import LEAST_KEPT, multiple_of
from optimum_structprune.widths.schedule import removal_steps, round_widths


def arch_of(layers: int, groups: int, group_cost: int, channels: int, channel_cost: int) -> ArchSpec:
    """Return an architecture whose KV groups and FFN channels cost this many parameters each."""
    heads = (("kv_heads", 1), ("heads", 2))
    spaces = []
    for layer in range(layers):
        spaces.append(Space("attention", layer, groups, (), (), heads, (), group_cost, unit=GROUP))
        spaces.append(Space("mlp", layer, channels, (), (), (("ffn", 1),), (), channel_cost))
    layer_params = groups * group_cost + channels * channel_cost + 7
    return ArchSpec("toy", (("layers", layers),), (layer_params,) * layers, tuple(spaces))


archs = st.builds(
    arch_of, st.integers(1, 4), st.integers(1, 9), st.integers(500, 5000), st.integers(64, 2048), st.integers(5, 50)
)


def removed_params(arch: ArchSpec, widths: dict[str, int]) -> int:
    return sum((space.size - widths.get(space.name, space.size)) * space.unit_params for space in arch.spaces)


def all_widths(arch):
    """Return every width of every space."""
    return {name: list(range(1, arch.of(name)[0].size + 1)) for name in arch.names}


@settings(deadline=None, max_examples=60)
@given(arch=archs, sparsity=st.floats(0.02, 0.9), round_to=st.sampled_from([1, 8, 64]))
def test_sparsity_is_met_within_half_a_step(arch, sparsity, round_to):
    legal = all_widths(arch)
    multiples = {"attention": 1, "mlp": round_to}
    target = sparsity * sum(arch.layer_params)
    channels = arch.of("mlp")[0]
    smallest_widths = {"attention": 1, "mlp": 1}
    if round_to < channels.size:
        smallest_widths["mlp"] = round_to

    if target > removed_params(arch, smallest_widths):
        with pytest.raises(StructPruneError, match="is too large"):
            widths_for_sparsity(arch, sparsity, legal, multiples)
        return

    widths = widths_for_sparsity(arch, sparsity, legal, multiples)
    assert all(width in legal[name] for name, width in widths.items())
    assume(widths["mlp"] < channels.size)
    step = smallest_widths["mlp"] * channels.unit_params * arch.num_layers
    assert abs(removed_params(arch, widths) - target) <= step / 2 + 1e-6


def test_the_automatic_multiple_grows_with_the_model():
    shapes = ((4096, 14336, 256, 256), (2048, 5632, 128, 128), (576, 1536, 32, 32), (64, 172, 4, 4))
    for hidden, channels, expected, expected_of_two in shapes:
        sizes = {"hidden_size": hidden, "intermediate_size": channels, "num_attention_heads": 8}
        with torch.device("meta"):
            fields = LlamaConfig(vocab_size=64, num_key_value_heads=4, num_hidden_layers=5, **sizes)
            arch = describe(LlamaForCausalLM(fields))

        one_device = config(sparsity=0.2)
        assert multiple_of(one_device, arch, "mlp") == expected
        assert multiple_of(one_device, arch, "attention") == 1

        two_devices = config(sparsity=0.2, tensor_parallel=2)
        assert multiple_of(two_devices, arch, "mlp") == expected_of_two
        assert multiple_of(two_devices, arch, "attention") == 2

        assert multiple_of(config(sparsity=0.2, round_to=6), arch, "mlp") == 6


@settings(deadline=None, max_examples=30)
@example(rounds=3, mlp=5, attention=4)
@given(rounds=st.integers(1, 8), mlp=st.integers(1, 40), attention=st.integers(1, 4))
def test_rounds_shrink_the_widths_to_the_target(rounds, mlp, attention):
    arch = arch_of(2, 4, 100, 40, 10)
    widths = {"mlp": mlp, "attention": attention}

    steps = round_widths(StructPruneConfig(widths=widths, rounds=rounds), arch, widths)

    assert len(steps) == rounds
    assert steps[-1] == widths
    if rounds == 3 and mlp == 5:
        assert [step["mlp"] for step in steps] == [20, 10, 5], "every round keeps the same share"
    for name in widths:
        series = [arch.of(name)[0].size] + [step[name] for step in steps]
        assert series == sorted(series, reverse=True)


@settings(deadline=None, max_examples=60)
@given(arch=archs, sparsity=st.floats(0.02, 0.9), round_to=st.sampled_from([1, 8, 64]), seed=st.integers(0, 9))
def test_one_ranking_meets_the_budget_within_half_of_its_cheapest_step(arch, sparsity, round_to, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {(space.layer, space.name): torch.randn(space.size, generator=generator) for space in arch.spaces}
    pruning = StructPruneConfig(allocation="sensitivity", sparsity=sparsity, round_to=round_to)
    try:
        widths = ranked_widths(pruning, arch, all_widths(arch), scores)
    except StructPruneError as error:
        assert "layer keeps 10% of its units" in str(error)
        return

    removed = 0
    steps = []
    for space in arch.spaces:
        width = widths[space.name][space.layer]
        assert width >= LEAST_KEPT * space.size or width == space.size
        removed += (space.size - width) * space.unit_params

        smallest_width = max(1, LEAST_KEPT * space.size)
        multiple = 1
        if space.name == "mlp" and round_to < space.size:
            multiple = round_to
        smaller_widths = [w for w in range(1, width) if w % multiple == 0 and w >= smallest_width]
        if smaller_widths:
            steps.append(space.unit_params * (width - smaller_widths[-1]))

    tolerance = min(steps, default=removed) / 2 + 1e-6
    assert abs(removed - sparsity * sum(arch.layer_params)) <= tolerance


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), mean=st.integers(40, 90))
def test_one_ranking_keeps_the_highest_scores(seed, mean):
    arch = arch_of(3, 4, 100, 100, 10)
    generator = torch.Generator().manual_seed(seed)
    scores = {(layer, "mlp"): torch.randn(100, generator=generator) + layer / 4 for layer in range(3)}
    pruning = StructPruneConfig(widths={"mlp": mean}, allocation="sensitivity", round_to=1)

    widths = ranked_widths(pruning, arch, {"mlp": list(range(1, 101))}, scores)["mlp"]

    assert sum(widths.values()) == 3 * mean
    kept_scores = []
    removed_scores = []
    for layer, width in widths.items():
        ascending = scores[layer, "mlp"].sort().values.tolist()
        removed_scores += ascending[: 100 - width]
        kept_scores += ascending[100 - width :]
    assert max(removed_scores) <= min(kept_scores)


@pytest.mark.parametrize(("widths", "expected"), [
    ({"mlp": {1: 16}, "attention": 2}, {"mlp": {0: 40, 1: 16}, "attention": {0: 2, 1: 2}}),
    ({"mlp": [24, 24]}, {"mlp": {0: 24, 1: 24}}),
])  # fmt: skip
@pytest.mark.parametrize("rounds", [1, 2])
def test_every_layer_may_have_its_own_width(widths, expected, rounds):
    pruner = StructPruner(config(widths=widths, rounds=rounds))

    small = pruner.prune_model(build("llama-tied"), tokenizer())

    ffn_widths = list(expected["mlp"].values())
    assert pruner.result.report.widths == expected
    assert [layer.mlp.down_proj.in_features for layer in small.model.layers] == ffn_widths
    assert small.config.is_heterogeneous == (len(set(ffn_widths)) > 1)
    reloaded = StructPruneConfig.from_dict(json.loads(json.dumps(pruner.config.to_dict())))
    assert reloaded.widths == pruner.config.widths


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_the_only_dense_layer_of_a_mixture_may_be_skipped(allocation):
    pruner = StructPruner(config(widths=None, sparsity=0.1, skip_layers=(0,), allocation=allocation))

    pruner.prune_model(build("deepseek_v2"), tokenizer())

    assert {layer for layer, _ in pruner.result.plan.keep} == {1}


def test_the_steps_of_a_removal_follow_the_schedule():
    assert removal_steps(config(rounds=4), 0.2, 1.0, None, 10) == [2, 5, 7, 10]
    assert removal_steps(config(), 2, 8, None, 10) == [2, 4, 6, 8]
    assert removal_steps(config(), 7, 8, None, 10) == [7, 8]
    assert removal_steps(config(rounds=1), 1.0, None, None, 10) == [10]
    assert removal_steps(config(rounds=4), 2, 9, 3, 10) == [2, 5, 8]
    assert removal_steps(config(rounds=1), 0.0, None, None, 10) == [1]


def test_an_impossible_schedule_is_refused():
    for start, end, every, message in (
        (0.5, 0.2, None, "`end=0.2` is step 2, before `start=0.5`, step 5"),
        (-3, None, None, "`start` must be a step, or a share of all steps from 0.0 to 1.0, got -3"),
        (1.5, None, None, "got 1.5"),
        (float("nan"), None, None, "got nan"),
        ("0.5", None, None, "got '0.5'"),
        (2, 8, 0, "`every` must be a number of steps, at least 1, got 0"),
        (2, None, 3, "`every=3` divides the removal up to `end`. Set `end`, or remove `every`"),
        (2, 11, 3, "is after step 11, but training has 10 steps"),
    ):
        with pytest.raises(StructPruneError, match=message):
            removal_steps(config(), start, end, every, 10)


def llama_config(channels):
    return LlamaConfig(
        vocab_size=64,
        num_hidden_layers=2,
        hidden_size=1024,
        intermediate_size=channels,
        num_attention_heads=16,
        num_key_value_heads=8,
    )


def multiples_in(text):
    """Return the multiples that a warning about lost kernels names."""
    return [part.split(")")[0] for part in text.split("multiples of ")[1:]]


@pytest.mark.parametrize(("widths", "devices", "multiples"), [
    ({"mlp": 2048}, 1, []),
    ({"mlp": 2048, "attention": 4}, 4, []),
    ({"mlp": 1152}, 1, ["256"]),
    ({"mlp": {0: 3072, 1: 1120}}, 1, ["64", "128", "256"]),
    # K-quants, and groups of 128 on each of two devices.
    ({"mlp": 1152}, 2, ["256", "256"]),
    ({"mlp": 2000}, 1, ["32", "64", "128", "256"]),
    ({"attention": 3}, 2, ["2"]),
])  # fmt: skip
def test_a_warning_names_the_kernels_that_widths_lose(widths, devices, multiples):
    with torch.device("meta"):
        arch = describe(LlamaForCausalLM(llama_config(3072)))

    notes = list(lost_kernels(config(widths=widths, tensor_parallel=devices), arch, widths))

    assert len(notes) == bool(multiples)
    assert multiples_in(" ".join(notes)) == multiples


def test_widths_from_a_share_lose_no_kernels():
    outcome = dry_run(llama_config(12800), config(sparsity=0.2, tensor_parallel=2))

    assert outcome.notes == ()


def test_numbers_of_experts_suit_the_devices():
    mixture = Qwen3MoeConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=64,
        moe_intermediate_size=8,
        hidden_size=16,
        vocab_size=64,
    )

    outcome = dry_run(mixture, config(sparsity=0.2, targets=("expert",), tensor_parallel=16))
    (experts,) = [space for space in outcome.spaces if space.name == "expert"]
    assert experts.after == 48

    for width, devices, multiples in ((50, 4, ["4", "8"]), (48, 16, []), (40, 16, ["16"])):
        text = str(dry_run(mixture, config(widths={"expert": width}, tensor_parallel=devices)))
        assert text.count("warning: expert") == bool(multiples)
        assert multiples_in(text) == multiples
