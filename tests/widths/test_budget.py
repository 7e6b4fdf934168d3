"""Test that widths are the largest ones within a budget."""

import re

import pytest
import torch
from helpers import config_of
from models import STRUCTURES, build, config, described, random_model, tokenizer

from optimum_structprune import StructPruneError, dry_run, prune_model
from optimum_structprune.arch.generation import cached_values
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import skeleton
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.system.stages import model_bytes
from optimum_structprune.vocabulary.amount import with_tokens
from optimum_structprune.widths.allocation import widths_of
from optimum_structprune.widths.budget import active_parameters, budget_of
from optimum_structprune.widths.legal import legal_widths


def budget_config(name, limit, **fields):
    """Return a config with the budget `name`. By default, widths may be multiples of any number."""
    defaults = {"sparsity": None, "round_to": 1, "budget": {name: limit}}
    return config(**(defaults | fields))


def targets_of(arch):
    """Return all targets except whole experts, which exclude the channels inside experts as targets."""
    return tuple(name for name in arch.names if arch.of(name)[0].inside)


def smaller_skeleton(model, arch, widths):
    return skeleton(model, shrunk_config(model.config, arch, widths))


def parameters_after(model, arch, widths):
    return smaller_skeleton(model, arch, widths).num_parameters()


def assert_largest_widths(model, arch, settings, limit, widths):
    """Check that the widths meet a limit of parameters, and that one more unit in any space would exceed it."""
    assert parameters_after(model, arch, widths) <= limit

    for name, legal in legal_widths(settings, arch, model.config).items():
        larger = [width for width in legal if width > widths[name]]
        if larger:
            assert parameters_after(model, arch, widths | {name: larger[0]}) > limit, widths


@pytest.mark.parametrize("case", STRUCTURES)
def test_widths_are_the_largest_within_a_budget(case):
    model = build(case)
    arch = describe(model)
    targets = targets_of(arch)

    for share in (0.03, 0.2, 0.4, 0.9):
        limit = round(model.num_parameters() - share * sum(arch.layer_params))
        settings = budget_config("parameters", limit, targets=targets)
        try:
            widths = widths_of(settings, arch, model)
        except StructPruneError as error:
            assert share >= 0.4
            assert "cannot be met" in str(error)
            # The message names the smallest size, which must be a possible budget.
            smallest_size = re.search(r"still has ([\d,]+)", str(error))[1]
            limit = int(smallest_size.replace(",", ""))
            settings = budget_config("parameters", limit, targets=targets)
            widths = widths_of(settings, arch, model)
            assert parameters_after(model, arch, widths) == limit

        assert_largest_widths(model, arch, settings, limit, widths)


@pytest.mark.parametrize(("case", "target"), [
    ("llama-tied", "layer"), ("llama-tied", "hidden"), ("qwen3_moe", "hidden"),
])  # fmt: skip
def test_layers_and_hidden_channels_are_the_largest_within_a_budget(case, target):
    model = build(case)
    arch = describe(model)
    limit = round(model.num_parameters() - 0.3 * model.num_parameters())
    settings = budget_config("parameters", limit, targets=(target,))

    widths = widths_of(settings, arch, model)

    assert_largest_widths(model, arch, settings, limit, widths)


@pytest.mark.parametrize(("dtype", "fields"), [
    (torch.float32, {"rounds": 2}),
    (torch.float32, {"round_to": 8}),
    (torch.float32, {"allocation": "sensitivity"}),
    (torch.float32, {"skip_layers": (1,)}),
    (torch.bfloat16, {}),
])  # fmt: skip
def test_pruning_keeps_to_a_budget_of_bytes(dtype, fields):
    model = build("llama-tied").to(dtype)
    settings = budget_config("bytes", 14_000 * dtype.itemsize, **fields)

    small = prune_model(model, settings, tokenizer())

    by_losses = "allocation" in fields
    largest_step = 96 * 2
    if by_losses:
        largest_step = max(space.unit_params for space in describe(model).spaces)
    assert 14_000 - largest_step * settings.round_to < small.num_parameters() <= 14_000
    if not by_losses:
        saved_config = config_of(model)
        saved_config.dtype = dtype
        assert dry_run(saved_config, settings).parameters.after == small.num_parameters()


