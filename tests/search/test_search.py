"""Widths by search: what is measured, and once; what is tried, and taken; the model comes back, and it helps."""

import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import product
from unittest.mock import Mock

import pytest
import torch
from helpers import count_hooks, data_of, free_spaces, same_weights, whole_model_at_once
from models import build, config, documents, three_layers, token_ids, tokenizer
from torch.nn.functional import kl_div

from optimum_structprune import DomainConfig, RunOptions, StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.domains.packing import Domain
from optimum_structprune.method.layers import Batch
from optimum_structprune.method.loop import best_units, calibrate, consumer_scores, prune_layers_, refit_consumers
from optimum_structprune.method.shrink import Masks, read_consumer
from optimum_structprune.pruning.run import Run
from optimum_structprune.search import search, trials
from optimum_structprune.search.search import Search, choose_shape
from optimum_structprune.search.trials import STRIDE, Probe, candidates, trial_losses, unit_losses, values_on_trial
from optimum_structprune.sources.data import batches_of


@pytest.fixture(scope="module")
def model():
    return three_layers()


def pruned(model, options=None, **fields):
    before, pruner = deepcopy(model), StructPruner(config(**{"num_samples": 4, **fields}), options)
    small = pruner.prune_model(model, tokenizer())
    assert count_hooks(model) == 0 and same_weights(model, before)
    return pruner, small


@pytest.mark.slow
def test_one_width_of_each_space_is_the_best_of_those_on_trial(model, tmp_path):
    pruner, small = pruned(model, sparsity=0.3, round_to=4, allocation="search_uniform")
    shapes = pruner.report.shapes
    assert [one for one in shapes if one["chosen"]] == [min(shapes, key=lambda one: one["loss"])]
    assert all(isinstance(width, int) for one in shapes for width in one["widths"].values())
    assert not small.config.is_heterogeneous and len(shapes) > 1 and pruner.report.sparsity > 0.27
    assert "tried: " in str(pruner.report) and "taken: " in str(pruner.report)
    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())


def test_what_shrinks_by_default_is_what_the_model_has():
    pruner, _ = pruned(build("olmoe"), sparsity=0.3, allocation="search")
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
    shapes = search.Search(model, describe(model), data_of(asked)).candidates(curves)
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

    shape = search.Search(model, arch, data_of(asked)).candidates(curves)[0]
    found = {key: shape.widths[key[1]][key[0]] for key in sizes}
    removed, loss = outcome(found)
    assert shape.name == "each layer" and shape.predicted == pytest.approx(loss)
    may = {key: (40, 30, 20, 10) if key[1] == "mlp" else (4, 3, 2, 1) for key in sizes}
    every = [outcome(dict(zip(may, widths, strict=True))) for widths in product(*may.values())]
    steps = [
        outcome({**found, key: of[of.index(found[key]) + 1]})[1] - loss
        for key, of in may.items()
        if found[key] > of[-1]
    ]
    least = min(other for other_removed, other in every if other_removed >= removed)
    assert loss <= least + max(steps)
    half_a_step = min(units * price[key] for key, units in ((key, 10 if key[1] == "mlp" else 1) for key in sizes)) / 2
    assert abs(removed - share * sum(arch.layer_params)) <= half_a_step


@pytest.mark.parametrize(
    ("budget", "allocation"), [({"cache_bytes_per_token": 260}, "search"), ({"parameters": 14_000}, "search_uniform")]
)
def test_a_budget_is_kept_whatever_it_limits(model, budget, allocation):
    pruner, small = pruned(model, widths=None, budget=budget, round_to=1, allocation=allocation)
    heads = [len(pruner.plan.keep.get((layer, "attention"), range(4))) for layer in range(3)]
    # Keys and values of each head, 4 numbers of 4 bytes.
    cached = sum(heads) * 2 * 4 * 4
    if "parameters" in budget:
        assert 0.95 * 14_000 < small.num_parameters() <= 14_000
    else:
        assert 260 - 2 * 4 * 4 < cached <= 260


