"""The text that a report measures a model on."""

import pytest
import torch
from models import build, config, tokenizer

from optimum_structprune import StructPruner
from optimum_structprune.forward.metrics import MIN_DOCUMENTS
from optimum_structprune.pruning.measure import ROW, short_rows


@pytest.mark.parametrize(("shape", "tokens"), [((8, 512), 1000), ((2, 512), 400), ((30, 48), 600), ((4, 1024), 5)])
def test_short_rows_are_few_tokens_of_all_samples_in_rows_enough_for_an_error(shape, tokens):
    samples = torch.arange(shape[0] * shape[1]).reshape(shape)
    rows = short_rows(samples, tokens)
    length = len(rows[0])
    assert len(rows) >= MIN_DOCUMENTS and {len(row) for row in rows} == {length}
    assert length * len(rows) <= max(tokens, MIN_DOCUMENTS * ROW)
    heads, bodies = {int(row[0]) for row in rows}, torch.cat([row[1:] for row in rows])
    assert heads <= set(samples[:, 0].tolist()) and len(heads) == min(len(samples), len(rows))
    assert len(set(bodies.tolist())) == len(bodies) and (bodies.reshape(-1, length - 1).diff() == 1).all()


def test_no_more_is_measured_than_is_asked_for():
    pruner = StructPruner(config(num_samples=96))
    pruner.prune_model(build("llama-tied"), tokenizer())
    assert 0 < sum(pruner.report.perplexity_tokens.values()) <= 96 * 24 / 8
