"""A budget for tokens and layers is met to within a step of tokens, by the trial with the least loss."""

import pytest
from helpers import with_long
from models import GROUPED, fewer_tokens, random_model, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner
from optimum_structprune.search import division


READER = real_text_model()[1]
SHARE = 0.85


def prune():
    """Return a model and the pruned model."""
    fields = GROUPED | {"vocab_size": len(READER), "max_position_embeddings": 256}
    model = random_model(AutoModelForCausalLM, "llama", fields)
    config = fewer_tokens(widths=None, targets=("vocab", "mlp"), budget={"parameters": SHARE}, round_to=8)
    small = StructPruner(config).prune_model(model, READER)
    return model, small


def unused_parameters(model, small):
    return int(SHARE * model.num_parameters()) - small.num_parameters()


@pytest.mark.parametrize(("price_of_layers", "trial_count"), with_long([(100.0, 2), (0.5, 3), (0.0, 3)], [100.0]))
def test_the_division_with_the_least_loss_is_chosen_and_meets_the_budget(monkeypatch, price_of_layers, trial_count):
    trials = []

    def trial(self, number):
        """Return losses by fixed prices of the removed tokens and of the removed weights of layers."""
        token_loss = 7 * float(self.ranking.removed_shares[number])
        budget = self.request.budget.budget
        excess = max(budget.cost({"vocab": number}) - budget.limit, 0) / budget.dense
        result = division.DivisionTrial(number, token_loss, token_loss + price_of_layers * excess)
        trials.append(result)
        return result

    monkeypatch.setattr(division.Division, "trial", trial)
    model, small = prune()

    best = min(trials, key=lambda trial: trial.total_loss)
    assert len(trials) == trial_count
    assert small.config.vocab_size == best.number
    assert trials[0] == min(trials, key=lambda trial: trial.number), "the first trial removes only tokens"

    removes_only_tokens = small.config.intermediate_size == model.config.intermediate_size
    assert removes_only_tokens == (best is trials[0])
    assert removes_only_tokens == (price_of_layers == 100.0)
    if removes_only_tokens:
        assert 0 <= unused_parameters(model, small) < 8 * 2 * model.config.hidden_size


@pytest.mark.slow
def test_measured_losses_decide_and_trials_do_not_change_the_layers():
    """Channels of a random model are worthless, and its tokens are not."""
    model, small = prune()
    assert small.config.intermediate_size < model.config.intermediate_size
    assert unused_parameters(model, small) >= 0

    _, second = prune()
    for weight, second_weight in zip(small.parameters(), second.parameters(), strict=True):
        assert (weight == second_weight).all()
