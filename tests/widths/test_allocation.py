"""Widths from shares and from budgets, by layers and by rounds, and the fast kernels that widths lose."""

import json
import re

import pytest
import torch
from helpers import config_of, counted_by_torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from models import STRUCTURES, build, config, described, random_model, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from optimum_structprune import StructPruneConfig, StructPruneError, StructPruner, dry_run, prune_model
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import skeleton
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.arch.spec import GROUP, ArchSpec, Space
from optimum_structprune.dryrun import lost_kernels
from optimum_structprune.forward.generation import cached_values
from optimum_structprune.vocabulary.amount import with_tokens
from optimum_structprune.widths.allocation import (
    LEAST_KEPT,
    legal_widths,
    multiple_of,
    ranked_widths,
    widths_for_sparsity,
)
from optimum_structprune.widths.budget import widths_of
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
        with pytest.raises(StructPruneError, match="is more than"):
            widths_for_sparsity(arch, sparsity, legal, steps)
        return
    widths = widths_for_sparsity(arch, sparsity, legal, steps)
    assert all(width in legal[name] for name, width in widths.items())
    channels = arch.of("mlp")[0]
    assume(widths["mlp"] < channels.size)
    step = most["mlp"] * channels.unit_params * arch.num_layers
    assert abs(removed(arch, widths) - sparsity * sum(arch.layer_params)) <= step / 2 + 1e-6


