"""Widths by measured loss: what is measured, that the model comes back, and that it helps."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import count_hooks, data_of, free_spaces, same_weights, whole_model_at_once
from models import build, config, token_ids, tokenizer
from torch.nn.functional import kl_div

from optimum_structprune import StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.domains.packing import Domain
from optimum_structprune.method.layers import Batch
from optimum_structprune.method.loop import best_units, calibrate, consumer_scores, prune_layers_, refit_consumers
from optimum_structprune.method.shrink import Masks, read_consumer
from optimum_structprune.search.sensitivity import Search, choose_shape
from optimum_structprune.search.trials import STRIDE, Probe, candidates, trial_losses, unit_losses, values_on_trial
from optimum_structprune.sources.data import batches_of, source_of
from optimum_structprune.steps.base import RunState


def domains():
    parts = enumerate([("a", 0.25), ("b", 0.75)])
    return [Domain(*part, token_ids(6, 12, seed), token_ids(2, 12, seed + 10)) for seed, part in parts]


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
        each = kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)
        found.setdefault(batch.domain, []).append(each.flatten())
    return torch.stack([torch.cat(values).mean() for values in found.values()])


@pytest.mark.parametrize("case", ["llama-bias", "gpt2-tied", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_probe_from_the_middle_sees_what_whole_passes_see(case):
    model = build(case)
    arch, before = describe(model), deepcopy(model)
    batches = [Batch(0, token_ids(3, 12, 1)), Batch(1, token_ids(2, 12, 2)), Batch(1, token_ids(2, 7, 3))]
    dense = [model(batch.ids).logits for batch in batches]
    data = data_of(config(error_feedback=0.0), domains())
    masks = Masks(model, arch)
    method, source = data.method(model, arch), source_of(model, arch, data.own_batches)
    probe = Probe(model, arch, batches)
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
    method, source, space = data.method(model, arch), source_of(model, arch, data.own_batches), arch.of("mlp")[0]
    probe = Probe(model, arch, batches_of(domains(), 3))
    losses = trial_losses(masks, candidates(masks, [space], source, method), probe)
    assert list(losses) == [10, 30]
    assert (torch.stack(list(losses.values())).diff(dim=0) > 0).all()
    values = cut_on_trial(masks, method, space, source, 20)
    assert_untouched(model, before)
    assert masks.keep == {} and not masks.irreversible
    prune_layers_(masks, source_of(model, arch, data.own_batches), method, {"mlp": 20})
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
    settings = config(allocation="sensitivity")
    arch, data = describe(model), data_of(settings, domains())
    trials = Search(model, arch, data, settings).trials()
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
            assert choose_shape(RunState.start(model, arch, data_of(settings)), settings) == found


def test_domains_of_few_and_of_many_samples_have_a_probe_of_one_length():
    model, data = build("llama-tied"), data_of(config())
    few, many = (replace(data.domains[0], heldout=token_ids(rows, 140), probe=None) for rows in (1, 9))
    probe = Probe.of(model, describe(model), replace(data, domains=[few, many]), tokens=520)
    assert len({batch.ids.shape[1] for batch in probe.batches}) == 1 and torch.isfinite(probe.losses()).all()