@pytest.mark.parametrize(("case", "targets"), [("bart", ("vocab",)), ("bart", ("decoder_mlp",))])
def test_a_budget_of_bytes_counts_the_saved_weights_and_buffers(case, targets):
    """BART saves a bias of the logits as a buffer."""
    model = build(case)
    arch = describe(model)
    original_bytes = model_bytes(model)
    assert original_bytes > 4 * model.num_parameters()

    budget = budget_of(budget_config("bytes", 0.9, targets=targets), arch, model, targets)

    assert budget.original == original_bytes
    assert budget.limit == int(0.9 * original_bytes)
    for num_removed in (1, 10):
        widths = {name: arch.of(name)[0].size - num_removed for name in targets}
        assert budget.cost(widths) == model_bytes(smaller_skeleton(model, arch, widths))


def parameters_that_run(model):
    """Count the parameters of a model by their names: of experts, the share that a token chooses."""
    share = model.config.num_experts_per_tok / model.config.num_local_experts
    return sum(param.numel() * (share if ".experts." in name else 1) for name, param in model.named_parameters())


@pytest.mark.parametrize("targets", [("mlp",), ("mlp", "attention"), ("hidden",), ("layer",)])
def test_a_budget_of_active_parameters_counts_the_experts_that_a_token_chooses(targets):
    model = build("mixtral")
    arch = describe(model)
    assert active_parameters(model, arch) == parameters_that_run(model) < model.num_parameters()
    limit = int(0.8 * active_parameters(model, arch))
    settings = budget_config("active_parameters", limit, targets=targets)

    widths = widths_of(settings, arch, model)

    small = smaller_skeleton(model, arch, widths)
    assert parameters_that_run(small) == active_parameters(small, describe(small)) <= limit
    for name, legal in legal_widths(settings, arch, model.config).items():
        larger = [width for width in legal if width > widths[name]]
        if larger:
            assert parameters_that_run(smaller_skeleton(model, arch, widths | {name: larger[0]})) > limit

    dry = dry_run(config_of(model), settings)
    assert dry.active_parameters.after == parameters_that_run(small)
    assert f"meets the budget: active_parameters {dry.active_parameters.after:,} of {limit:,}" in dry.notes


def test_fewer_experts_do_not_change_the_active_parameters():
    mixtral = build("mixtral")
    message = "targets=.'expert'.* do not change that. Target 'vocab' or 'mlp' or 'attention' or 'layer'"
    with pytest.raises(StructPruneError, match=message):
        widths_of(budget_config("active_parameters", 0.8, targets=("expert",)), describe(mixtral), mixtral)

    llama = build("llama-tied")
    with pytest.raises(StructPruneError, match="llama model has no experts .* by 'parameters' in `budget`"):
        widths_of(budget_config("active_parameters", 0.8), describe(llama), llama)


@pytest.mark.parametrize(("case", "limits"), [
    ("llama-tied", {"bytes": 0.85, "cache_bytes_per_token": 0.5}),
    ("llama-tied", {"bytes": 0.98, "cache_bytes_per_token": 0.5}),
    ("llama-tied", {"cache_bytes_per_token": 0.9, "parameters": 0.8}),
    ("mixtral", {"active_parameters": 0.9, "cache_bytes_per_token": 0.6}),
    ("mixtral", {"parameters": 0.7, "active_parameters": 0.9}),
])  # fmt: skip
def test_several_limits_are_met_at_once(case, limits):
    """No space can have a larger width without exceeding one of them."""
    model = build(case)
    arch = describe(model)
    settings = config(sparsity=None, round_to=1, budget=limits, targets=("mlp", "attention"))

    def figures(widths):
        return {
            name: budget_of(budget_config(name, 0.5), arch, model, widths).figures(widths)[name] for name in limits
        }

    original = figures({})

    def meets_limits(widths):
        return all(figure <= limits[name] * original[name] for name, figure in figures(widths).items())

    widths = widths_of(settings, arch, model)

    assert meets_limits(widths) and not meets_limits({})
    for name, legal in legal_widths(settings, arch, model.config).items():
        larger = [width for width in legal if width > widths[name]]
        if larger:
            assert not meets_limits(widths | {name: larger[0]}), widths
    note = next(note for note in dry_run(config_of(model), settings).notes if note.startswith("meets the budget"))
    assert all(f"{name} {figures(widths)[name]:,} of" in note for name in limits)


