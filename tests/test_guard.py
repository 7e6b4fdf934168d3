"""The guard of refits: chosen on statistics that the refit has not seen."""

import pytest
import torch
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruneError, StructPruner
from optimum_structprune.calibration.stats import Moments
from optimum_structprune.guard import DAMPINGS, guarded_refit
from optimum_structprune.refit import least_squares


KEEP = torch.tensor([0, 2, 3, 6, 7])


def make(tokens: int, seed: int = 0, biased: bool = False):
    """A consumer, and moments of few calibration and many held-out tokens of one stream."""
    generator = torch.Generator().manual_seed(seed)
    weight, colour = torch.randn(4, 8, generator=generator), torch.randn(8, 8, generator=generator)
    streams = [torch.randn(count, 8, generator=generator) @ colour + 0.5 for count in (tokens, 2000)]
    bias = torch.randn(4, generator=generator) if biased else None
    return weight, bias, streams[1], *(Moments.empty(8, gram=True).update(stream) for stream in streams)


def error(weight, bias, refitted, new_bias, x) -> float:
    """E‖W x + b − W' x_S − b'‖², from the tokens themselves."""
    difference = x @ weight.T - x[:, KEEP] @ refitted.T
    return float((difference if bias is None else difference + bias - new_bias).square().sum(1).mean())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [4, 9, 40, 2000])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1])
def test_never_worse_on_held_out_tokens_than_what_was_asked_for(biased, tokens, damping):
    weight, bias, x, moments, held = make(tokens, biased=biased)
    asked = least_squares(weight, bias, moments, KEEP, damping)
    refitted, new_bias, choice = guarded_refit(least_squares, weight, bias, moments, KEEP, damping, held)
    reference, found = error(weight, bias, *asked, x), error(weight, bias, refitted, new_bias, x)
    assert found <= reference * (1 + 1e-4)
    assert choice.error == pytest.approx(found / reference, rel=1e-3) and 0 <= choice.strength <= 1


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [6, 60])
def test_the_choice_is_the_best_of_a_fine_grid(biased, tokens):
    weight, bias, x, moments, held = make(tokens, seed=1, biased=biased)
    plain, errors = weight[:, KEEP], {}
    for damping in (0.1 * factor for factor in DAMPINGS):
        refitted, new_bias = least_squares(weight, bias, moments, KEEP, damping)
        for step in range(201):
            part = plain + step / 200 * (refitted - plain)
            shift = None if bias is None else bias + step / 200 * (new_bias - bias)
            errors[damping, step / 200] = error(weight, bias, part, shift, x)
    refitted, new_bias, choice = guarded_refit(least_squares, weight, bias, moments, KEEP, 0.1, held)
    best = min(errors, key=errors.get)
    assert (choice.damping, choice.strength) == (pytest.approx(best[0]), pytest.approx(best[1], abs=0.01))
    assert error(weight, bias, refitted, new_bias, x) == pytest.approx(errors[best], rel=1e-3)


def test_a_refit_on_too_few_tokens_is_held_back():
    few, many = (
        guarded_refit(least_squares, *make(count)[:2], make(count)[3], KEEP, 1e-3, make(count)[4])[2]
        for count in (5, 2000)
    )
    assert few.damping > 1e-3 or few.strength < 0.7
    assert few.error < 0.8 < 0.99 < many.error <= 1.0001 and many.strength > 0.95


def test_a_whole_run_judges_refits_on_blocks_set_aside():
    pruner = StructPruner(config(guard=True, num_samples=16, widths={"mlp": 24, "attention": 2}))
    small = pruner.prune_model(build("llama-tied"), tokenizer())
    plain = StructPruner(config(num_samples=16, widths={"mlp": 24, "attention": 2}))
    other = plain.prune_model(build("llama-tied"), tokenizer())
    assert list(pruner.report.guard) == ["attention", "mlp"] and plain.report.guard == {}
    for found in pruner.report.guard.values():
        assert found["blocks"] == 2 and 0 <= found["changed"] <= 2
        assert found["error"] <= 1.0001 and 0 <= found["strength"] <= 1
    assert not torch.equal(small.model.layers[0].mlp.down_proj.weight, other.model.layers[0].mlp.down_proj.weight)
    mlp = pruner.report.guard["mlp"]
    line = f"guard changed {mlp['changed']} of 2 refits of mlp, held-out error {mlp['error']:.2f} x"
    assert line in str(pruner.report) and "guard" not in str(plain.report)


def test_the_blocks_set_aside_are_not_fitted(monkeypatch):
    from optimum_structprune import sweep

    seen = []

    def watched(refit, weight, bias, moments, keep, damping, held):
        seen.append((moments.count, held.count))
        return guarded_refit(refit, weight, bias, moments, keep, damping, held)

    monkeypatch.setattr(sweep, "guarded_refit", watched)
    StructPruner(config(guard=True, num_samples=24)).prune_model(build("llama-tied"), tokenizer())
    # Of 12 blocks of each of the two domains, 2 are set aside; a block has 24 tokens.
    assert set(seen) == {(2 * 10 * 24, 2 * 2 * 24)}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_domain_with_one_block_cannot_be_guarded(inplace):
    domains = [DomainConfig(name="wide", source=documents(), weight=7), DomainConfig(name="tiny", source=documents())]
    with pytest.raises(StructPruneError, match="'tiny' has only 1; give it 2 or more through num_samples"):
        StructPruner(config(guard=True, domains=domains)).prune_model(
            build("llama-tied"), tokenizer(), inplace=inplace
        )
