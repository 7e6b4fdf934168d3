"""What a dense model expects of words, in the tokens that a smaller vocabulary spells them by."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPED, random_model
from transformers import AutoModelForCausalLM
from vocabulary.test_tokens import TEXT, dense, kinds, smaller

from optimum_structprune import StructPruneError
from optimum_structprune.forward.metrics import divergence
from optimum_structprune.vocabulary.parts import Parts, divergence_from_dense


SIZE = 3
SPELLINGS = st.lists(st.lists(st.integers(0, SIZE - 1), min_size=2, max_size=4).map(tuple), unique=True, max_size=8)


def random_text(data, lost):
    """Parts, a text of dense tokens, which of them are counted, and what a model expects for each of these."""
    spellings = [(0,), (1,), (2,), *lost]
    ids = data.draw(st.lists(st.integers(0, len(spellings) - 1), min_size=2, max_size=6))
    counted = [False, *(data.draw(st.booleans()) for _ in ids[1:])]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    return Parts(spellings, SIZE), ids, counted, torch.randn(sum(counted), len(spellings), generator=generator) * 3


def next_part(spellings, now, before, read, last):
    """By enumeration of tokens, and of pairs of them: the probability of each next part, and that one of them follows.

    `now` is expected of the token of which `read` is read, and `before` of the one before it, which was read as all of
    `last`; None where nobody knows.
    """
    ways = {None: 0.0}  # the probability of what may follow; None is what nobody knows

    def add(follows, chance):
        ways[follows] = ways.get(follows, 0.0) + chance

    for token, spelling in enumerate(spellings):
        if read and spelling[: len(read)] == read:
            add(spelling[len(read)] if len(spelling) > len(read) else None, now[token])
        elif not read and before is None:
            add(spelling[0], now[token])
        elif not read and spelling == last:
            for other, following in enumerate(spellings):
                add(following[0], before[token] * now[other])
        elif not read and spelling[: len(last)] == last:
            add(spelling[len(last)], before[token])
    total, known = sum(ways.values()), sum(ways.values()) - ways[None]
    return [ways.get(part, 0) / known if known else 0 for part in range(SIZE)], known / total


@settings(max_examples=100)
@given(lost=SPELLINGS, data=st.data())
def test_the_next_part_is_expected_as_all_words_that_have_it_there_are_together(lost, data):
    parts, ids, counted, logits = random_text(data, lost)
    expected, number = torch.zeros(len(logits)), -1
    spelled = [entry for entry in parts.spelled(ids, counted) if entry[1] >= 0]
    student = torch.randn(len(spelled), SIZE, generator=torch.Generator().manual_seed(1))
    chances, place, before = logits.softmax(-1).tolist(), 0, None
    for at, (token, counts) in enumerate(zip(ids, counted, strict=True)):
        number += counts
        for end in range(len(parts.spellings[token]) if counts else 0):
            read, last = parts.spellings[token][:end], parts.spellings[ids[at - 1]]
            target, sure = next_part(parts.spellings, chances[number], before, read, last)
            ours = student[place].log_softmax(-1).tolist()
            assert spelled[place][:2] == (parts.spellings[token][end], number)
            expected[number] += sure * sum(p * (log(p) - q) for p, q in zip(target, ours, strict=True) if p)
            place += 1
        before = chances[number] if counts else None
    if spelled:
        _, rows, nodes = torch.tensor(spelled).unbind(1)
        found = parts.divergence(student, logits, rows, nodes)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=100)
@given(lost=SPELLINGS, data=st.data())
def test_the_parts_of_a_word_are_together_as_likely_as_the_word(lost, data):
    parts, ids, _, _ = random_text(data, lost)
    logits = torch.randn(len(ids) - 1, 3 + len(lost), generator=torch.Generator().manual_seed(2))
    spelled = [entry for entry in parts.spelled(ids, [False, *[True] * (len(ids) - 1)]) if entry[1] >= 0]
    part, rows, nodes = torch.tensor(spelled).unbind(1)
    first = rows.diff(prepend=torch.tensor([-1])) != 0
    # Without the token before, a first part is what the next token begins with.
    nodes = nodes.where(~first, -1)
    expected, sure = parts.expected(logits.softmax(-1), rows, first, nodes)
    chances = expected[range(len(part)), part] * sure
    for row, token in enumerate(ids[1:]):
        begins = [spelling[: len(of)] == of for of in [parts.spellings[token]] for spelling in parts.spellings]
        torch.testing.assert_close(chances[rows == row].prod(), logits[row].softmax(-1)[torch.tensor(begins)].sum())


@pytest.mark.parametrize("tokens", [3, 200])
def test_where_all_tokens_stay_it_is_the_plain_divergence(tokens):
    parts = Parts([(token,) for token in range(tokens)], tokens)
    ids = torch.randint(tokens, (150,)).tolist()
    _, rows, nodes = torch.tensor(parts.spelled(ids, [False, *[True] * 149])[1:]).unbind(1)
    ours, dense = torch.randn(2, 149, tokens)
    torch.testing.assert_close(parts.divergence(ours, dense, rows, nodes), divergence(ours, dense, mean=False))


@kinds
def test_text_is_spelled_by_the_parts_of_its_tokens(kind):
    reader, (keep, less) = dense(kind)[1], smaller(kind, 1)
    sizes = [{**GROUPED, "vocab_size": len(each)} for each in (reader, less)]
    whole, small = (random_model(AutoModelForCausalLM, "llama", fields) for fields in sizes)
    parts = Parts.between(whole, reader, small, less)
    assert [parts.spellings[token] for token in keep] == [(new,) for new in range(len(keep))]
    split = 0
    for text in TEXT:
        ids = reader(text).input_ids
        spelled = [part for part, *_ in parts.spelled(ids, [False] * len(ids))]
        assert less.decode(spelled) == reader.decode(ids)
        split += len(spelled) - len(ids)
    assert split
    rows = [reader(text).input_ids for text in TEXT[:2]]
    found = divergence_from_dense(parts, whole, small, rows, (1, 4))
    assert found.shape == (2,) and (found > 0).all()
    same = Parts.between(whole, reader, whole, reader)
    assert divergence_from_dense(same, whole, whole, rows, (1, 4)).abs().max() < 1e-4
    with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
        Parts.between(small, less, whole, reader)
