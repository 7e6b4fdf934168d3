"""The best choice of one option for each of several groups, as an integer program."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import StructPruneError


K = TypeVar("K", bound=Hashable)
E = TypeVar("E", bound=Hashable)

# The solver's best choice may lose so much more, as a share, than it has proved that any choice has to lose.
GAP = 1e-4
SECONDS = 60.0
# By so much does a choice that saves nothing beat another one of the same loss, as a share of all losses.
TIE = 1e-7


@dataclass(frozen=True)
class Option:
    """One thing that a group may do.

    Attributes:
        loss: What it costs.
        saved: What it saves of each resource.
    """

    loss: float
    saved: tuple[float, ...]


def cheapest(
    groups: Mapping[K, Sequence[Option]],
    exits: Mapping[E, tuple[Option, Sequence[K]]],
    need: Sequence[float],
    most_exits: int,
) -> tuple[dict[K, int], set[E]]:
    """The choice of least loss that saves enough: a knapsack with one choice from each group (Kellerer, Pferschy &
    Pisinger 2004, chapter 11), which `scipy.optimize.milp` solves.

    Returns:
        The index of the option of each group that no exit ends, and the exits that are taken.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    columns = [(key, index) for key, options in groups.items() for index in range(len(options))]
    taken = [option for options in groups.values() for option in options] + [option for option, _ in exits.values()]
    row = {key: number for number, key in enumerate(groups)}
    places = [(row[key], number) for number, (key, _) in enumerate(columns)]
    places += [(row[key], len(columns) + n) for n, (_, ended) in enumerate(exits.values()) for key in ended]
    one_each = csr_array((np.ones(len(places)), tuple(zip(*places, strict=True))), shape=(len(groups), len(taken)))
    saved = np.array([option.saved for option in taken]).T
    unit = np.maximum(np.abs(saved).max(1, keepdims=True), 1e-30)
    loss = np.array([option.loss for option in taken])
    objective = loss / max(np.abs(loss).max(), 1e-30) + TIE * (saved / unit).sum(0)
    is_exit = np.arange(len(taken)) >= len(columns)
    wanted = np.array(need)
    for slack in (0.0, 1e-6):  # the solver takes a constraint for met if it is missed by less
        found = milp(
            objective,
            integrality=np.ones(len(taken)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(saved / unit, lb=(wanted * (1 + slack)) / unit[:, 0]),
                LinearConstraint(is_exit.astype(float)[None], ub=most_exits),
            ],
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if found.x is None:
            raise StructPruneError("No choice of widths saves so much; ask for less, or add targets.")
        chosen = found.x > 0.5
        if (saved[:, chosen].sum(1) >= wanted - 1e-9 * np.abs(wanted)).all():
            break
    return (
        {key: index for (key, index), one in zip(columns, chosen, strict=False) if one},
        {name for name, one in zip(exits, chosen[len(columns) :], strict=True) if one},
    )
