"""The only loop over text measures what its definitions say, with every kind of head."""

import pytest
import torch
from helpers import count_hooks
from models import build, token_ids

from optimum_structprune.measure.losses import expected_shares, measure, measure_all, totals
from optimum_structprune.measure.predictions import Predictor
from optimum_structprune.measure.text import Text


@pytest.mark.parametrize("case", ["llama-tied", "phi", "gemma2"])
@torch.no_grad()
def test_rows_have_the_losses_of_their_logits(case):
    """The head of phi has a bias, and gemma2 caps its logits."""
    model = build(case)
    rows = list(token_ids(2, 12, 1))
    losses = totals(measure(model, Text(rows)).loss)

    for row, loss in zip(rows, losses, strict=True):
        log_probabilities = model(row[None]).logits[0, :-1].double().log_softmax(1)
        expected = -log_probabilities.gather(1, row[1:, None]).sum()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


class Unsteady(torch.nn.Module):
    """A part of a layer whose output differs from call to call, as on a GPU that adds in any order."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs) * (1 + 1e-4 * self.calls)


@pytest.mark.parametrize(("case", "is_plain"), [("llama-tied", True), ("llama-untied", True), ("gemma2", False)])
@torch.no_grad()
def test_one_pass_shows_if_the_head_alone_computes_the_logits(case, is_plain):
    model = build(case)
    ids = token_ids(2, 8)
    expected = model(ids).logits.flatten(0, 1)[[3, 9]]

    predictions = Predictor(model).predict({"input_ids": ids}, torch.tensor([3, 9]))
    assert (predictions.head is not None) is is_plain
    assert predictions.values.shape[0] == 2
    torch.testing.assert_close(predictions.logits(0, 2), expected)

    for layer in model.model.layers:
        layer.mlp = Unsteady(layer.mlp)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    predictor = Predictor(model)
    for _ in range(2):
        assert (predictor.predict({"input_ids": ids}, torch.tensor([3])).head is not None) is is_plain

    # A second pass is needed once, if the head alone does not compute the logits.
    assert [layer.mlp.calls for layer in model.model.layers] == ([4, 4] if is_plain else [5, 5])
    assert count_hooks(model) == count_hooks(build(case))


def test_rows_are_in_their_order_whatever_their_lengths_and_batches():
    model = build("llama-tied")
    other = build("llama-untied")
    rows = [token_ids(1, length, seed=length)[0] for length in (9, 4, 12, 4, 7)]
    expected = [measure(model, Text([row]), other) for row in rows]

    for tokens in (1, 24, 1000):
        measured = measure_all(model, {"b": Text(rows), "a": Text(rows[:2])}, other, tokens=tokens)
        for name in ("loss", "other", "kl"):
            for row, single in enumerate(expected):
                (value,) = getattr(single, name)
                torch.testing.assert_close(getattr(measured["b"], name)[row], value, atol=1e-5, rtol=1e-5)
            assert len(getattr(measured["a"], name)) == 2


def test_only_counted_tokens_have_values():
    model = build("llama-tied")
    (row,) = token_ids(1, 12)
    labels = row.masked_fill(torch.arange(12) < 8, -100)
    (all_losses,) = measure(model, Text([row])).loss
    (losses,) = measure(model, Text([row], labels=[labels])).loss

    torch.testing.assert_close(losses, all_losses[7:])


def test_documents_with_positions_do_not_see_each_other():
    model = build("llama-tied")
    first, second = token_ids(2, 6)
    positions = torch.arange(6).repeat(2)
    row = torch.cat([first, second])
    packed = Text([row], labels=[row.masked_fill(positions == 0, -100)], positions=[positions])
    (losses,) = measure(model, packed).loss

    expected = torch.cat(measure(model, Text([first, second])).loss)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_expected_shares_are_means_of_the_roots_of_probabilities():
    model = build("llama-tied")
    ids = token_ids(3, 16)
    shares = expected_shares(model, ids)

    roots = model.eval()(ids).logits[:, :-1].softmax(-1).sqrt().double().sum((0, 1))
    torch.testing.assert_close(shares, roots / roots.sum())
