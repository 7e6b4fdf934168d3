"""The allocation `sensitivity` tries and chooses widths by measured losses, and measures each loss once."""

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
from optimum_structprune.search import layer_trials, sensitivity
from optimum_structprune.search.probe import Probe


@pytest.fixture(scope="module")
def model():
    return three_layers()


def prune_copy(model, options=None, **fields):
    """Return a pruner and the model that it has pruned, after a check that the original has not changed."""
    original = deepcopy(model)
    fields.setdefault("num_samples", 4)
    pruner = StructPruner(config(**fields), options)

    small = pruner.prune_model(model, tokenizer())

    assert count_hooks(model) == 0
    assert same_weights(model, original)
    return pruner, small


@pytest.mark.slow
def test_the_shape_with_the_smallest_trial_loss_is_chosen(model, tmp_path):
    pruner, small = prune_copy(model, sparsity=0.3, round_to=4, allocation="sensitivity")

    shapes = pruner.result.report.shapes
    assert len(shapes) > 1
    assert [shape for shape in shapes if shape["chosen"]] == [min(shapes, key=lambda shape: shape["loss"])]
    assert pruner.result.report.sparsity > 0.27
    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())


def test_the_default_targets_are_spaces_of_the_model():
    pruner, _ = prune_copy(build("olmoe"), sparsity=0.3, allocation="sensitivity")
    assert set(pruner.result.plan.widths()) == {"mlp"}


@pytest.mark.parametrize("best", [0, 2])
def test_widths_by_layer_are_chosen_only_if_their_trial_loss_is_smaller(model, best, monkeypatch):
    measure = Probe.losses
    # The losses of two domains in the trial of each shape.
    trial_losses = [torch.tensor([1.0, 1.0]) for _ in range(3)]
    trial_losses[best] = torch.tensor([1.0, 0.5])
    remaining_losses = iter(trial_losses)

    def losses(self, model=None):
        if model is None:
            return measure(self)
        return next(remaining_losses)

    monkeypatch.setattr(Probe, "losses", losses)
    pruner, small = prune_copy(model, widths={"mlp": 24}, allocation="sensitivity", round_to=1)

    shapes = pruner.result.report.shapes
    assert [shape["proposed_by"] for shape in shapes] == ["each layer", "halfway", "one width"]
    assert shapes[best]["chosen"]
    assert small.config.is_heterogeneous == (best == 0)


def test_the_halfway_shape_keeps_the_width_of_a_layer_that_is_next_to_the_uniform_width(model):
    """If the uniform width is no multiple of `round_to`, no legal width may lie between it and the layer's width."""
    settings = config(widths={"mlp": 20}, allocation="sensitivity", round_to=8)
    unit_losses = [
        [100.0] * 40,
        [1.0] * 24 + [100.0] * 16,
        [0.1] * 32 + [100.0] * 8,
    ]
    curves = {}
    for layer, losses in enumerate(unit_losses):
        curves[layer, "mlp"] = [sum(losses[:removed]) for removed in range(41)]

    search = sensitivity.Search(model, describe(model), data_of(settings), settings)
    widths = {candidate.name: candidate.widths["mlp"] for candidate in search.candidates(curves)}

    assert widths["each layer"] == {0: 40, 1: 16, 2: 8}
    assert widths["halfway"] == {0: 32, 1: 16, 2: 16}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_widths_by_measured_losses_are_within_a_step_of_the_best_widths(model, share):
    """The best widths of three layers are found by enumeration. Losses grow faster than the number of units."""
    arch = describe(model)
    settings = config(sparsity=share, widths=None, allocation="sensitivity", round_to=10, targets=("mlp", "attention"))
    unit_params = {(space.layer, space.kind): space.unit_params for space in arch.spaces}
    sizes = {(space.layer, space.kind): space.width for space in arch.spaces}
    curves = {}
    for (layer, name), size in sizes.items():
        power = 1.5 + layer / 2
        curves[layer, name] = [(1 + layer) * (units / size) ** power for units in range(size + 1)]

    def cost(widths):
        """Return the number of removed parameters and the loss of some widths."""
        removed_params = 0
        loss = 0.0
        for key, width in widths.items():
            units = sizes[key] - width
            removed_params += unit_params[key] * units
            loss += curves[key][units]
        return removed_params, loss

    shape = sensitivity.Search(model, arch, data_of(settings), settings).candidates(curves)[0]
    chosen = {(layer, name): shape.widths[name][layer] for layer, name in sizes}
    removed_params, loss = cost(chosen)
    assert shape.name == "each layer"
    assert shape.predicted_loss == pytest.approx(loss)

    legal_widths = {}
    for layer, name in sizes:
        if name == "mlp":
            legal_widths[layer, name] = (40, 30, 20, 10)
        else:
            legal_widths[layer, name] = (4, 3, 2, 1)

    losses_of_steps = []
    for key, legal in legal_widths.items():
        if chosen[key] > legal[-1]:
            next_width = legal[legal.index(chosen[key]) + 1]
            _, loss_after_step = cost(chosen | {key: next_width})
            losses_of_steps.append(loss_after_step - loss)

    losses_of_shapes = []
    for widths in product(*legal_widths.values()):
        params_of_shape, loss_of_shape = cost(dict(zip(legal_widths, widths, strict=True)))
        if params_of_shape >= removed_params:
            losses_of_shapes.append(loss_of_shape)
    assert loss <= min(losses_of_shapes) + max(losses_of_steps)

    units_of_step = {"mlp": 10, "attention": 1}
    params_of_steps = [units_of_step[name] * params for (_, name), params in unit_params.items()]
    assert abs(removed_params - share * sum(arch.layer_params)) <= min(params_of_steps) / 2


