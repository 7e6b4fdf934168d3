"""A budget that tokens and layers share: it is met to within a step of tokens, and the trial of least loss decides."""

import pytest
from helpers import with_long
from models import GROUPED, fewer_tokens, random_model, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner
from optimum_structprune.steps import division


READER = real_text_model()[1]
SHARE = 0.85


def pruned():
    fields = {**GROUPED, "vocab_size": len(READER), "max_position_embeddings": 256}
    model = random_model(AutoModelForCausalLM, "llama", fields)
    config = fewer_tokens(widths=None, targets=("vocab", "mlp"), budget={"parameters": SHARE}, round_to=8)
    return model, StructPruner(config).prune_model(model, READER)


def unused_parameters(model, small):
    return int(SHARE * model.num_parameters()) - small.num_parameters()


@pytest.mark.parametrize(("price_of_layers", "numbers_tried"), with_long([(100.0, 2), (0.5, 3), (0.0, 3)], [100.0]))
def test_the_division_with_the_least_loss_is_taken_and_meets_the_budget(monkeypatch, price_of_layers, numbers_tried):
    trials = []

    def trial(self, number):
        """Losses by fixed prices of removed tokens and of what the layers contribute."""
        of_tokens = 7 * float(self.ranking.removed_shares[number])
        budget = self.request.budget.budget
        excess = max(budget.cost({"vocab": number}) - budget.limit, 0) / budget.dense
        trials.append(division.Trial(number, of_tokens, of_tokens + price_of_layers * excess))
        return trials[-1]

    monkeypatch.setattr(division.Division, "trial", trial)
    model, small = pruned()
    best = min(trials, key=lambda each: each.total_loss)
    assert len(trials) == numbers_tried
    assert small.config.vocab_size == best.number
    assert trials[0] == min(trials, key=lambda each: each.number), "tokens alone come first"

    tokens_alone = small.config.intermediate_size == model.config.intermediate_size
    assert tokens_alone == (best is trials[0]) == (price_of_layers == 100.0)
    if tokens_alone:
        assert 0 <= unused_parameters(model, small) < 8 * 2 * model.config.hidden_size


@pytest.mark.slow
def test_measured_losses_decide_and_the_layers_are_as_before_once_they_are_measured():
    """The layers of a random model lose nothing, and its tokens do."""
    model, small = pruned()
    assert small.config.intermediate_size < model.config.intermediate_size
    assert unused_parameters(model, small) >= 0
    again = pruned()[1]
    assert all((one == two).all() for one, two in zip(small.parameters(), again.parameters(), strict=True))
