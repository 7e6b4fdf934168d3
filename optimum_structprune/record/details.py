"""What a run saw while it pruned, in summary: counts and means, never whole tensors."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..arch.spec import kind_of
from ..config.fields import by_layer, read_json
from ..errors import StructPruneError, one_line
from ..plain_json import Record


DETAILS_NAME = "pruning_details.json"


# By layer and name of a space, the squared error of what its consumers give, without a refit and with one, relative to
# the output itself; empty where it is no number.
Errors = Mapping[tuple[int, str], tuple[float, ...]]


def errors_to_list(errors: Errors) -> list[list[Any]]:
    """Errors as JSON takes them: the layer, the name of the space, and both numbers."""
    return [[*key, list(error)] for key, error in errors.items()]


def errors_of_list(rows: Sequence[Sequence[Any]]) -> dict[tuple[int, str], tuple[float, ...]]:
    """Inverse of `errors_to_list`."""
    return {(int(layer), str(name)): tuple(map(float, error)) for layer, name, error in rows}


def relative_errors(errors: Sequence[float]) -> tuple[float, ...]:
    """The squared errors without and with a refit, relative to the energy behind them; empty if one is not finite."""
    removed, refitted, energy = errors
    return (removed / energy, refitted / energy) if energy > 0 and all(map(isfinite, errors)) else ()


@strict
@dataclass
class Details(Record):
    """What a run saw while it pruned: the `name` and `dtype` of the dense model and the `bytes` of the weights
    "before" and "after", the `Errors` by kind of space and layer of the dense model, the most bytes that this process
    had held when a stage ended, by kind of memory, and whether the run went on where another was stopped, so that its
    times are those of the rest.
    """

    model: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, dict[int, tuple[float, ...]]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    resumed: bool = False

    def take(self, errors: Errors) -> None:
        """Enter errors by layer and name of the space; of the experts of a layer the mean, if each has one."""
        of_kinds: dict[str, dict[int, list[tuple[float, ...]]]] = {}
        for (layer, name), error in sorted(errors.items()):
            of_kinds.setdefault(kind_of(name), {}).setdefault(layer, []).append(error)
        self.errors = {
            kind: {layer: tuple(map(fmean, zip(*of, strict=True))) for layer, of in of_layers.items() if all(of)}
            for kind, of_layers in of_kinds.items()
        }

    @classmethod
    def load(cls, path: str | Path) -> "Details":
        """Read what `save` wrote."""
        data = read_json(path)
        try:
            errors = {
                kind: {layer: tuple(error) for layer, error in by_layer(of_layers, kind).items()}
                for kind, of_layers in data["errors"].items()
            }
            return cls(**{**data, "errors": errors})
        except (ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
            raise StructPruneError(f"{path} is not the record of a pruning: {one_line(error)}") from error