def test_a_budget_of_parameters_is_met(model):
    fields = {"widths": None, "round_to": 1, "allocation": "sensitivity"}
    _, small = prune_copy(model, budget={"parameters": 14_000}, **fields)
    largest_unit = max(space.unit_params for space in describe(model).spaces)
    assert 14_000 - largest_unit < small.num_parameters() <= 14_000


def test_a_budget_of_the_cache_is_met(model):
    fields = {"widths": None, "round_to": 1, "allocation": "sensitivity"}
    pruner, _ = prune_copy(model, budget={"cache_bytes_per_token": 260}, **fields)

    num_heads = 0
    for layer in range(3):
        num_heads += len(pruner.result.plan.keep.get((layer, "attention"), range(4)))
    # Each head has a key and a value of 4 numbers with 4 bytes.
    bytes_per_head = 2 * 4 * 4
    assert 260 - bytes_per_head < num_heads * bytes_per_head <= 260


@pytest.mark.slow
def test_losses_are_measured_once_for_all_targets(model, tmp_path, monkeypatch):
    fields = {"allocation": "sensitivity", "round_to": 4, "options": RunOptions(checkpoint_dir=str(tmp_path))}
    first, _ = prune_copy(model, sparsity=0.2, **fields)
    (path,) = tmp_path.glob("losses-*")
    rows = json.loads(path.read_text())["values"]["losses"]
    assert {(layer, name) for layer, name, _ in rows} == set(product(range(3), ("mlp", "attention")))

    monkeypatch.setattr(layer_trials, "trial_losses", Mock(side_effect=AssertionError("measured again")))
    second, _ = prune_copy(model, sparsity=0.2, **fields)
    assert second.result.plan == first.result.plan
    sparser, _ = prune_copy(model, sparsity=0.5, **fields)
    assert sparser.result.plan != first.result.plan

    # Other text or another refit needs new measurements.
    other_text = [DomainConfig(name="a", source=documents(seed=5)), DomainConfig(name="b", source=documents(seed=6))]
    with pytest.raises(AssertionError, match="measured again"):
        prune_copy(model, sparsity=0.2, domains=other_text, **fields)
    with pytest.raises(AssertionError, match="measured again"):
        prune_copy(model, sparsity=0.2, error_feedback=0.25, **fields)


@pytest.mark.slow
def test_an_interrupted_run_resumes_at_the_next_layer(model, tmp_path, monkeypatch):
    fields = {"sparsity": 0.2, "round_to": 4, "allocation": "sensitivity"}
    options = RunOptions(checkpoint_dir=str(tmp_path))
    measure = layer_trials.trial_losses
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer_trials, "trial_losses", failing(measure, 4, KeyboardInterrupt()))
        prune_copy(model, options, **fields)

    measurements = Mock(side_effect=measure)
    monkeypatch.setattr(layer_trials, "trial_losses", measurements)
    resumed, _ = prune_copy(model, options, **fields)
    assert measurements.call_count == 4, "two trials of each of the two layers that are left"

    uninterrupted, _ = prune_copy(model, **fields)
    assert resumed.result.plan == uninterrupted.result.plan