@pytest.mark.slow
def test_losses_are_measured_once_for_all_targets(model, tmp_path, monkeypatch):
    fields = {"allocation": "search_uniform", "round_to": 4, "options": RunOptions(checkpoint_dir=str(tmp_path))}
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
    path.write_text(path.read_text()[:50])
    with pytest.raises(StructPruneError, match=f"{path.name} is not a readable checkpoint.*remove it"):
        pruned(model, sparsity=0.2, **fields)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_at_the_next_layer(model, tmp_path, monkeypatch):
    measure, calls = trials.trial_losses, []

    def failing(pruning, refits, probe):
        calls.append(probe.layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(pruning, refits, probe)

    fields = {"sparsity": 0.2, "round_to": 4, "allocation": "search"}
    monkeypatch.setattr(trials, "trial_losses", failing)
    with pytest.raises(KeyboardInterrupt):
        pruned(model, **fields, options=RunOptions(checkpoint_dir=str(tmp_path)))
    resumed = pruned(model, **fields, options=RunOptions(checkpoint_dir=str(tmp_path)))[0]
    assert calls == [0, 0, 1, 1, 1, 1, 2, 2]
    monkeypatch.undo()
    assert resumed.plan == pruned(model, **fields)[0].plan


def domains():
    return [
        Domain(name, share, token_ids(6, 12, seed), token_ids(2, 12, seed + 10))
        for seed, (name, share) in enumerate([("a", 0.25), ("b", 0.75)])
    ]


def cut_on_trial(masks, method, space, source, width):
    """The values of the consumers of a space that is cut to a width on trial."""
    dense, moments = calibrate(masks, source, method, space)
    scores = torch.stack(consumer_scores(method, space, [weight for weight, _ in dense], moments)).sum(0)
    keep = best_units(scores, width)
    return values_on_trial(masks, space, refit_consumers(method, space, keep, dense, moments))


def assert_untouched(model, before):
    assert same_weights(model, before) and count_hooks(model) == 0
    assert not any("forward" in vars(layer) for layer in layer_list(model, describe(model)))


@torch.no_grad()
def divergences(model, dense_logits, batches):
    """KL(dense‖model) by domain over every fourth token, by whole forward passes."""
    found = {}
    for batch, dense in zip(batches, dense_logits, strict=True):
        mine, theirs = (x[:, ::STRIDE].log_softmax(-1) for x in (model(batch.ids).logits, dense))
        found.setdefault(batch.domain, []).append(kl_div(mine, theirs, log_target=True, reduction="none").sum(-1))
    return torch.stack([torch.cat(values).mean() for values in found.values()])


@pytest.mark.parametrize("case", ["llama-bias", "gpt2-tied", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_probe_from_the_middle_sees_what_whole_passes_see(case):
    model = build(case)
    arch, before = describe(model), deepcopy(model)
    batches = [Batch(0, token_ids(3, 12, 1)), Batch(1, token_ids(2, 12, 2)), Batch(1, token_ids(1, 12, 3))]
    dense = [model(batch.ids).logits for batch in batches]
    data = data_of(config(error_feedback=0.0), domains())
    masks = Masks(model, arch)
    method, source, probe = data.method(model, arch), data.source(model, arch), Probe(model, arch, batches)
    for layer in range(arch.num_layers):
        torch.testing.assert_close(probe.losses(), torch.zeros(2), atol=1e-5, rtol=0)
        for space in [space for space in arch.at(layer) if space.kind in free_spaces(arch)]:
            width = space.size // (2 * space.scale) * space.scale
            values = cut_on_trial(masks, method, space, source, width)
            assert_untouched(model, before)
            with masks.holding(values):
                torch.testing.assert_close(probe.losses(), divergences(model, dense, batches), atol=1e-6, rtol=1e-3)
        source.advance(layer)
        probe.advance()
    assert_untouched(model, before)


def test_trials_prune_as_masks_do_and_lose_more_with_more_gone():
    model = build("llama-tied")
    arch, before = describe(model), deepcopy(model)
    data = data_of(config(error_feedback=0.0), domains())
    masks = Masks(model, arch)
    method, source, space = data.method(model, arch), data.source(model, arch), arch.of("mlp")[0]
    probe = Probe(model, arch, batches_of(domains(), 3))
    losses = trial_losses(masks, candidates(masks, [space], source, method), probe)
    assert list(losses) == [10, 30]
    assert (torch.stack(list(losses.values())).diff(dim=0) > 0).all()
    values = cut_on_trial(masks, method, space, source, 20)
    assert_untouched(model, before)
    assert masks.keep == {} and not masks.lost
    prune_layers_(masks, data.source(model, arch), method, {"mlp": 20})
    ((axis, (weight, _)),) = values.items()
    assert torch.equal(weight, read_consumer(model, axis)[0]) and weight.count_nonzero(0).bool().sum() == 20


def test_units_together_cost_what_was_measured():
    measured = {3: 0.1, 6: 0.3, 9: 0.9}
    costs = unit_losses(12, measured)
    assert len(costs) == 12 and (costs > 0).all() and (costs.diff() >= 0).all()
    for units, loss in measured.items():
        assert float(costs[:units].sum()) == pytest.approx(loss, rel=1e-5)
    # One trial alone says that all cost the same, and what is less with more gone is noise.
    torch.testing.assert_close(unit_losses(12, {6: 0.3})[:6], torch.full((6,), 0.05))
    assert torch.isfinite(unit_losses(12, {3: 0.0, 6: 0.2, 9: 0.1})).all()
    # A curve that flattens out does not make the units beyond a trial cheaper than those that it has removed.
    assert (unit_losses(12, {3: 0.3, 6: 0.4, 9: 0.5})[:9].diff() >= 0).all()
    assert unit_losses(12, {}).tolist() == [0.0] * 12


@pytest.mark.parametrize("case", ["llama-tied", "mixtral"])
def test_units_that_no_trial_has_removed_go_last(case):
    """And the experts of one layer, which share their width, have one curve."""
    model = build(case)
    arch, data = describe(model), data_of(config(allocation="sensitivity"), domains())
    trials = Search(model, arch, data).trials()
    trials = replace(trials, spaces={key: spaces for key, spaces in trials.spaces.items() if key[1] == "mlp"})
    curves = trials.curves(trials.losses())
    assert set(curves) == {(space.layer, "mlp") for space in arch.of("mlp")}
    width = arch.of("mlp")[0].width
    removed = round(0.75 * width)  # by the last trial
    each = torch.tensor([*curves.values()]).diff()
    assert each.shape == (arch.num_layers, width) and (each.diff() >= 0).all()
    assert float(each[:, removed:].min()) > float(each[:, :removed].max())


def widths(model, **fields):
    pruner = StructPruner(config(allocation="sensitivity", round_to=1, **fields))
    pruner.prune_model(model, tokenizer())
    return pruner.report.widths


def test_a_layer_that_does_little_gives_up_more():
    model = build("llama-tied")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(0.1)
    found = widths(model)
    assert found["mlp"][1] < found["mlp"][0] and sum(found["mlp"].values()) == 2 * 24
    # With and without passes over the whole model for everything that runs.
    settings, arch = config(allocation="sensitivity", round_to=1, error_feedback=0.0), describe(model)
    for source in (whole_model_at_once(), nullcontext()):
        with source:
            assert choose_shape(Run(model, arch, data_of(settings))) == found


def test_domains_of_few_and_of_many_samples_have_a_probe_of_one_length():
    model, data = build("llama-tied"), data_of(config())
    few, many = (replace(data.domains[0], heldout=token_ids(rows, 140), probe=None) for rows in (1, 9))
    probe = Probe.of(model, describe(model), replace(data, domains=[few, many]), tokens=520)
    assert len({batch.ids.shape[1] for batch in probe.batches}) == 1 and torch.isfinite(probe.losses()).all()
