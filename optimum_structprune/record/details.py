"""What a run saw while it pruned, in summary: counts and means, never whole tensors."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..arch.spec import kind_of
from ..config.fields import read_mapping
from ..errors import StructPruneError, one_line
from ..plain_json import Record, unversioned


DETAILS_NAME = "pruning_details.json"


@strict  # it checks no fields of a frozen class
@dataclass
class Choice:
    """How the units of one space in one layer, or of its experts, were chosen: the numbers of those that were scored
    and kept; and `error`, the squared error of the consumers' output without a refit and with one, relative to the
    output itself, empty where it is not known.
    """

    scored: int
    kept: int
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
    """Choices as one: units are summed, errors are averaged, and empty where one of them has none."""
    errors = [choice.error for choice in choices]
    error = tuple(map(fmean, zip(*errors, strict=True))) if all(errors) else ()
    return Choice(sum(choice.scored for choice in choices), sum(choice.kept for choice in choices), error)


def choices_to_list(choices: Choices) -> list[list[Any]]:
    """Choices as JSON takes them: the layer, the name of the space, and the values of each."""
    return [[layer, name, asdict(choice)] for (layer, name), choice in choices.items()]


def choices_of_list(rows: Sequence[Sequence[Any]]) -> dict[tuple[int, str], Choice]:
    """Inverse of `choices_to_list`."""
    return {(int(layer), str(name)): Choice.from_dict(values) for layer, name, values in rows}


def relative_errors(errors: Sequence[float]) -> tuple[float, ...]:
    """The squared errors without and with a refit, relative to the energy behind them; empty if one is not finite."""
    removed, refitted, energy = errors
    return (removed / energy, refitted / energy) if energy > 0 and all(map(isfinite, errors)) else ()


@strict
@dataclass
class Details(Record):
    """What a run saw while it pruned: the `name` and `dtype` of the dense model and the `bytes` of the weights
    "before" and "after", how units were chosen by kind of space and layer of
    the dense model, the most bytes that this process had held when a stage ended, by kind of memory, and whether the
    run went on where another was stopped, so that its times are those of the rest.
    """

    model: dict[str, Any] = field(default_factory=dict)
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
