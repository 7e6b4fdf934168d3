"""Run a whole model on the samples, and observe the inputs of its modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial, wraps

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_structprune import StructPruneError
from optimum_structprune.arch.hooks import observe
from optimum_structprune.arch.spec import ArchSpec, Axis
from optimum_structprune.method.layers import Batch, run_model
from optimum_structprune.steps.data import CalibrationData


def of_samples(watch: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Turn a function of a model, its description and batches into a `Criterion.whole_model_statistics`."""

    @wraps(watch)
    def statistics(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData) -> dict[str, Tensor]:
        return watch(model, arch, data.own_batches)

    return statistics


def check_dense(arch: ArchSpec) -> None:
    """Refuse models with experts, whose consumers do not read all tokens."""
    if any(space.experts for space in arch.spaces):
        raise StructPruneError(
            f"This criterion watches consumers that read every token, and {arch.model_type!r} has experts; choose "
            "criterion='obs' or 'wanda'."
        )


def consumers_of(arch: ArchSpec) -> list[Axis]:
    """Return the consumers of all spaces."""
    consumers: list[Axis] = []
    for space in arch.spaces:
        consumers.extend(space.consumers)
    return consumers


@torch.no_grad()
def run_watched(
    model: PreTrainedModel,
    names: Collection[str],
    batches: Sequence[Batch],
    see: Callable[[Batch, str, Tensor], None],
) -> None:
    """Run a model on batches, and call `see(batch, name, input)` before each call of the named modules."""
    for batch in batches:
        with observe(model, names, partial(see, batch)):
            run_model(model, batch.ids)
