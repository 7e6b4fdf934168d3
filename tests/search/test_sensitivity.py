"""Widths by measured losses: what is tried, what is taken, and that losses are measured once."""

import json
from copy import deepcopy
from itertools import product
from unittest.mock import Mock

import pytest
import torch
from helpers import count_hooks, data_of, failing, same_weights
from models import build, config, documents, three_layers, tokenizer

from optimum_structprune import DomainConfig, RunOptions, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.search import sensitivity, trials


@pytest.fixture(scope="module")
def model():
    return three_layers()


def pruned(model, options=None, **fields):
    before, pruner = deepcopy(model), StructPruner(config(**{"num_samples": 4, **fields}), options)
    small = pruner.prune_model(model, tokenizer())
    assert count_hooks(model) == 0 and same_weights(model, before)
    return pruner, small


@pytest.mark.slow
def test_the_shape_with_the_smallest_loss_on_trial_is_taken(model, tmp_path):
    pruner, small = pruned(model, sparsity=0.3, round_to=4, allocation="sensitivity")
    shapes = pruner.report.shapes
    assert [shape for shape in shapes if shape["chosen"]] == [min(shapes, key=lambda shape: shape["loss"])]
    assert len(shapes) > 1 and pruner.report.sparsity > 0.27
    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())


def test_what_shrinks_by_default_is_what_the_model_has():
    pruner, _ = pruned(build("olmoe"), sparsity=0.3, allocation="sensitivity")
    assert set(pruner.plan.widths()) == {"mlp"}


@pytest.mark.parametrize("better", [0, 2])
def test_measured_widths_are_taken_only_where_they_are_better(model, better, monkeypatch):
    """Whichever shape loses least when all are pruned on trial."""
    measure, fake = trials.Probe.losses, (torch.tensor([1.0, 1.0 - 0.5 * (number == better)]) for number in range(3))
    monkeypatch.setattr(trials.Probe, "losses", lambda self, model=None: next(fake) if model else measure(self))
    pruner, small = pruned(model, widths={"mlp": 24}, allocation="sensitivity", round_to=1)
    assert [one["proposed_by"] for one in pruner.report.shapes] == ["each layer", "halfway", "one width"]
    assert small.config.is_heterogeneous == (not better) and pruner.report.shapes[better]["chosen"]


def test_a_layer_that_is_next_to_one_width_stays_there_halfway(model):
    """Where that width is no multiple of `round_to`, none may lie between it and a layer's own."""
    asked = config(widths={"mlp": 20}, allocation="sensitivity", round_to=8)
    dear, middle, cheap = [100.0] * 40, [1.0] * 24 + [100.0] * 16, [0.1] * 32 + [100.0] * 8
    curves = {(layer, "mlp"): [sum(each[:n]) for n in range(41)] for layer, each in enumerate([dear, middle, cheap])}
    shapes = sensitivity.Search(model, describe(model), data_of(asked), asked).candidates(curves)
    widths = {candidate.name: candidate.widths["mlp"] for candidate in shapes}
    assert widths["each layer"] == {0: 40, 1: 16, 2: 8} and widths["halfway"] == {0: 32, 1: 16, 2: 16}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_widths_by_measured_loss_are_within_a_step_of_the_best(model, share):
    """Against all widths of three layers, with losses that grow faster than the units removed."""
    arch = describe(model)
    asked = config(sparsity=share, widths=None, allocation="sensitivity", round_to=10, targets=("mlp", "attention"))
    price = {(space.layer, space.kind): space.unit_params for space in arch.spaces}
    sizes = {(space.layer, space.kind): space.width for space in arch.spaces}
    curves = {
        (layer, name): [(1 + layer) * (gone / size) ** (1.5 + layer / 2) for gone in range(size + 1)]
        for (layer, name), size in sizes.items()
    }

    def outcome(widths):
        gone = {key: sizes[key] - width for key, width in widths.items()}
        return sum(price[key] * units for key, units in gone.items()), sum(curves[key][gone[key]] for key in gone)

    shape = sensitivity.Search(model, arch, data_of(asked), asked).candidates(curves)[0]
    found = {key: shape.widths[key[1]][key[0]] for key in sizes}
    removed, loss = outcome(found)
    assert shape.name == "each layer" and shape.predicted_loss == pytest.approx(loss)
    may = {key: (40, 30, 20, 10) if key[1] == "mlp" else (4, 3, 2, 1) for key in sizes}
    every = [outcome(dict(zip(may, widths, strict=True))) for widths in product(*may.values())]
    narrower = [{**found, key: of[of.index(found[key]) + 1]} for key, of in may.items() if found[key] > of[-1]]
    steps = [outcome(widths)[1] - loss for widths in narrower]
    least = min(other for other_removed, other in every if other_removed >= removed)
    assert loss <= least + max(steps)
    half_a_step = min(units * price[key] for key, units in ((key, 10 if key[1] == "mlp" else 1) for key in sizes)) / 2
    assert abs(removed - share * sum(arch.layer_params)) <= half_a_step


@pytest.mark.parametrize("budget", [{"cache_bytes_per_token": 260}, {"parameters": 14_000}])
def test_a_budget_is_kept_whatever_it_limits(model, budget):
    pruner, small = pruned(model, widths=None, budget=budget, round_to=1, allocation="sensitivity")
    heads = [len(pruner.plan.keep.get((layer, "attention"), range(4))) for layer in range(3)]
    # Keys and values of each head, 4 numbers of 4 bytes.
    cached = sum(heads) * 2 * 4 * 4
    if "parameters" in budget:
        largest_unit = max(space.unit_params for space in describe(model).spaces)
        assert 14_000 - largest_unit < small.num_parameters() <= 14_000
    else:
        assert 260 - 2 * 4 * 4 < cached <= 260


@pytest.mark.slow
def test_losses_are_measured_once_for_all_targets(model, tmp_path, monkeypatch):
    fields = {"allocation": "sensitivity", "round_to": 4, "options": RunOptions(checkpoint_dir=str(tmp_path))}
    first = pruned(model, sparsity=0.2, **fields)[0]
    (path,) = tmp_path.glob("losses-*")
    rows = json.loads(path.read_text())["values"]["losses"]
    assert {(layer, name) for layer, name, _ in rows} == {*product(range(3), ("mlp", "attention"))}

    monkeypatch.setattr(trials, "trial_losses", Mock(side_effect=AssertionError("measured again")))
    assert pruned(model, sparsity=0.2, **fields)[0].plan == first.plan
    assert pruned(model, sparsity=0.5, **fields)[0].plan != first.plan
    # Other text, or another way to prune, is measured anew.
    other = [DomainConfig(name="a", source=documents(seed=5)), DomainConfig(name="b", source=documents(seed=6))]
    for changed in ({"domains": other}, {"error_feedback": 0.25}):
        with pytest.raises(AssertionError, match="measured again"):
            pruned(model, sparsity=0.2, **fields, **changed)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_at_the_next_layer(model, tmp_path, monkeypatch):
    fields = {"sparsity": 0.2, "round_to": 4, "allocation": "sensitivity"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials, "trial_losses", failing(trials.trial_losses, 4, KeyboardInterrupt()))
        pruned(model, **fields, options=RunOptions(checkpoint_dir=str(tmp_path)))
    monkeypatch.setattr(trials, "trial_losses", again := Mock(side_effect=trials.trial_losses))
    resumed = pruned(model, **fields, options=RunOptions(checkpoint_dir=str(tmp_path)))[0]
    assert again.call_count == 4, "two trials of each of the two layers that are left"
    assert resumed.plan == pruned(model, **fields)[0].plan
