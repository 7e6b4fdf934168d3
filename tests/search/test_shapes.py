"""Shapes with one width for all layers: they are small enough, and no smaller than they have to be."""

import pytest

from optimum_structprune.search.search import thinned, uniform_shapes


LAYERS, SIZE, GROUPS = 4, 60, 4
CURVES = {
    **{(layer, "mlp"): [(1 + layer) * (gone / SIZE) ** 2 for gone in range(SIZE + 1)] for layer in range(LAYERS)},
    **{(layer, "attention"): [0.4 * gone**1.5 for gone in range(GROUPS + 1)] for layer in range(LAYERS)},
}


def saved(widths):
    return LAYERS * (3 * (SIZE - widths["mlp"]) + 40 * (GROUPS - widths["attention"]))


def test_uniform_shapes_save_enough_and_one_unit_more_would_not():
    choices, need = {"mlp": range(1, SIZE + 1), "attention": range(1, GROUPS + 1)}, 550
    ranked = uniform_shapes(choices, CURVES, lambda widths: saved(widths) >= need)
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
