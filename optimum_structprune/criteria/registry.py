"""Register criteria, and look up the criterion of each kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..arch.spec import EXPERT, LAYER
from ..config.pruning import StructPruneConfig
from ..method.loop import Criterion
from ..system.errors import StructPruneError
from ..system.registry import Registry, did_you_mean


CRITERIA: Registry[Criterion] = Registry("criterion", "optimum_structprune.criteria")
# The criteria of whole layers and whole experts, if the config names a criterion for other units.
DEFAULT_CRITERIA = {LAYER: "block_influence", EXPERT: "reap"}
# The damping of the refit is a constant of the config and not one of its fields.
DAMPING = "damping"


def register_criterion(name: str, **attributes: Any) -> Callable[[Callable[..., Tensor]], Criterion]:
    """Return a decorator that makes a `Criterion` of a score function and registers it.

    Args:
        name: The name for `StructPruneConfig.criterion`.
        attributes: The other fields of the `Criterion`, such as `needs_gram=True` or `parameters=("damping",)`.

    Raises:
        StructPruneError: If the name is empty or already registered, or if a parameter is not a field of
            `StructPruneConfig`.
    """

    def register(score: Callable[..., Tensor]) -> Criterion:
        criterion = Criterion(name, score, **attributes)
        _check_parameters(criterion)
        return CRITERIA.register(name)(criterion)

    return register


def _check_parameters(criterion: Criterion) -> None:
    """Raise if a criterion declares parameters that it cannot get."""
    if criterion.parameters and criterion.judges in DEFAULT_CRITERIA:
        raise StructPruneError(
            f"The criterion {criterion.name!r} judges whole {criterion.judges}s and cannot have `parameters`. "
            "Declare them for criteria that judge units."
        )

    field_names = {field.name for field in fields(StructPruneConfig)}
    field_names.add(DAMPING)
    for parameter in criterion.parameters:
        if parameter not in field_names:
            raise StructPruneError(
                f"The criterion {criterion.name!r} declares the parameter {parameter!r}, which is not a field of "
                f"StructPruneConfig.{did_you_mean(parameter, field_names)}"
            )


def parameters_of(criterion: Criterion, config: StructPruneConfig, layer: int) -> dict[str, Any]:
    """Return the keyword arguments that a criterion gets in a layer.

    The seed differs in each layer. So a run that resumes at a later layer draws the same numbers there as an
    uninterrupted run.
    """
    parameters = {name: getattr(config, name) for name in criterion.parameters}
    if "seed" in parameters:
        parameters["seed"] = (config.seed + layer) % 2**32
    return parameters


def reads_gram(config: StructPruneConfig) -> bool:
    """Return whether scores or refits need Gram matrices."""
    return config.refit != "none" or CRITERIA.get(config.scored_by).needs_gram


def criterion_of(name: str, judged: str) -> Criterion:
    """Return the criterion `name` if it scores units of the kind `judged`, or else the default criterion.

    Args:
        name: The name in the config.
        judged: The kind of unit, `LAYER` or `EXPERT`.
    """
    criterion = CRITERIA.get(name)
    if criterion.judges == judged:
        return criterion
    return CRITERIA.get(DEFAULT_CRITERIA[judged])


def per_unit(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Return the sum over the columns of each unit, `(units * columns_per_unit,)` to `(units,)`."""
    return columns.reshape(-1, columns_per_unit).sum(1)
