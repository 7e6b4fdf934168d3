"""A budget that tokens share with other spaces is met by the shape with the least loss in a trial."""

from copy import deepcopy

import pytest
from helpers import with_long
from models import GROUPED, fewer_tokens, random_model, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.search.trials import SeveralTexts, Trials
from optimum_structprune.steps.base import RunState
from optimum_structprune.steps.data import CalibrationData


READER = real_text_model()[1]
SHARE = 0.85


def prune(targets=("vocab", "mlp")):
    """Return a model, the pruned model and the shapes of the report."""
    fields = GROUPED | {"vocab_size": len(READER), "max_position_embeddings": 256}
    model = random_model(AutoModelForCausalLM, "llama", fields)
    config = fewer_tokens(widths=None, targets=targets, budget={"parameters": SHARE}, round_to=8)
    pruner = StructPruner(config)
    small = pruner.prune_model(model, READER)
    return model, small, pruner.result.report.shapes


def unused_parameters(model, small):
    return int(SHARE * model.num_parameters()) - small.num_parameters()


def with_prices(monkeypatch, prices):
    """Let the loss of a trial be the sum of prices for the removed share of each space."""

    def loss(self, widths, gguf=None):
        total = 0.0
        for name, width in widths.items():
            space = self.state.arch.of(name)[0]
            total += prices[name] * (1 - width / space.width) ** 2
        return total

    monkeypatch.setattr(Trials, "loss", loss)


@pytest.mark.parametrize(
    ("price_of_tokens", "price_of_channels", "removed"),
    with_long([(1, 100, "vocab"), (5, 1, "vocab mlp"), (100, 1, "mlp")], [(5, 1, "vocab mlp")]),
)
def test_the_shape_with_the_least_loss_is_chosen_and_meets_the_budget(
    monkeypatch, price_of_tokens, price_of_channels, removed
):
    with_prices(monkeypatch, {"vocab": price_of_tokens, "mlp": price_of_channels})
    model, small, shapes = prune()

    widths = {"vocab": small.config.vocab_size, "mlp": small.config.intermediate_size}
    full_widths = {"vocab": model.config.vocab_size, "mlp": model.config.intermediate_size}
    chosen = [shape for shape in shapes if shape["chosen"]]
    assert [name for name in widths if widths[name] < full_widths[name]] == removed.split()
    assert [shape["widths"] for shape in chosen] == [{name: widths[name] for name in removed.split()}]
    assert chosen[0]["loss"] == min(shape["loss"] for shape in shapes)
    assert 0 <= unused_parameters(model, small)


def test_each_division_is_tried_once(monkeypatch):
    with_prices(monkeypatch, {"vocab": 1, "mlp": 1})
    *_, shapes = prune()

    widths = [shape["widths"] for shape in shapes]
    assert {"vocab"} in [set(names) for names in widths], "the tokens alone compete"
    assert {"mlp"} in [set(names) for names in widths], "the channels alone compete"
    assert all(widths.count(shape) == 1 for shape in widths)


@pytest.mark.parametrize("targets", [None, ["vocab", "mlp"]], ids=["default", "named"])
def test_kv_groups_compete_unless_targets_are_named(monkeypatch, targets):
    with_prices(monkeypatch, {"vocab": 1, "mlp": 1, "attention": 1e-6})
    model, small, shapes = prune(targets)

    tries_groups = any("attention" in shape["widths"] for shape in shapes)
    assert tries_groups == (targets is None)
    assert (small.config.num_key_value_heads < model.config.num_key_value_heads) == tries_groups
    assert 0 <= unused_parameters(model, small)


def test_a_trial_restores_the_model_and_the_original_model_has_no_loss():
    model, reader = real_text_model()
    weights = deepcopy(model.state_dict())
    data = CalibrationData.read(fewer_tokens(), model, reader)
    state = RunState.start(model, describe(model), data, reader)
    judge = SeveralTexts(state, reader)

    assert Trials(state, judge, tokens=96).loss({"mlp": 64}) != 0
    assert judge.loss(model, reader) == pytest.approx(0, abs=1e-6)
    for name, weight in model.state_dict().items():
        assert (weight == weights[name]).all()


@pytest.mark.slow
def test_measured_losses_decide_and_trials_do_not_change_the_layers():
    """Channels of a random model are worthless, and its tokens are not."""
    model, small, _ = prune()
    assert small.config.intermediate_size < model.config.intermediate_size
    assert unused_parameters(model, small) >= 0

    _, second, _ = prune()
    for weight, second_weight in zip(small.parameters(), second.parameters(), strict=True):
        assert (weight == second_weight).all()
