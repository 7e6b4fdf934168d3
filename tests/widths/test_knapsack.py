"""The integer program finds what trying everything finds."""

from itertools import product

import pytest
import torch

from optimum_structprune import StructPruneError
from optimum_structprune.widths.knapsack import Option, cheapest


def problem(seed):
    """Three groups of two layers with random options of two resources, and a way out of each layer."""
    numbers = iter(torch.rand(60, generator=torch.Generator().manual_seed(seed)).tolist())

    def option():
        return Option(next(numbers), (next(numbers), next(numbers)))

    groups = {key: [option() for _ in range(3)] for key in ((0, "a"), (0, "b"), (1, "a"))}
    exits = {layer: (option(), [key for key in groups if key[0] == layer]) for layer in (0, 1)}
    return groups, exits


def total(groups, exits, found, gone):
    taken = [groups[key][index] for key, index in found.items()] + [exits[name][0] for name in gone]
    return sum(one.loss for one in taken), [sum(one.saved[n] for one in taken) for n in range(2)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most_exits", [0, 1])
def test_nothing_that_saves_enough_loses_less(seed, most_exits):
    groups, exits = problem(seed)
    need = [1.2, 0.9]
    best = float("inf")
    for gone in [(), *[(layer,) for layer in exits][: most_exits * len(exits)]]:
        left = [key for key in groups if key[0] not in gone]
        for choice in product(*(range(3) for _ in left)):
            loss, saved = total(groups, exits, dict(zip(left, choice, strict=True)), gone)
            if all(have >= wanted for have, wanted in zip(saved, need, strict=True)):
                best = min(best, loss)
    found, gone = cheapest(groups, exits, need, most_exits)
    loss, saved = total(groups, exits, found, gone)
    assert loss == pytest.approx(best, rel=1e-3) and saved[0] >= 1.2 and saved[1] >= 0.9
    assert len(gone) <= most_exits and set(found) == {key for key in groups if key[0] not in gone}


def test_what_cannot_be_saved_is_refused():
    groups, exits = problem(0)
    with pytest.raises(StructPruneError, match="No choice of widths saves so much"):
        cheapest(groups, exits, [100.0, 0.0], 2)
