"""Widths by measured loss: what is measured, that the model comes back, and that it helps."""

import pytest
import torch
from helpers import NON_UNIFORM, count_hooks, free_spaces, whole_passes
from huggingface_hub.errors import StrictDataclassClassValidationError
from models import build, config, token_ids, tokenizer
from torch.nn.functional import kl_div

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe, layer_list
from optimum_structprune.arch.spec import Space
from optimum_structprune.calibration.passes import batches_of
from optimum_structprune.calibration.tally import Batch
from optimum_structprune.domains.load import Domain
from optimum_structprune.pruning.evidence import mixture, passes_of
from optimum_structprune.pruning.sensitivity import STRIDE, Probe, sensitivities, trial_losses, unit_losses
from optimum_structprune.pruning.sweep import Sweep
from optimum_structprune.saving.report import Report
from optimum_structprune.surgery.consumers import read_consumer


def domains():
    return [
        Domain(name, share, token_ids(6, 12, seed), token_ids(2, 12, seed + 10))
        for seed, (name, share) in enumerate([("a", 0.25), ("b", 0.75)])
    ]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert count_hooks(model) == 0
    assert not any("forward" in vars(block) for block in layer_list(model, describe(model)))


@torch.no_grad()
def divergences(model, dense_logits, batches):
    """KL(dense‖model) by domain over every fourth token, by whole forward passes."""
    found = {}
    for batch, dense in zip(batches, dense_logits, strict=True):
        mine, theirs = (x[:, ::STRIDE].log_softmax(-1) for x in (model(batch.ids).logits, dense))
        found.setdefault(batch.domain, []).append(kl_div(mine, theirs, log_target=True, reduction="none").sum(-1))
    return torch.stack([torch.cat(values).mean() for values in found.values()])


@pytest.mark.parametrize("case", NON_UNIFORM)
@torch.no_grad()
def test_a_probe_from_the_middle_sees_what_whole_passes_see(case):
    model = build(case)
    arch, before = describe(model), snapshot(model)
    batches = [Batch(0, token_ids(3, 12, 1)), Batch(1, token_ids(2, 12, 2)), Batch(1, token_ids(1, 12, 3))]
    dense = [model(batch.ids).logits for batch in batches]
    sweep = Sweep(model, arch, config(error_feedback=0.0), mixture(config(), domains()))
    passes, probe = passes_of(sweep, domains(), None, None), Probe(model, arch, batches)
    for layer in range(arch.num_layers):
        torch.testing.assert_close(probe.losses(), torch.zeros(2), atol=1e-5, rtol=0)
        for space in [space for space in arch.at(layer) if space.kind in free_spaces(arch)]:
            width = space.size // (2 * space.scale) * space.scale
            consumers = sweep.trial(space, passes.gather(layer, space, sweep.gram), width)
            assert_untouched(model, before)
            with sweep.holding(consumers):
                torch.testing.assert_close(probe.losses(), divergences(model, dense, batches), atol=1e-6, rtol=1e-3)
        passes.advance(layer)
        probe.advance()
    assert_untouched(model, before)


def test_trials_prune_as_the_sweep_does_and_lose_more_with_more_gone():
    model = build("llama-tied")
    arch, before = describe(model), snapshot(model)
    fields = config(error_feedback=0.0, widths={"mlp": 20})
    sweep = Sweep(model, arch, fields, mixture(fields, domains()))
    passes, space = passes_of(sweep, domains(), None, None), arch.of("mlp")[0]
    probe = Probe(model, arch, batches_of(domains(), 3))
    losses = trial_losses(sweep, [space], passes, probe)
    assert list(losses) == [10, 30]
    assert (torch.stack(list(losses.values())).diff(dim=0) > 0).all()
    consumers = sweep.trial(space, passes.gather(0, space, True), 20)
    assert_untouched(model, before)
    assert sweep.keep == {}
    sweep.run_(passes_of(sweep, domains(), None, None), {"mlp": 20}, None, "round")
    ((axis, (weight, _)),) = consumers.items()
    assert torch.equal(weight, read_consumer(model, axis)[0]) and weight.count_nonzero(0).bool().sum() == 20


