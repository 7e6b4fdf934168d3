"""Gates on units: what is learned, what stays as it was, and what a killed training goes on from."""

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


pytestmark = pytest.mark.nightly


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", QUICK)


def settings(**fields):
    return config(**{"criterion": "ddp", **fields})


def learned(model, fields, data=None):
    """The gates by layer and space."""
    data = data_of(fields) if data is None else replace(data, cache={})
    return dict(gates_of(model, describe(model), data))


def pruned(model, **fields):
    pruner = StructPruner(settings(**fields))
    return pruner.prune_model(model, tokenizer()), pruner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_at_their_beginning_are_the_dense_model(dtype):
    model = build("llama-tied").to(dtype)
    fresh = Gates([Budget(tuple(describe(model).spaces), 0.5)], torch.device("cpu"))
    dense = logits(model)
    with multiplying(model, fresh.factors()):
        gated = logits(model)
    assert torch.equal(gated, dense) and count_hooks(model) == 0


def test_gates_multiply_what_their_units_own():
    """A gate at 0, and any below, is the model without the unit."""
    model = build("llama-tied")
    arch = describe(model)
    shut = Gates([Budget(tuple(arch.spaces), 0.5)], torch.device("cpu"))
    for number, space in enumerate(arch.spaces):
        with torch.no_grad():
            shut.values.split(shut.sizes)[number][3] = -0.1
            for axis in space.consumers:
                model.get_parameter(axis.param)[:, axis.indices([3])] = 0
    without = logits(model)
    dense = build("llama-tied")
    with multiplying(dense, shut.factors()):
        torch.testing.assert_close(logits(dense), without)
    assert (logits(dense) - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "budgets"),
    [
        ({"widths": {"mlp": 24, "attention": 2}}, [0.6, 0.5, 0.6, 0.5]),
        ({"widths": {"mlp": {0: 10}}}, [0.25]),
        ({"skip_layers": (0,)}, [0.6]),
    ],
)
def test_budgets_are_what_the_config_asks_for(fields, budgets):
    model = build("llama-tied")
    found = budgets_of(settings(**fields), describe(model), model)
    assert sorted(budget.kept for budget in found) == pytest.approx(sorted(budgets))


