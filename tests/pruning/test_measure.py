"""A report measures a model on rows from as many documents as possible."""

from math import isfinite

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.forward.metrics import MANY_DOCUMENTS
from optimum_structprune.pruning.measure import ROW, short_rows


EOS = -1  # no token


@pytest.mark.parametrize(("shape", "tokens"), [((8, 512), 1000), ((2, 512), 400), ((30, 48), 600), ((4, 1024), 5)])
def test_short_rows_come_from_all_samples_and_do_not_overlap(shape, tokens):
    samples = torch.arange(shape[0] * shape[1]).reshape(shape)
    rows, _ = short_rows(samples, None, tokens)

    length = len(rows[0])
    assert {len(row) for row in rows} == {length}
    assert len(rows) >= MANY_DOCUMENTS
    assert length * len(rows) <= max(tokens, MANY_DOCUMENTS * ROW)

    # Each row begins with the first token of its sample.
    heads = {int(row[0]) for row in rows}
    assert heads <= set(samples[:, 0].tolist())
    assert len(heads) == min(len(samples), len(rows))

    bodies = torch.cat([row[1:] for row in rows])
    assert len(set(bodies.tolist())) == len(bodies)
    assert (bodies.reshape(-1, length - 1).diff() == 1).all()


@given(st.lists(st.integers(0, 40), min_size=1), st.integers(0, 2000))
def test_each_document_has_a_row_before_any_has_two(lengths, tokens):
    text = []
    for length in lengths:
        text += [5] * length + [EOS]
    text += [5] * (-len(text) % 23)
    bodies = torch.tensor(text).reshape(-1, 23)
    samples = torch.cat([torch.zeros(len(bodies), 1, dtype=torch.int64), bodies], 1)

    rows, numbers = short_rows(samples, EOS, tokens)
    assert len(rows) == len(numbers)
    assert len(rows) <= max(tokens // 24, MANY_DOCUMENTS)

    all_numbers = short_rows(samples, EOS, 10**6)[1].tolist()
    assert len(set(numbers.tolist())) == min(len(set(all_numbers)), len(rows))


def test_a_run_measures_a_limited_number_of_tokens():
    pruner = StructPruner(config(num_samples=96))
    pruner.prune_model(build("llama-tied"), tokenizer())

    tokens = [domain.tokens for domain in pruner.report.domains.values()]
    assert 0 < sum(tokens) <= max(96 * 24 / 8, MANY_DOCUMENTS * 23 * len(tokens))


def test_a_short_run_is_measured_on_several_documents_of_each_domain():
    texts = [DomainConfig(name, documents(60, seed)) for seed, name in enumerate("abc")]
    pruner = StructPruner(config(domains=texts, num_samples=30))
    pruner.prune_model(build("llama-tied"), tokenizer())

    # A single document has no margin of error.
    assert all(isfinite(domain.perplexity.margin) for domain in pruner.report.domains.values())