@pytest.mark.parametrize("scale", [1, 3])
def test_units_together_cost_what_was_measured(scale):
    space = Space("mlp", 0, 12 * scale, (), (), (), (), 1, scale=scale)
    measured = {3: 0.1, 6: 0.3, 9: 0.9}
    costs = unit_losses(space, measured)
    assert len(costs) == 12 * scale and (costs > 0).all() and (costs.diff() >= 0).all()
    for units, loss in measured.items():
        assert float(costs[: units * scale].sum()) == pytest.approx(scale * loss, rel=1e-5)
    assert costs[9 * scale] > 1e4 * costs[9 * scale - 1], "what was not measured goes last"
    # One trial alone says that all cost the same, and what is less with more gone is noise.
    torch.testing.assert_close(unit_losses(space, {6: 0.3})[: 6 * scale], torch.full((6 * scale,), 0.05))
    assert torch.isfinite(unit_losses(space, {3: 0.0, 6: 0.2, 9: 0.1})).all()
    assert (unit_losses(space, {3: 0.3, 6: 0.4, 9: 0.5}).diff() >= 0).all()


@pytest.mark.parametrize("case", ["llama-bias", "gpt2-tied", "mixtral"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_end_to_end(case, rounds, tmp_path):
    model = build(case)
    before = snapshot(model)
    targets = free_spaces(describe(model))
    refit = "bias" if case == "llama-bias" else "least_squares"
    fields = {"sparsity": 0.25, "targets": targets, "allocation": "sensitivity", "round_to": 1, "refit": refit}
    pruner = StructPruner(config(rounds=rounds, **fields))
    small = pruner.prune_model(model, tokenizer())
    assert_untouched(model, before)
    assert small.config.is_heterogeneous and pruner.report.seconds["sensitivity"] > 0
    assert pruner.report.sparsity == pytest.approx(0.25, abs=0.02)
    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())


def widths(model, **fields):
    pruner = StructPruner(config(allocation="sensitivity", round_to=1, **fields))
    pruner.prune_model(model, tokenizer())
    return pruner.report.widths


def test_a_block_that_does_little_gives_up_more(monkeypatch):
    model = build("llama-tied")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.1)
    found = widths(model)
    assert found["mlp"][1] < found["mlp"][0] and sum(found["mlp"].values()) == 2 * 24
    for module in ("pruning.evidence", "pruning.sensitivity"):
        monkeypatch.setattr(f"optimum_structprune.{module}.passes_over", whole_passes)
    assert widths(model, error_feedback=0.0) == found


def test_the_worst_domain_alone_counts_where_the_objective_is_the_worst():
    model = build("llama-tied")
    arch = describe(model)

    def scores(shares, **fields):
        parts = [Domain(d.name, share, d.samples, d.heldout) for d, share in zip(domains(), shares, strict=True)]
        return sensitivities(model, arch, config(**fields), parts, ["mlp"], Report("llama", "obs"))

    # The shares also weigh what is pruned on, so the two single domains are judged on the same pruning.
    probe = scores((0.5, 0.5), objective="worst", rounds=2)
    mean = scores((0.5, 0.5))
    assert set(probe) == set(mean) == {(0, "mlp"), (1, "mlp")}
    assert sum(float(score.sum()) for score in probe.values()) > sum(float(score.sum()) for score in mean.values())


def test_nothing_stays_behind_when_a_trial_fails(monkeypatch):
    model = build("llama-tied")
    before, calls = snapshot(model), []
    losses = Probe.losses

    def failing(self):
        calls.append(self.layer)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return losses(self)

    monkeypatch.setattr(Probe, "losses", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        widths(model)
    assert calls[-1] == 1
    assert_untouched(model, before)


def test_stored_statistics_hold_no_text_to_measure_on():
    with pytest.raises(
        StrictDataclassClassValidationError,
        match="allocation='sensitivity' runs the model on held-out text, but stats=",
    ):
        StructPruneConfig(widths={"mlp": 9}, allocation="sensitivity", stats="folder")
