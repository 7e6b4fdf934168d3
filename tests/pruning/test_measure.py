"""The text that a report measures a model on."""

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
def test_short_rows_are_few_tokens_of_all_samples_in_rows_enough_for_an_error(shape, tokens):
    samples = torch.arange(shape[0] * shape[1]).reshape(shape)
    rows, _ = short_rows(samples, None, tokens)
    length = len(rows[0])
    assert len(rows) >= MANY_DOCUMENTS and {len(row) for row in rows} == {length}
    assert length * len(rows) <= max(tokens, MANY_DOCUMENTS * ROW)
    heads, bodies = {int(row[0]) for row in rows}, torch.cat([row[1:] for row in rows])
    assert heads <= set(samples[:, 0].tolist()) and len(heads) == min(len(samples), len(rows))
    assert len(set(bodies.tolist())) == len(bodies) and (bodies.reshape(-1, length - 1).diff() == 1).all()


@given(st.lists(st.integers(0, 40), min_size=1), st.integers(0, 2000))
def test_each_document_has_a_row_before_one_has_two(lengths, tokens):
    text = [token for length in lengths for token in (*[5] * length, EOS)]
    text += [5] * (-len(text) % 23)
    samples = torch.cat([torch.zeros(len(text) // 23, 1, dtype=torch.int64), torch.tensor(text).reshape(-1, 23)], 1)
    rows, numbers = short_rows(samples, EOS, tokens)
    every = short_rows(samples, EOS, 10**6)[1].tolist()
    assert len(rows) == len(numbers) <= max(tokens // 24, MANY_DOCUMENTS)
    assert len({*numbers.tolist()}) == min(len({*every}), len(rows))


def test_a_short_run_is_judged_by_many_documents_of_each_kind_and_no_more_is_measured_than_is_asked_for():
    pruner = StructPruner(config(num_samples=96))
    pruner.prune_model(build("llama-tied"), tokenizer())
    measured = [domain.tokens for domain in pruner.report.domains.values()]
    assert 0 < sum(measured) <= max(96 * 24 / 8, MANY_DOCUMENTS * 23 * len(measured))
    texts = [DomainConfig(name, documents(60, seed)) for seed, name in enumerate("abc")]
    few = StructPruner(config(domains=texts, num_samples=30))
    few.prune_model(build("llama-tied"), tokenizer())
    assert all(isfinite(domain.perplexity.margin) for domain in few.report.domains.values())