def test_several_limits_are_refused_by_the_one_that_cannot_be_met():
    model = build("llama-tied")
    arch = describe(model)
    settings = config(
        sparsity=None, budget={"bytes": 0.9, "cache_bytes_per_token": 0.01}, targets=("mlp", "attention")
    )
    with pytest.raises(StructPruneError, match="budget cache_bytes_per_token=.* cannot be met"):
        widths_of(settings, arch, model)

    settings = config(sparsity=None, budget={"parameters": 1e9, "bytes": 1e9})
    with pytest.raises(StructPruneError, match="parameters=.* and bytes=.* are met by the original model"):
        widths_of(settings, arch, model)


@pytest.mark.parametrize("case", ["llama-tied", "mixtral"])
def test_only_attention_shrinks_for_a_budget_of_the_cache(case):
    model = build(case)
    arch = describe(model)
    limit = 0.6 * 4 * cached_values(skeleton(model, model.config), arch)
    settings = budget_config("cache_bytes_per_token", limit, targets=targets_of(arch))
    assert widths_of(settings, arch, model).keys() == {"attention"}

    small = prune_model(model, settings, tokenizer())
    group_counts = {space.width for space in describe(small).of("attention")}
    assert group_counts == {2}, "2 of 4 groups need half of the cache"

    settings = budget_config("cache_bytes_per_token", limit, targets=("mlp",))
    with pytest.raises(StructPruneError, match="targets=.'mlp'.* do not change that. Target 'attention' or 'layer'"):
        widths_of(settings, arch, model)


def test_experts_have_no_part_in_a_budget_of_the_cache():
    """All layers of this model must have the same number of experts, so no model has fewer in one layer alone."""
    mixtral = build("mixtral")
    arch = describe(mixtral)

    settings = budget_config("cache_bytes_per_token", 0.8, targets=("expert", "attention"), skip_layers=[0])
    assert widths_of(settings, arch, mixtral).keys() == {"attention"}

    settings = budget_config("cache_bytes_per_token", 0.8, targets=("expert",), skip_layers=[0])
    with pytest.raises(StructPruneError, match="targets=.'expert'.* do not change that. Target 'attention'"):
        widths_of(settings, arch, mixtral)


@pytest.mark.parametrize("case", ["deepseek_v3", "opt"])
def test_only_fewer_layers_shrink_the_cache_of_rigid_attention(case):
    """The heads of these models share their cache or cannot be removed."""
    model = build(case)

    with pytest.raises(StructPruneError, match="do not change that. Target 'layer'"):
        widths_of(budget_config("cache_bytes_per_token", 0.8), describe(model), model)


def test_a_model_without_the_space_mlp_loses_its_other_channels():
    bart = build("bart")
    arch = describe(bart)
    assert widths_of(config(sparsity=0.2), arch, bart).keys() == {"encoder_mlp", "decoder_mlp"}

    message = "At most .* parameters can be removed from encoder_mlp, decoder_mlp. Lower it.$"
    with pytest.raises(StructPruneError, match=message):
        widths_of(config(sparsity=0.7), arch, bart)


def test_a_model_without_channels_loses_only_tokens():
    auto_class, model_type, fields = described("bloom")
    bloom = random_model(auto_class, model_type, fields | {"vocab_size": 2000})
    assert with_tokens(budget_config("parameters", 0.9), ModelInfo.of(bloom)).targets == ("vocab",)

    with pytest.raises(StructPruneError, match="type 'bloom' has no space 'mlp' to prune.* Known: layer, vocab"):
        widths_of(config(sparsity=0.2), describe(bloom), bloom)

    zamba = build("zamba2")
    with pytest.raises(StructPruneError, match="no space 'vocab' to prune: transformers runs it only with a cache"):
        widths_of(budget_config("parameters", 0.9, targets=("vocab",)), describe(zamba), zamba)


def test_an_impossible_budget_is_refused_with_advice():
    model = build("llama-tied")
    arch = describe(model)
    with pytest.raises(StructPruneError, match="met by the original model, with 17,056"):
        widths_of(budget_config("parameters", 17_056), arch, model)

    for target, advice in (("mlp", "'vocab', 'attention'"), ("vocab", "'mlp', 'attention'")):
        message = f"cannot be met: .* of {target} .* targets: {advice}, or target"
        with pytest.raises(StructPruneError, match=message):
            widths_of(budget_config("parameters", 9_000, targets=(target,)), arch, model)

    bert = build("bert")
    with pytest.raises(StructPruneError, match="are not known: it does not generate"):
        widths_of(budget_config("cache_bytes_per_token", 10), describe(bert), bert)