def test_the_share_of_open_gates_comes_to_the_budget(monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", LONG)
    found = learned(build("llama-tied"), settings())
    values = torch.cat(list(found.values()))
    assert LEAST - 1e-6 <= values.min() < 0 and 0.2 < values.max() <= MOST
    for part in found.values():
        assert float((part > 2 * gates.SHARP).double().mean()) == pytest.approx(0.6, abs=0.1)


def test_what_the_predictions_do_not_need_goes(monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", LONG)
    model = build("llama-tied")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5:20] = 0
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
    _, pruner = pruned(model)
    assert not set(range(5, 20)) & set(pruner.plan.keep[0, "mlp"]) and 7 not in pruner.plan.keep[1, "mlp"]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_changes(fails, monkeypatch):
    model = build("llama-tied")
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, grads = build("llama-tied"), {name: one.requires_grad for name, one in model.named_parameters()}
    mode, state = modes(model), torch.get_rng_state()
    data = data_of(settings())
    if fails:
        monkeypatch.setattr(gates, "divergence", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learned(model, None, data)
    else:
        learned(model, None, data)
    assert same_weights(model, before) and modes(model) == mode and count_hooks(model) == 0
    assert {name: one.requires_grad for name, one in model.named_parameters()} == grads
    assert all(one.grad is None for one in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides():
    model, fields = build("llama-tied"), settings()
    data = data_of(fields)
    first, again = (learned(model, fields, data) for _ in range(2))
    other = learned(model, None, replace(data, config=replace(fields, seed=1)))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("refit", ["none", "folded", "least_squares"])
def test_only_where_it_is_folded_a_gate_scales(refit):
    model, fields = build("llama-bias"), settings(refit=refit, error_feedback=0.0)
    pruner = StructPruner(fields)
    small = pruner.prune_model(model, tokenizer())
    found, arch = learned(model, fields), describe(model)
    for space in (one for one in arch.spaces if one.name == "mlp"):
        (axis,) = space.consumers
        keep = pruner.plan.keep[space.layer, "mlp"]
        dense = read_consumer(model, axis)[0][:, units_to_columns(keep, axis, torch.device("cpu"))]
        kept, scale = small.get_parameter(axis.param), found[space.layer, "mlp"][list(keep)].clamp(min=0).float()
        assert torch.allclose(kept, dense * scale) == (refit == "folded")
        assert torch.equal(kept, dense) == (refit == "none")


def test_rounds_go_by_the_same_gates():
    model = build("llama-tied")
    plans = [pruned(model, refit="none", rounds=rounds)[1].plan for rounds in (1, 2)]
    assert plans[0] == plans[1]


DENSE = [
    case for case, (model_type, fields) in CASES.items() if model_type not in RIGID and "experts" not in str(fields)
]


@pytest.mark.parametrize("case", [*DENSE, "gemma4_text", "llava", "qwen3_vl"])
def test_gates_are_learned_on_every_dense_family(case, monkeypatch):
    monkeypatch.setattr(gates, "SETTINGS", Settings(steps=3, tokens_per_step=24))
    model = build(case)
    arch = describe(model)
    names = [name for name in arch.names if arch.of(name)[0].inside]
    wanted = {name: {s.layer: s.width // 2 for s in arch.of(name)} for name in names if arch.of(name)[0].width > 1}
    fields = settings(seq_length=12, widths={"mlp": 24})
    budgets = [Budget((space,), 0.5) for space in arch.spaces if space.kind in wanted]
    data = data_of(fields)
    domain = replace(data.domains[0], samples=token_ids(4, 12))
    with gates.evaluating(model), gates.frozen(model):
        found = gates.learned_gates(model, replace(data, domains=[domain]), budgets)
    for key, values in found.items():
        assert values.isfinite().all() and len(values.unique()) > 1, f"no gradient has come to {key}"


def test_experts_are_left_out_where_attention_is_pruned():
    model = build("mixtral")
    _, pruner = pruned(model, widths={"attention": 2})
    assert [len(units) for units in pruner.plan.keep.values()] == [2, 2]


def test_gates_are_learned_in_bfloat16():
    small, pruner = pruned(build("llama-tied").to(torch.bfloat16))
    assert small.dtype == torch.bfloat16 and [len(units) for units in pruner.plan.keep.values()] == [24, 24]


def test_predictions_that_are_no_numbers_are_named():
    model = build("llama-tied")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(StructPruneError, match="divergence from the dense model is nan in step 1 of the gates; load"):
        learned(model, settings())


# --- refusals

DDP = {"criterion": "ddp"}


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("bert", DDP, "gates by the predictions of the next token, and a model of type 'bert' makes none; choose"),
        ("llama-tied", {**DDP, "widths": {"hidden": 24}}, "gates on units inside the layers, and 'hidden' is none"),
        ("llama-tied", {**DDP, "widths": {"layer": 1}}, "gates on units inside the layers, and 'layer' is none"),
        ("mixtral", DDP, "criterion='ddp' learns gates on what a matrix reads, and the experts of 'mlp'"),
        ("llama-tied", {**DDP, "allocation": "sensitivity", "round_to": 1}, "use allocation='uniform'"),
    ],
)
def test_what_has_no_gates_is_refused_before_anything_runs(case, fields, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StructPruneError, match=message):
        StructPruner(config(**fields)).prune_model(build(case), tokenizer())
    assert not list(tmp_path.iterdir())
    with pytest.raises(StructPruneError, match=message):
        dry_run(build(case).config, config(**fields))


def test_settings_are_read_from_a_text():
    assert Settings.of_text("") == Settings()
    assert Settings.of_text("steps=7,learning_rate=0.5") == Settings(steps=7, learning_rate=0.5)
    for text in ("step=7", "steps=x", "steps", "steps=0", "learning_rate=nan"):
        with pytest.raises(StructPruneError, match=f"STRUCTPRUNE_GATES takes .*, got '{text}'"):
            Settings.of_text(text)


def test_names_of_the_plug_in_are_known_and_others_refused():
    assert StructPruneConfig(sparsity=0.2, refit="slope").refit == "slope"
    with pytest.raises(StructPruneError, match="`refit` must be a registered refit.*Did you mean 'slope'"):
        StructPruneConfig(sparsity=0.2, refit="slop")


# --- several processes, and a trained model

SCRIPT = """
import sys
from safetensors.torch import save_file
sys.path[:0] = sys.argv[2:]
from test_gates import QUICK, build, gates, learned, settings
gates.SETTINGS = QUICK
from optimum_structprune.system.processes import across_processes, process_index

with across_processes():
    found = learned(build("llama-tied"), settings())
    save_file({f"{layer}": values for (layer, _), values in found.items()}, f"{sys.argv[1]}/{process_index()}")
"""


def test_two_processes_learn_what_one_learns(tmp_path):
    on_two_ranks(SCRIPT, tmp_path, tmp_path, Path(__file__).parent, Path(__file__).parents[1])
    first, second = (load_file(tmp_path / str(rank)) for rank in (0, 1))
    whole = learned(build("llama-tied"), settings())
    for (layer, _), values in whole.items():
        assert torch.equal(first[str(layer)], second[str(layer)])
        torch.testing.assert_close(first[str(layer)], values, rtol=0, atol=1e-3)


@needs_shared
def test_learned_units_are_better_than_random_ones(monkeypatch):
    """On a trained model, without a refit; the loss is the logarithm of the ratio."""
    stories = stories_model()
    monkeypatch.setattr(gates, "SETTINGS", Settings(steps=200, tokens_per_step=512))
    learned_ratio = loss_ratio(stories, criterion="ddp", refit="none")
    random_ratio = loss_ratio(stories, criterion="random", refit="none")
    assert log(learned_ratio) < 0.75 * log(random_ratio)