def test_auto_is_64_in_models_of_usual_size():
    for hidden, channels, expected, shared in ((2048, 5632, 64, 128), (576, 1536, 32, 32), (64, 172, 4, 4)):
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
@given(
    arch=archs,
    sparsity=st.floats(0.02, 0.9),
    round_to=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 9),
)
def test_one_ranking_meets_the_budget_within_half_of_its_cheapest_step(arch, sparsity, round_to, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {(space.layer, space.name): torch.randn(space.size, generator=generator) for space in arch.spaces}
    legal = {name: list(range(1, arch.of(name)[0].size + 1)) for name in arch.names}
    chosen = StructPruneConfig(allocation="sensitivity", sparsity=sparsity, round_to=round_to)
    try:
        widths = ranked_widths(chosen, arch, legal, scores)
    except StructPruneError as error:
        assert "each keeps 10% of its units" in str(error)
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
        ((2, 11, 3), "go after step 11, but training has 10 steps"),
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


def asking(name, most, **fields):
    return config(**{"sparsity": None, "round_to": 1, "budget": {name: most}, **fields})


def targets_of(arch):
    """What sparsity may spread over: channels inside experts do not go together with whole experts."""
    return tuple(name for name in arch.names if arch.of(name)[0].inside)


def parameters(model, arch, widths):
    return skeleton(model, shrunk_config(model.config, arch, widths)).num_parameters()


@pytest.mark.parametrize(("case", "name"), [
    *((case, None) for case in STRUCTURES), ("llama-tied", "layer"), ("llama-tied", "hidden"), ("qwen3_moe", "hidden"),
])  # fmt: skip
def test_it_is_kept_to_and_one_unit_more_would_not(case, name):
    model = build(case)
    arch = describe(model)
    dense, targets = model.num_parameters(), targets_of(arch) if name is None else (name,)
    for share in (0.03, 0.2, 0.4, 0.9) if name is None else (0.3,):
        most = round(dense - share * (sum(arch.layer_params) if name is None else dense))
        wish = asking("parameters", most, targets=targets)
        try:
            widths = widths_of(wish, arch, model)
        except StructPruneError as error:
            assert share >= 0.4 and "cannot be met" in str(error)
            most = int(re.search(r"still has ([\d,]+)", str(error))[1].replace(",", ""))
            widths = widths_of(asking("parameters", most, targets=targets), arch, model)
            assert parameters(model, arch, widths) == most
        assert parameters(model, arch, widths) <= most
        for name_of_one, legal in legal_widths(wish, arch, model.config).items():
            larger = [width for width in legal if width > widths[name_of_one]]
            assert not larger or parameters(model, arch, {**widths, name_of_one: larger[0]}) > most, widths


@pytest.mark.parametrize(
    "fields", [{"rounds": 2}, {"round_to": 8}, {"allocation": "sensitivity"}, {"skip_layers": (1,)}, {"dtype": 2}]
)
def test_pruning_keeps_to_it(fields):
    itemsize = fields.pop("dtype", 4)
    model = build("llama-tied").to(torch.bfloat16 if itemsize == 2 else torch.float32)
    arch = describe(model)
    wish = asking("bytes", 14_000 * itemsize, **fields)
    small = prune_model(model, wish, tokenizer())
    step = max(space.unit_params for space in arch.spaces) if fields.get("allocation") else 96 * 2
    assert 14_000 - step * wish.round_to < small.num_parameters() <= 14_000
    if "allocation" not in fields:
        saved = config_of(model)
        saved.dtype = model.dtype
        assert dry_run(saved, wish).parameters.after == small.num_parameters()


@pytest.mark.parametrize("case", ["llama-tied", "mixtral"])
def test_the_cache_shrinks_by_attention_alone(case):
    model = build(case)
    arch = describe(model)
    dense = cached_values(skeleton(model, model.config), arch) * 4
    wish = asking("cache_bytes_per_token", 0.6 * dense, targets=targets_of(arch))
    widths = widths_of(wish, arch, model)
    assert set(widths) == {"attention"}
    small = prune_model(model, wish, tokenizer())
    cached = {space.width for space in describe(small).of("attention")}
    assert cached == {2}, "of 4 groups, 2 take half of the cache"
    with pytest.raises(StructPruneError, match="targets=.'mlp'.* leave that as it is; target 'attention' or 'layer'"):
        widths_of(asking("cache_bytes_per_token", 0.6 * dense, targets=("mlp",)), arch, model)

    # Where heads share their cache, only fewer layers shrink it.
    latent = build("deepseek_v3")
    with pytest.raises(StructPruneError, match="leave that as it is; target 'layer'"):
        widths_of(asking("cache_bytes_per_token", 0.8), describe(latent), latent)


def test_operations_are_those_that_torch_counts():
    model = build("gpt2-tied")

    def counted(one):
        return counted_by_torch(one, 24)

    most = round(0.9 * counted(model))
    wish = asking("flops_per_token", most, targets=targets_of(describe(model)), seq_length=24)
    assert 0.85 * counted(model) < counted(prune_model(model, wish, tokenizer())) <= most
    with pytest.raises(StructPruneError, match="how many of its experts .* is not known"):
        prune_model(build("llama4_text"), asking("flops_per_token", 1e4), tokenizer())


def test_a_model_without_mlp_gives_all_its_channels_or_its_tokens_alone():
    auto, kind, fields = described("bloom")
    bart, bloom = build("bart"), random_model(auto, kind, {**fields, "vocab_size": 2000})
    assert widths_of(config(sparsity=0.2), describe(bart), bart).keys() == {"encoder_mlp", "decoder_mlp"}
    with pytest.raises(StructPruneError, match="encoder_mlp, decoder_mlp can give: at most .* parameters; lower it.$"):
        widths_of(config(sparsity=0.7), describe(bart), bart)
    assert with_tokens(asking("parameters", 0.9), ModelInfo.of(bloom)).targets == ("vocab",)
    with pytest.raises(StructPruneError, match="bloom model has no space 'mlp' to prune.* Known: layer, vocab"):
        widths_of(config(sparsity=0.2), describe(bloom), bloom)
    with pytest.raises(StructPruneError, match="no space 'vocab' to prune: transformers runs it only with a cache"):
        widths_of(asking("parameters", 0.9, targets=("vocab",)), describe(build("zamba2")), build("zamba2"))


def test_what_cannot_be_met_names_what_can():
    model = build("llama-tied")
    arch = describe(model)
    with pytest.raises(StructPruneError, match="met by the dense model, which has 17,056"):
        widths_of(asking("parameters", 17_056), arch, model)
    for target, others in (("mlp", "'vocab', 'attention'"), ("vocab", "'mlp', 'attention'")):
        with pytest.raises(StructPruneError, match=f"cannot be met: .* from {target} .* targets: {others}, or target"):
            widths_of(asking("parameters", 9_000, targets=(target,)), arch, model)
    with pytest.raises(StructPruneError, match="no space 'mpl' to prune"):
        widths_of(asking("parameters", 9_000, targets=("mpl",)), arch, model)
    bert = build("bert")
    with pytest.raises(StructPruneError, match="are not known: it does not generate"):
        widths_of(asking("cache_bytes_per_token", 10, targets=("mlp",)), describe(bert), bert)
    for budget, message in (
        ({"parameter": 9}, "no 'parameter'. Did you mean 'parameters'"),
        ({"parameters": 0}, "has to be greater than 0, got 0"),
        ({}, "names exactly one of parameters, bytes, cache_bytes_per_token"),
        ({"parameters": 9, "bytes": 9}, "names exactly one of"),
    ):
        with pytest.raises(StructPruneError, match=message):
            StructPruneConfig.from_dict({"budget": budget})
    with pytest.raises(StructPruneError, match="exactly one of sparsity, widths and budget"):
        StructPruneConfig.from_dict({"sparsity": 0.2, "budget": {"parameters": 9}})
