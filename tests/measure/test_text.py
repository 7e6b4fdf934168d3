"""Text that measures a model comes from as many documents as possible."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.domains.packing import document_numbers
from optimum_structprune.measure.text import ROW, Text
from optimum_structprune.system.margins import MANY_DOCUMENTS


EOS = -1  # no token


@pytest.mark.parametrize(("shape", "tokens"), [((8, 512), 1000), ((2, 512), 400), ((30, 48), 600), ((4, 1024), 5)])
def test_short_rows_come_from_all_samples_and_do_not_overlap(shape, tokens):
    samples = torch.arange(shape[0] * shape[1]).reshape(shape)
    rows = Text.short(samples, None, tokens).rows

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

    reader = SimpleNamespace(eos_token_id=EOS)
    text = Text.short(samples, reader, tokens)
    rows, numbers = text.rows, text.documents
    assert len(rows) == len(numbers)
    assert len(rows) <= max(tokens // 24, MANY_DOCUMENTS)

    all_numbers = Text.short(samples, reader, 10**6).documents.tolist()
    assert len(set(numbers.tolist())) == min(len(set(all_numbers)), len(rows))


def test_a_token_belongs_to_the_document_that_ends_after_it():
    samples = torch.tensor([[1, 5, 5, 2, 6], [1, 6, 6, 6, 6], [1, 6, 2, 7, 2]])
    assert document_numbers(samples, 2).tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 2, 2, 3]]
    assert document_numbers(samples, None)[:, 0].tolist() == [0, 1, 2]
