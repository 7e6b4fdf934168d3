"""What a run saw while it pruned, in summary: counts, means and correlations, never whole tensors."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..arch.spec import kind_of
from ..config.fields import read_mapping
from ..errors import StructPruneError, one_line
from ..plain_json import Record, unversioned


DETAILS_NAME = "pruning_details.json"


@strict  # it checks no fields of a frozen class
@dataclass
class Choice:
    """How the units of one space in one layer, or of its experts, were chosen: the numbers of those that were scored
    and kept; `agreement`, the rank correlation (Spearman) of how much output each unit carries between domains (0, 1),
    (0, 2), …, (1, 2), …; and `error`, the squared error of the consumers' output without a refit and with one,
    relative to the output itself; both empty where they are not known.
    """

    scored: int
    kept: int
    agreement: tuple[float, ...] = ()
    error: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Choice":
        """A choice from its fields as JSON gives them."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)


Choices = Mapping[tuple[int, str], Choice]


def merged(choices: Sequence[Choice]) -> Choice:
    """Choices as one: units are summed, all else is averaged, and empty where one of them has none."""
    means = []
    for name in ("agreement", "error"):
        values = [getattr(choice, name) for choice in choices]
        means.append(tuple(map(fmean, zip(*values, strict=True))) if all(values) else ())
    return Choice(sum(choice.scored for choice in choices), sum(choice.kept for choice in choices), *means)


def choices_to_list(choices: Choices) -> list[list[Any]]:
    """Choices as JSON takes them: the layer, the name of the space, and the values of each."""
    return [[layer, name, asdict(choice)] for (layer, name), choice in choices.items()]


def choices_of_list(rows: Sequence[Sequence[Any]]) -> dict[tuple[int, str], Choice]:
    """Inverse of `choices_to_list`."""
    return {(int(layer), str(name)): Choice.from_dict(values) for layer, name, values in rows}


def choice_of(kept: Tensor, carried: Tensor | None = None) -> Choice:
    """The summary of one choice. `kept` has the shape `(units,)`, `carried` `(domains, units)`."""
    agreement = () if carried is None else rank_correlations(carried)
    return Choice(len(kept), int(kept.sum()), agreement)


def relative_errors(errors: Sequence[float]) -> tuple[float, ...]:
    """The squared errors without and with a refit, relative to the energy behind them; empty if one is not finite."""
    removed, refitted, energy = errors
    return (removed / energy, refitted / energy) if energy > 0 and all(map(isfinite, errors)) else ()


def rank_correlations(values: Tensor) -> tuple[float, ...]:
    """Spearman's rank correlation of each pair of rows, (0, 1), (0, 2), …; empty for one row, or one of equals."""
    from scipy.stats import spearmanr  # takes a second, and only what prunes needs it

    if len(values) < 2 or bool((values == values[:, :1]).all(1).any()):
        return ()
    matrix = spearmanr(values.double().cpu().numpy(), axis=1).statistic
    if len(values) == 2:
        return (float(matrix),)
    rows, columns = torch.triu_indices(len(values), len(values), 1).numpy()
    return tuple(map(float, matrix[rows, columns]))


@strict
@dataclass
class Details(Record):
    """What a run saw while it pruned: the `name` and `dtype` of the dense model and the `bytes` of the weights
    "before" and "after", the domains in the order of `agreement`, how units were chosen by kind of space and layer of
    the dense model, the most bytes that this process had held when a stage ended, by kind of memory, and whether the
    run went on where another was stopped, so that its times are those of the rest.
    """

    model: dict[str, Any] = field(default_factory=dict)
    domains: list[str] = field(default_factory=list)
    choices: dict[str, dict[int, Choice]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    resumed: bool = False

    def take(self, choices: Choices) -> None:
        """Enter what was chosen, by layer and name of the space, the experts of a layer as one."""
        of_kinds: dict[str, dict[int, list[Choice]]] = {}
        for (layer, name), choice in sorted(choices.items(), key=lambda pair: pair[0]):
            of_kinds.setdefault(kind_of(name), {}).setdefault(layer, []).append(choice)
        self.choices = {
            kind: {layer: merged(of_layer) for layer, of_layer in by_layer.items()}
            for kind, by_layer in of_kinds.items()
        }

    @classmethod
    def load(cls, path: str | Path) -> "Details":
        """Read what `save` wrote."""
        data = unversioned(read_mapping(Path(path), json.loads))
        try:
            choices = {
                kind: {int(layer): Choice.from_dict(choice) for layer, choice in by_layer.items()}
                for kind, by_layer in data["choices"].items()
            }
            return cls(**{**data, "choices": choices})
        except (ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
            raise StructPruneError(f"{path} is not the record of a pruning: {one_line(error)}") from error
