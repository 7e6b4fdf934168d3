"""Shapes from measured losses: they save enough, no more than they have to, and lose least."""

from itertools import product

import pytest
import torch

from optimum_structprune import StructPruneError
from optimum_structprune.widths.shapes import (
    Option,
    Resource,
    cheapest,
    searched_widths,
    thinned,
    uniform_shapes,
)


LAYERS, SIZE, GROUPS = 4, 60, 4
UNIT = {**{(layer, "mlp"): 3.0 for layer in range(LAYERS)}, **{(layer, "attention"): 40.0 for layer in range(LAYERS)}}
ALL = LAYERS * (3.0 * SIZE + 40.0 * GROUPS + 5.0)


def curves():
    """Losses that grow faster than the units removed, more in some layers than in others."""
    of_mlp = {
        (layer, "mlp"): [(1 + layer) * (gone / SIZE) ** 2 for gone in range(SIZE + 1)] for layer in range(LAYERS)
    }
    return of_mlp | {(layer, "attention"): [0.4 * gone**1.5 for gone in range(GROUPS + 1)] for layer in range(LAYERS)}


def wanted(share):
    return Resource(share * ALL, UNIT)


def saved(widths):
    return sum(
        UNIT[layer, name] * ((SIZE if name == "mlp" else GROUPS) - (width if isinstance(width, int) else width[layer]))
        for name, width in widths.items()
        for layer in range(LAYERS)
    )


WIDTHS = {key: list(range(SIZE if key[1] == "mlp" else GROUPS, 0, -1)) for key in UNIT}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_every_layer_gives_up_what_costs_least(share):
    found = searched_widths(WIDTHS, curves(), [wanted(share)])
    assert wanted(share).need <= saved(found) < wanted(share).need + 2 * 3.0
    widths = [*found["mlp"].values()]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    # The next unit costs about the same everywhere: (1 + layer) × units gone.
    prices = [(1 + layer) * (SIZE - width) for layer, width in enumerate(widths) if 1 < width < SIZE]
    assert max(prices) - min(prices) <= 2 * LAYERS


def test_each_mean_is_met_by_itself():
    means = [
        Resource(3.0 * 20 * LAYERS, {key: 3.0 for key in UNIT if key[1] == "mlp"}),
        Resource(40.0 * LAYERS, {key: 40.0 for key in UNIT if key[1] == "attention"}),
    ]
    widths = searched_widths(WIDTHS, curves(), means)
    assert sum(widths["mlp"].values()) == 40 * LAYERS and sum(widths["attention"].values()) == 3 * LAYERS


@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_saves_enough_loses_less(seed):
    """Against all choices of three groups with random options of two resources."""
    numbers = iter(torch.rand(30, generator=torch.Generator().manual_seed(seed)).tolist())
    groups = {key: [Option(next(numbers), (next(numbers), next(numbers))) for _ in range(3)] for key in "abc"}
    need = [1.2, 0.9]

    def total(indices):
        options = [groups[key][index] for key, index in zip(groups, indices, strict=True)]
        return sum(one.loss for one in options), [sum(one.saved[n] for one in options) for n in range(2)]

    every = [total(indices) for indices in product(range(3), repeat=3)]
    best = min((loss for loss, saved in every if saved[0] >= need[0] and saved[1] >= need[1]), default=None)
    if best is None:
        with pytest.raises(StructPruneError, match="No choice of widths saves so much"):
            cheapest(groups, need)
        return
    loss, saved = total(cheapest(groups, need).values())
    assert loss == pytest.approx(best, rel=1e-3) and saved[0] >= need[0] and saved[1] >= need[1]


def test_uniform_shapes_save_enough_and_one_unit_more_would_not():
    choices, need = {"mlp": range(1, SIZE + 1), "attention": range(1, GROUPS + 1)}, wanted(0.4).need
    ranked = uniform_shapes(choices, curves(), wanted(0.4))
    assert [loss for loss, _ in ranked] == sorted(loss for loss, _ in ranked)
    # A shape for each number of KV groups that leaves the FFN at least one channel.
    most = {groups: saved({"mlp": 1, "attention": groups}) for groups in choices["attention"]}
    assert {widths["attention"] for _, widths in ranked} == {groups for groups, of in most.items() if of >= need}
    for loss, widths in ranked:
        assert loss == pytest.approx(
            10 * (1 - widths["mlp"] / SIZE) ** 2 + 4 * 0.4 * (GROUPS - widths["attention"]) ** 1.5
        )
        wider = {**widths, "mlp": widths["mlp"] + 1}
        assert saved(widths) >= need and (widths["mlp"] == SIZE or saved(wider) < need)


def test_few_widths_stand_for_many_and_have_the_numbers_that_are_left():
    assert thinned(range(5)) == [0, 1, 2, 3, 4]
    few = thinned(range(1000, 0, -1))
    assert len(few) == 16 and (few[0], few[-1]) == (1000, 1) and few == sorted(set(few), reverse=True)
