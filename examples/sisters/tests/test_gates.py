"""Learned gates: their training, their use, and the models that have none."""

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from helpers import count_hooks, data_of, logits, modes, on_two_ranks, same_weights
from models import CASES, RIGID, build, config, token_ids, tokenizer
from safetensors.torch import load_file
from structprune_sisters import gates
from structprune_sisters.gates import LEAST, MOST, Budget, Gates, Settings, budgets_of, gates_of, multiplying
from trained import loss_ratio, needs_shared, stories_model

from optimum_structprune import StructPruneConfig, StructPruneError, StructPruner, dry_run
from optimum_structprune.arch.load import describe
from optimum_structprune.method.shrink import read_consumer, units_to_columns


QUICK = Settings(steps=12, tokens_per_step=48)
LONG = Settings(steps=120, tokens_per_step=48, learning_rate=0.05)
CPU = torch.device("cpu")


pytestmark = pytest.mark.nightly


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", QUICK)


def ddp_config(**fields):
    return config(**({"criterion": "ddp"} | fields))


def learn_gates(model, data):
    """Return new gates of a model, by layer and space."""
    data = replace(data, cache={})
    return gates_of(model, describe(model), data)


def prune(model, **fields):
    """Return the pruned model, and the pruner with its plan."""
    pruner = StructPruner(ddp_config(**fields))
    return pruner.prune_model(model, tokenizer()), pruner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_gates_do_not_change_the_output(dtype):
    model = build("llama-tied").to(dtype)
    original_logits = logits(model)

    untrained = Gates([Budget(tuple(describe(model).spaces), 0.5)], CPU)
    with multiplying(model, untrained.factors()):
        gated_logits = logits(model)

    assert torch.equal(gated_logits, original_logits)
    assert count_hooks(model) == 0


def test_a_gate_below_zero_removes_its_unit():
    model = build("llama-tied")
    arch = describe(model)
    closed = Gates([Budget(tuple(arch.spaces), 0.5)], CPU)
    with torch.no_grad():
        gates_by_space = closed.values.split(closed.sizes)
        for space, values in zip(arch.spaces, gates_by_space, strict=True):
            values[3] = -0.1
            for axis in space.consumers:
                model.get_parameter(axis.param)[:, axis.indices([3])] = 0
    logits_without_units = logits(model)

    original = build("llama-tied")
    with multiplying(original, closed.factors()):
        torch.testing.assert_close(logits(original), logits_without_units)
    assert (logits(original) - logits_without_units).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({"widths": {"mlp": 24, "attention": 2}}, [0.6, 0.5, 0.6, 0.5]),
        ({"widths": {"mlp": {0: 10}}}, [0.25]),
        ({"skip_layers": (0,)}, [0.6]),
    ],
)
def test_budgets_follow_the_config(fields, shares):
    model = build("llama-tied")
    budgets = budgets_of(ddp_config(**fields), describe(model), model)
    assert sorted(budget.kept for budget in budgets) == pytest.approx(sorted(shares))


