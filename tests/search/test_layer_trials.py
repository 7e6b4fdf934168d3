"""Trials of single layers measure the loss of the model without changing it, and the losses lead to better widths."""

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
from optimum_structprune.search.layer_trials import layer_cuts, trial_losses, unit_losses, values_on_trial
from optimum_structprune.search.probe import STRIDE, Probe
from optimum_structprune.search.sensitivity import Search, choose_shape
from optimum_structprune.steps.base import RunState
from optimum_structprune.steps.data import batches_of, source_of


def random_domains():
    return [
        Domain("a", 0.25, token_ids(6, 12, seed=0), token_ids(2, 12, seed=10)),
        Domain("b", 0.75, token_ids(6, 12, seed=1), token_ids(2, 12, seed=11)),
    ]


def cut_on_trial(masks, method, space, source, width):
    """Return the values of the consumers of a space after a trial cut to a width."""
    consumers, moments = calibrate(masks, source, method, space)
    weights = [weight for weight, _ in consumers]
    scores = torch.stack(consumer_scores(method, space, weights, moments)).sum(0)
    keep = best_units(scores, width)
    return values_on_trial(masks, space, refit_consumers(method, space, keep, consumers, moments))


def assert_unchanged(model, original):
    assert same_weights(model, original)
    assert count_hooks(model) == 0
    assert not any("forward" in vars(layer) for layer in layer_list(model, describe(model)))


@torch.no_grad()
def divergences(model, original_logits, batches):
    """Return the KL(original‖model) of each domain over every fourth token, by forward passes of all layers."""
    by_domain = {}
    for batch, original in zip(batches, original_logits, strict=True):
        log_probabilities = model(batch.ids).logits[:, ::STRIDE].log_softmax(-1)
        original_log_probabilities = original[:, ::STRIDE].log_softmax(-1)
        terms = kl_div(log_probabilities, original_log_probabilities, log_target=True, reduction="none")
        by_domain.setdefault(batch.domain, []).append(terms.sum(-1).flatten())
    return torch.stack([torch.cat(values).mean() for values in by_domain.values()])


