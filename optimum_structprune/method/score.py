"""Scores: one number for each of what may go, higher = keep, and the choice by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

from ..errors import StructPruneError


@dataclass(eq=False)
class Criterion:
    """A score function and its needs; `criteria.register_criterion` makes one of a function.

    Args:
        name: What `StructPruneConfig.criterion` calls it.
        score: For units inside the layers, a function `(weight, moments, columns_per_unit, options)`: of the weight of
            a consumer, shape `(out, units * columns_per_unit)`, fp32; of the moments of its input, with as many
            components as the weight has columns; of the number of columns that a unit owns; and of the config of the
            run, whose `seed` is another one in each layer. It gives one score per unit, shape `(units,)`.
            For whole layers, a function `(model, arch, batches)` of the model in eval mode, its description, and text
            of one domain. It gives one positive score per layer, shape `(layers,)`, fp64. Of several processes that
            share the samples each has its own batches: a mean over all text takes `system.processes.all_reduce_`.
            For whole experts, a function `(norms, gates, sums)` of the norms of what an expert gives for the tokens
            that chose it, of its weights for them, and of the sums of the weights of all experts that each of them
            chose, shape `(tokens,)` each. It gives one number per token, and the score is their mean.
        judges: What is scored: "unit" (inside the layers), "layer" or "expert" (both whole).
        paper: Where it is published.
        needs_gram: Whether `score` reads `moments.gram`; without it only mean and second moment are gathered.
        summed: Whether the score of an expert is the sum over its tokens, and not the mean.
        prior: A function `(model, arch, space)` of what the weights alone say of each component of the consumers'
            inputs, shape `(n,)` or None, which becomes `moments.prior`.
        whole_model_statistics: A function `(model, arch, data)` that runs the whole model before each round, and gives
            one tensor per consumer, by module, shape `(domains, n)`, fp64; the mean by the weights of the domains
            becomes `moments.prior`.
        check: A function `(config, arch, use)` that raises a StructPruneError, before any text is read, if the
            criterion cannot score this model; `use` is "prune", "dry run" or "trainer".
    """

    name: str
    score: Callable[..., Tensor]
    judges: str = "unit"
    paper: str = ""
    needs_gram: bool = False
    summed: bool = False
    prior: Callable[..., Tensor | None] | None = None
    whole_model_statistics: Callable[..., dict[str, Tensor]] | None = None
    check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        update_wrapper(self, self.score)

    def __call__(self, *arguments: Any) -> Tensor:
        """Give the scores, as the function that was decorated does."""
        return self.score(*arguments)


def best_units(scores: Tensor, width: int) -> tuple[int, ...]:
    """The units with the highest scores, ascending. `scores` has the shape `(units,)`."""
    return tuple(scores.topk(width).indices.sort().values.tolist())


def check_scores(scores: object, count: int, name: str, where: str) -> None:
    """Refuse what a criterion gave, unless it is one finite number for each unit."""
    if isinstance(scores, Tensor) and scores.shape == (count,) and bool(torch.isfinite(scores).all()):
        return
    shape = f", of the shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else ""
    raise StructPruneError(
        f"The criterion {name!r} has to give {count} finite scores, one per unit, at {where}, as a tensor without "
        f"NaN; it gives {scores!r:.60}{shape}."
    )