def test_the_share_of_open_gates_approaches_the_budget(monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", LONG)
    gates_by_space = learn_gates(build("llama-tied"), data_of(ddp_config()))

    all_gates = torch.cat(list(gates_by_space.values()))
    assert LEAST - 1e-6 <= all_gates.min() < 0
    assert 0.2 < all_gates.max() <= MOST
    for values in gates_by_space.values():
        is_open = values > 2 * gates.SHARP
        assert float(is_open.double().mean()) == pytest.approx(0.6, abs=0.1)


def test_channels_without_influence_on_the_predictions_are_removed(monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", LONG)
    model = build("llama-tied")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5:20] = 0
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0

    _, pruner = prune(model)

    assert not set(range(5, 20)) & set(pruner.result.plan.keep[0, "mlp"])
    assert 7 not in pruner.result.plan.keep[1, "mlp"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unchanged_afterwards(fails, monkeypatch):
    model = build("llama-tied")
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes_before = modes(model)
    random_state = torch.get_rng_state()
    data = data_of(ddp_config())

    if fails:
        monkeypatch.setattr(gates, "divergence", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn_gates(model, data)
    else:
        learn_gates(model, data)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_weights(model, build("llama-tied"))
    assert modes(model) == modes_before
    assert count_hooks(model) == 0
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gates_depend_on_the_seed_alone():
    model = build("llama-tied")
    data = data_of(ddp_config())
    gates_by_space = learn_gates(model, data)
    second_run = learn_gates(model, data)
    other_seed = learn_gates(model, replace(data, config=replace(data.config, seed=1)))

    assert all(torch.equal(values, second_run[key]) for key, values in gates_by_space.items())
    assert any(not torch.equal(values, other_seed[key]) for key, values in gates_by_space.items())


@pytest.mark.parametrize("refit", ["none", "folded", "least_squares"])
def test_gates_scale_the_weights_only_with_the_folded_refit(refit):
    model = build("llama-bias")
    fields = ddp_config(refit=refit, error_feedback=0.0)
    pruner = StructPruner(fields)
    pruned = pruner.prune_model(model, tokenizer())
    gates_by_space = learn_gates(model, data_of(fields))

    for space in describe(model).spaces:
        if space.name != "mlp":
            continue
        (axis,) = space.consumers
        keep = pruner.result.plan.keep[space.layer, "mlp"]
        weight, _ = read_consumer(model, axis)
        kept_weight = weight[:, units_to_columns(keep, axis, CPU)]
        scale = gates_by_space[space.layer, "mlp"][list(keep)].clamp(min=0).float()

        new_weight = pruned.get_parameter(axis.param)
        assert torch.allclose(new_weight, kept_weight * scale) == (refit == "folded")
        assert torch.equal(new_weight, kept_weight) == (refit == "none")


def test_all_rounds_use_the_same_gates():
    model = build("llama-tied")
    _, pruner_of_one_round = prune(model, refit="none", rounds=1)
    _, pruner_of_two_rounds = prune(model, refit="none", rounds=2)
    assert pruner_of_one_round.result.plan == pruner_of_two_rounds.result.plan


ORIGINAL = [
    case for case, (model_type, fields) in CASES.items() if model_type not in RIGID and "experts" not in str(fields)
]


@pytest.mark.parametrize("case", ORIGINAL + ["gemma4_text", "llava", "qwen3_vl"])
def test_gates_are_learned_on_every_dense_family(case, monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", Settings(steps=3, tokens_per_step=24))
    model = build(case)
    arch = describe(model)
    kinds = []
    for name in arch.names:
        space = arch.of(name)[0]
        if space.inside and space.width > 1:
            kinds.append(name)
    budgets = [Budget((space,), 0.5) for space in arch.spaces if space.kind in kinds]

    data = data_of(ddp_config(seq_length=12, widths={"mlp": 24}))
    domain = replace(data.domains[0], samples=token_ids(4, 12))
    with gates.evaluating(model), gates.frozen(model):
        gates_by_space = gates.learned_gates(model, replace(data, domains=[domain]), budgets)

    for key, values in gates_by_space.items():
        assert values.isfinite().all()
        assert len(values.unique()) > 1, f"the gates of {key} have no gradient"


def test_experts_may_remain_while_attention_is_pruned():
    _, pruner = prune(build("mixtral"), widths={"attention": 2})
    assert [len(units) for units in pruner.result.plan.keep.values()] == [2, 2]


def test_gates_are_learned_in_bfloat16():
    pruned, pruner = prune(build("llama-tied").to(torch.bfloat16))
    assert pruned.dtype == torch.bfloat16
    assert [len(units) for units in pruner.result.plan.keep.values()] == [24, 24]


def test_a_divergence_of_nan_is_reported():
    model = build("llama-tied")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(
        StructPruneError, match="divergence from the original model is nan in step 1 of the gates; load"
    ):
        learn_gates(model, data_of(ddp_config()))


# --- refusals


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("bert", {}, "gates by the predictions of the next token, and a model of type 'bert' makes none; choose"),
        ("llama-tied", {"widths": {"hidden": 24}}, "gates on units inside the layers, and 'hidden' is none"),
        ("llama-tied", {"widths": {"layer": 1}}, "gates on units inside the layers, and 'layer' is none"),
        ("mixtral", {}, "criterion='ddp' learns gates on what a matrix reads, and the experts of 'mlp'"),
        ("llama-tied", {"allocation": "sensitivity", "round_to": 1}, "use allocation='uniform'"),
    ],
)
def test_models_and_configs_without_gates_are_refused_before_anything_runs(
    case, fields, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StructPruneError, match=message):
        StructPruner(ddp_config(**fields)).prune_model(build(case), tokenizer())
    assert not list(tmp_path.iterdir())

    with pytest.raises(StructPruneError, match=message):
        dry_run(build(case).config, ddp_config(**fields))


def test_settings_are_read_from_a_text():
    assert Settings.of_text("") == Settings()
    assert Settings.of_text("steps=7,learning_rate=0.5") == Settings(steps=7, learning_rate=0.5)

    for text in ("step=7", "steps=x", "steps", "steps=0", "learning_rate=nan"):
        with pytest.raises(StructPruneError, match=f"STRUCTPRUNE_GATES takes .*, got '{text}'"):
            Settings.of_text(text)


def test_the_refits_of_the_package_are_registered():
    assert StructPruneConfig(sparsity=0.2, refit="slope").refit == "slope"
    with pytest.raises(StructPruneError, match="`refit` must be a registered refit.*Did you mean 'slope'"):
        StructPruneConfig(sparsity=0.2, refit="slop")


# --- several processes, and a trained model

SCRIPT = """
import sys
from safetensors.torch import save_file
sys.path[:0] = sys.argv[2:]
from test_gates import QUICK, build, data_of, ddp_config, gates, learn_gates
gates.SETTINGS = QUICK
from optimum_structprune.system.processes import across_processes, process_index

with across_processes():
    gates_by_space = learn_gates(build("llama-tied"), data_of(ddp_config()))
    gates_by_layer = {str(layer): values for (layer, _), values in gates_by_space.items()}
    save_file(gates_by_layer, f"{sys.argv[1]}/{process_index()}")
"""


def test_two_processes_learn_the_gates_of_one_process(tmp_path):
    on_two_ranks(SCRIPT, tmp_path, tmp_path, Path(__file__).parent, Path(__file__).parents[1])
    first_rank = load_file(tmp_path / "0")
    second_rank = load_file(tmp_path / "1")

    gates_by_space = learn_gates(build("llama-tied"), data_of(ddp_config()))
    for (layer, _), values in gates_by_space.items():
        assert torch.equal(first_rank[str(layer)], second_rank[str(layer)])
        torch.testing.assert_close(first_rank[str(layer)], values, rtol=0, atol=1e-3)


@needs_shared
def test_learned_units_are_better_than_random_units(monkeypatch):
    """Compare the losses of a trained model after pruning without a refit."""
    stories = stories_model()
    monkeypatch.setattr(gates, "SETTINGS", Settings(steps=200, tokens_per_step=512))
    learned_ratio = loss_ratio(stories, criterion="ddp", refit="none")
    random_ratio = loss_ratio(stories, criterion="random", refit="none")
    # The logarithm of the ratio of perplexities is the increase of the loss.
    assert log(learned_ratio) < 0.75 * log(random_ratio)