@pytest.mark.parametrize("case", ["llama-bias", "gpt2-tied", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_probe_from_a_middle_layer_measures_the_same_losses_as_all_layers(case):
    model = build(case)
    original = deepcopy(model)
    arch = describe(model)
    batches = [Batch(0, token_ids(3, 12, 1)), Batch(1, token_ids(2, 12, 2)), Batch(1, token_ids(2, 7, 3))]
    original_logits = [model(batch.ids).logits for batch in batches]

    data = data_of(config(error_feedback=0.0), random_domains())
    masks = Masks(model, arch)
    method = data.method(model, arch)
    source = source_of(model, arch, data.own_batches)
    probe = Probe(model, arch, batches)

    for layer in range(arch.num_layers):
        torch.testing.assert_close(probe.losses(), torch.zeros(2), atol=1e-5, rtol=0)
        for space in arch.at(layer):
            if space.kind not in free_spaces(arch):
                continue

            width = space.size // (2 * space.scale) * space.scale
            values = cut_on_trial(masks, method, space, source, width)
            assert_unchanged(model, original)
            with masks.holding(values):
                losses = probe.losses()
                torch.testing.assert_close(losses, divergences(model, original_logits, batches), atol=1e-6, rtol=1e-3)

        source.advance(layer)
        probe.advance()
    assert_unchanged(model, original)


def test_trials_prune_like_masks_and_lose_more_if_they_remove_more():
    model = build("llama-tied")
    original = deepcopy(model)
    arch = describe(model)
    data = data_of(config(error_feedback=0.0), random_domains())
    masks = Masks(model, arch)
    method = data.method(model, arch)
    source = source_of(model, arch, data.own_batches)
    space = arch.of("mlp")[0]
    probe = Probe(model, arch, batches_of(random_domains(), 3))

    losses = trial_losses(masks, layer_cuts(masks, [space], source, method), probe)
    assert list(losses) == [10, 30]
    assert (torch.stack(list(losses.values())).diff(dim=0) > 0).all()

    values = cut_on_trial(masks, method, space, source, 20)
    assert_unchanged(model, original)
    assert masks.keep == {}
    assert not masks.irreversible

    prune_layers_(masks, source_of(model, arch, data.own_batches), method, {"mlp": 20})
    ((axis, (trial_weight, _)),) = values.items()
    masked_weight, _ = read_consumer(model, axis)
    assert torch.equal(trial_weight, masked_weight)
    assert trial_weight.count_nonzero(0).bool().sum() == 20


def test_the_losses_of_units_add_up_to_the_measured_losses():
    measured = {3: 0.1, 6: 0.3, 9: 0.9}
    losses = unit_losses(12, measured)
    assert len(losses) == 12
    assert (losses > 0).all()
    assert (losses.diff() >= 0).all()
    for units, loss in measured.items():
        assert float(losses[:units].sum()) == pytest.approx(loss, rel=1e-5)


def test_unusual_trials_have_plausible_losses_of_units():
    assert unit_losses(12, {}).tolist() == [0.0] * 12

    # A single trial means the same loss for every unit.
    torch.testing.assert_close(unit_losses(12, {6: 0.3})[:6], torch.full((6,), 0.05))

    # A loss that falls with a growing number of removed units is noise.
    assert torch.isfinite(unit_losses(12, {3: 0.0, 6: 0.2, 9: 0.1})).all()

    # If a curve flattens out, units beyond a trial still are not cheaper than the units of the trial.
    assert (unit_losses(12, {3: 0.3, 6: 0.4, 9: 0.5})[:9].diff() >= 0).all()


@pytest.mark.parametrize("case", ["llama-tied", "mixtral"])
def test_units_that_no_trial_has_removed_are_removed_last(case):
    """All experts of a layer have one curve, because they share their width."""
    model = build(case)
    arch = describe(model)
    settings = config(allocation="sensitivity")
    search = Search(model, arch, data_of(settings, random_domains()), settings)
    trials = search.trials()
    mlp_spaces = {key: spaces for key, spaces in trials.spaces.items() if key[1] == "mlp"}
    trials = replace(trials, spaces=mlp_spaces)

    curves = trials.curves(trials.losses())
    assert set(curves) == {(space.layer, "mlp") for space in arch.of("mlp")}

    width = arch.of("mlp")[0].width
    losses_by_unit = torch.tensor(list(curves.values())).diff()
    assert losses_by_unit.shape == (arch.num_layers, width)
    assert (losses_by_unit.diff() >= 0).all()
    num_removed = round(0.75 * width)  # in the last trial
    assert float(losses_by_unit[:, num_removed:].min()) > float(losses_by_unit[:, :num_removed].max())


def test_a_layer_that_contributes_little_loses_more_units():
    model = build("llama-tied")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(0.1)
    pruner = StructPruner(config(allocation="sensitivity", round_to=1))
    pruner.prune_model(model, tokenizer())

    widths = pruner.result.report.widths
    assert widths["mlp"][1] < widths["mlp"][0]
    assert sum(widths["mlp"].values()) == 2 * 24

    # Forward passes of single layers and of the whole model lead to the same widths.
    arch = describe(model)
    settings = config(allocation="sensitivity", round_to=1, error_feedback=0.0)
    for source in (whole_model_at_once(), nullcontext()):
        with source:
            state = RunState.start(model, arch, data_of(settings))
            assert choose_shape(state, settings) == widths


def test_domains_with_few_and_with_many_samples_have_a_probe_of_one_length():
    model = build("llama-tied")
    data = data_of(config())
    small_domain = replace(data.domains[0], heldout=token_ids(1, 140), probe=None)
    large_domain = replace(data.domains[0], heldout=token_ids(9, 140), probe=None)
    data = replace(data, domains=[small_domain, large_domain])

    probe = Probe.of(model, describe(model), data, tokens=520)
    assert len({batch.ids.shape[1] for batch in probe.batches}) == 1
    assert torch.isfinite(probe.losses()).all()
