"""The largest widths that keep to a budget."""

import re

import pytest
import torch
from helpers import config_of
from models import STRUCTURES, build, config, described, random_model, tokenizer

from optimum_structprune import StructPruneError, dry_run, prune_model
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import skeleton
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.forward.generation import cached_values
from optimum_structprune.system.stages import model_bytes
from optimum_structprune.vocabulary.amount import with_tokens
from optimum_structprune.widths.allocation import widths_of
from optimum_structprune.widths.budget import budget_of
from optimum_structprune.widths.legal import legal_widths


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


@pytest.mark.parametrize(("case", "targets"), [("bart", ("vocab",)), ("bart", ("decoder_mlp",))])
def test_bytes_are_those_of_the_saved_weights_with_their_buffers(case, targets):
    """BART saves a bias of the logits as a buffer."""
    model = build(case)
    arch = describe(model)
    dense = model_bytes(model)
    assert dense > 4 * model.num_parameters()
    budget = budget_of(asking("bytes", 0.9, targets=targets), arch, model, targets)
    assert budget.dense == dense and budget.limit == int(0.9 * dense)
    for width in (1, 10):
        widths = {name: arch.of(name)[0].size - width for name in targets}
        assert budget.cost(widths) == model_bytes(skeleton(model, shrunk_config(model.config, arch, widths)))


@pytest.mark.parametrize("case", ["llama-tied", "mixtral"])
def test_the_cache_shrinks_by_attention_alone(case):
    model = build(case)
    arch = describe(model)
    dense = cached_values(skeleton(model, model.config), arch) * 4
    wish = asking("cache_bytes_per_token", 0.6 * dense, targets=targets_of(arch))
    assert set(widths_of(wish, arch, model)) == {"attention"}
    small = prune_model(model, wish, tokenizer())
    cached = {space.width for space in describe(small).of("attention")}
    assert cached == {2}, "of 4 groups, 2 take half of the cache"
    with pytest.raises(StructPruneError, match="targets=.'mlp'.* do not change that; target 'attention' or 'layer'"):
        widths_of(asking("cache_bytes_per_token", 0.6 * dense, targets=("mlp",)), arch, model)

    # Where heads share their cache or cannot go, only fewer layers shrink it.
    for rigid in (build("deepseek_v3"), build("opt")):
        with pytest.raises(StructPruneError, match="do not change that; target 'layer'"):
            widths_of(asking("cache_bytes_per_token", 0.8), describe(rigid), rigid)


def test_a_model_without_mlp_gives_all_its_channels_or_its_tokens_alone():
    auto, kind, fields = described("bloom")
    bart, bloom = build("bart"), random_model(auto, kind, {**fields, "vocab_size": 2000})
    assert widths_of(config(sparsity=0.2), describe(bart), bart).keys() == {"encoder_mlp", "decoder_mlp"}
    with pytest.raises(
        StructPruneError, match="At most .* parameters can be removed from encoder_mlp, decoder_mlp. Lower it.$"
    ):
        widths_of(config(sparsity=0.7), describe(bart), bart)
    assert with_tokens(asking("parameters", 0.9), ModelInfo.of(bloom)).targets == ("vocab",)
    with pytest.raises(StructPruneError, match="type 'bloom' has no space 'mlp' to prune.* Known: layer, vocab"):
        widths_of(config(sparsity=0.2), describe(bloom), bloom)
    with pytest.raises(StructPruneError, match="no space 'vocab' to prune: transformers runs it only with a cache"):
        widths_of(asking("parameters", 0.9, targets=("vocab",)), describe(build("zamba2")), build("zamba2"))


def test_what_cannot_be_met_names_what_can():
    model = build("llama-tied")
    arch = describe(model)
    with pytest.raises(StructPruneError, match="met by the dense model, with 17,056"):
        widths_of(asking("parameters", 17_056), arch, model)
    for target, others in (("mlp", "'vocab', 'attention'"), ("vocab", "'mlp', 'attention'")):
        with pytest.raises(StructPruneError, match=f"cannot be met: .* of {target} .* targets: {others}, or target"):
            widths_of(asking("parameters", 9_000, targets=(target,)), arch, model)
    bert = build("bert")
    with pytest.raises(StructPruneError, match="are not known: it does not generate"):
        widths_of(asking("cache_bytes_per_token", 10), describe(bert), bert)
