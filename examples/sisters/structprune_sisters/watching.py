"""Runs a whole model on the samples, and watches what its consumers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_structprune import StructPruneError
from optimum_structprune.arch.hooks import observe
from optimum_structprune.arch.spec import ArchSpec
from optimum_structprune.method.layers import Batch, run_model
from optimum_structprune.sources.data import CalibrationData


def of_samples(watch: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A function of a model, its description and batches as `Criterion.whole_model_statistics` takes it."""

    @wraps(watch)
    def statistics(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData) -> dict[str, Tensor]:
        return watch(model, arch, data.own_batches)

    return statistics


def check_dense(arch: ArchSpec) -> None:
    """Refuse models with experts, whose consumers do not see all tokens."""
    if any(space.experts for space in arch.spaces):
        raise StructPruneError(
            f"This criterion watches consumers that read every token, and {arch.model_type!r} has experts; choose "
            "criterion='obs' or 'wanda'."
        )


@torch.no_grad()
def run_watched(
    model: PreTrainedModel,
    names: Iterable[str],
    batches: Sequence[Batch],
    see: Callable[[Batch, str, Tensor], None],
) -> None:
    present = batches[0]
    with observe(model, names, lambda name, x: see(present, name, x.detach())):
        for present in batches:
            run_model(model, present.ids)
