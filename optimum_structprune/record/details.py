"""What a run saw while it pruned, in summary: counts, means and correlations, never whole tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.spec import kind_of
from ..config.fields import read_mapping
from ..errors import StructPruneError
from ..plain_json import plain


DETAILS_NAME = "pruning_details.json"
VERSION = 1
# Scores are counted in so many bins on each side of the cut. On the axis `ratio` the whole range is log2(score / cut)
# from -6 to 6; on `deviation`, for scores that may be negative, it is (score - cut) / standard deviation from -4 to 4.
BINS = 24
RANGES = {"ratio": 6.0, "deviation": 4.0}
# Digits of a number in the file.
DIGITS = 6


@dataclass(frozen=True)
class Choice:
    """How the units of one space in one layer were chosen, in summary.

    Attributes:
        scored: The number of units that were scored.
        kept: The number of those that were kept.
        axis: The axis of the counts, see `RANGES`.
        kept_counts: The number of kept units in each of 2 · `BINS` bins; the outermost ones take all beyond.
        removed_counts: The same of the removed ones.
        agreement: The rank correlation (Spearman) of how much output each unit carries, for each pair of domains in
            the order (0, 1), (0, 2), …, (1, 2), …; empty where it is not known.
        error: The squared error of the consumers' output without a refit and with one, relative to the output itself;
            empty where no Gram matrix was gathered.
        spaces: The number of spaces that these numbers are of: more than one where a layer has experts.
    """

    scored: int
    kept: int
    axis: str
    kept_counts: tuple[int, ...]
    removed_counts: tuple[int, ...]
    agreement: tuple[float, ...] = ()
    error: tuple[float, ...] = ()
    spaces: int = 1

    def with_(self, other: Choice) -> Choice:
        """Both together: sums of units, means of all else. Counts on another axis are left out."""
        share = other.spaces / (self.spaces + other.spaces)
        counts: dict[str, Any] = {}
        if other.axis == self.axis:
            for name in ("kept_counts", "removed_counts"):
                pairs = zip(getattr(self, name), getattr(other, name), strict=True)
                counts[name] = tuple(map(sum, pairs))
        return replace(
            self,
            scored=self.scored + other.scored,
            kept=self.kept + other.kept,
            agreement=_between(self.agreement, other.agreement, share),
            error=_between(self.error, other.error, share),
            spaces=self.spaces + other.spaces,
            **counts,
        )

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON takes them."""
        rounded = {name: [_rounded(value) for value in getattr(self, name)] for name in ("agreement", "error")}
        return {**vars(self), **rounded}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """Inverse of `to_dict`, but for rounding."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)


Choices = Mapping[tuple[int, str], Choice]


def choices_to_list(choices: Choices) -> list[list[Any]]:
    """Choices as JSON takes them: the layer, the name of the space, and the values of each."""
    return [[layer, name, dict(vars(choice))] for (layer, name), choice in choices.items()]


def choices_of_list(rows: Sequence[Sequence[Any]]) -> dict[tuple[int, str], Choice]:
    """Inverse of `choices_to_list`."""
    return {(int(layer), str(name)): Choice.from_dict(values) for layer, name, values in rows}


def choice_of(
    scores: Tensor, kept: Tensor, carried: Tensor | None = None, errors: Sequence[float] | None = None
) -> Choice:
    """The summary of one choice. `scores` and `kept` have the shape `(units,)`, `carried` `(domains, units)`."""
    axis, places = _places(scores.double().cpu(), kept.cpu())
    counts = [places[which].bincount(minlength=2 * BINS).tolist() for which in (kept.cpu(), ~kept.cpu())]
    error: tuple[float, ...] = ()
    if errors is not None and errors[2] > 0 and all(map(isfinite, errors)):
        error = (errors[0] / errors[2], errors[1] / errors[2])
    agreement = () if carried is None else rank_correlations(carried)
    return Choice(len(scores), int(kept.sum()), axis, tuple(counts[0]), tuple(counts[1]), agreement, error)


def _places(scores: Tensor, kept: Tensor) -> tuple[str, Tensor]:
    """The axis of the scores, and the bin of each on it."""
    worst_kept, best_removed = float(scores[kept].min()), float(scores[~kept].max())
    if float(scores.min()) >= 0 and worst_kept > 0:
        axis, cut = "ratio", (worst_kept * best_removed) ** 0.5 if best_removed > 0 else worst_kept
        values = (scores / cut).log2()
    else:
        axis, cut = "deviation", (worst_kept + best_removed) / 2
        values = (scores - cut) / scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
    # The bins meet at the cut; scores that equal it lie on both sides of it.
    end = RANGES[axis]
    places = ((values.clamp(-end, end) / end + 1) * BINS).floor().long().clamp(0, 2 * BINS - 1)
    return axis, torch.where(kept, places.clamp(min=BINS), places.clamp(max=BINS - 1))


def rank_correlations(values: Tensor) -> tuple[float, ...]:
    """Spearman's rank correlation of each pair of rows, in the order (0, 1), (0, 2), …; empty where there is one row,
    or a row whose values are all alike.
    """
    if len(values) < 2 or bool((values == values[:, :1]).all(1).any()):
        return ()
    matrix = torch.corrcoef(torch.stack([_ranks(row) for row in values.double().cpu()]))
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1)
    return tuple(matrix[rows, columns].tolist())


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value; equal ones share the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].double()


@dataclass
class Details:
    """What a run saw while it pruned.

    Attributes:
        model: The dense model: its `name`, its `dtype`, and the `bytes` of the weights "before" and "after".
        domains: The names of the domains, in the order of `agreement`.
        choices: How units were chosen, by kind of space and layer of the dense model.
        sensitivity: The measured loss of the dense model, KL in nats per token by domain, by kind of space, layer and
            number of units removed there alone.
        memory: The most bytes that this process had held at a time when a stage ended, by stage and kind of memory.
        resumed: Whether the run went on where another was stopped, so that its times are those of the rest.
    """

    model: dict[str, Any] = field(default_factory=dict)
    domains: list[str] = field(default_factory=list)
    choices: dict[str, dict[int, Choice]] = field(default_factory=dict)
    sensitivity: dict[str, dict[int, dict[int, list[float]]]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    resumed: bool = False

    def take(self, choices: Choices) -> None:
        """Enter what was chosen, by layer and name of the space, the experts of a layer as one."""
        self.choices = {}
        for (layer, name), choice in sorted(choices.items()):
            of_kind = self.choices.setdefault(kind_of(name), {})
            of_kind[layer] = of_kind[layer].with_(choice) if layer in of_kind else choice

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        choices = {
            kind: {layer: choice.to_dict() for layer, choice in by_layer.items()}
            for kind, by_layer in self.choices.items()
        }
        losses = {
            kind: {
                layer: {units: list(map(_rounded, of_units)) for units, of_units in by_units.items()}
                for layer, by_units in by_layer.items()
            }
            for kind, by_layer in self.sensitivity.items()
        }
        return {"version": VERSION, **vars(self), "choices": choices, "sensitivity": losses}

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(plain(self.to_dict()), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Details:
        """Read what `save` wrote."""
        data = dict(read_mapping(Path(path), json.loads))
        if (version := data.pop("version", None)) != VERSION:
            raise StructPruneError(f"{path} has the version {version!r}, this package reads {VERSION}; update it.")
        try:
            choices = {
                kind: {int(layer): Choice.from_dict(choice) for layer, choice in by_layer.items()}
                for kind, by_layer in data["choices"].items()
            }
            losses = {
                kind: {
                    int(layer): {int(units): list(of_units) for units, of_units in by_units.items()}
                    for layer, by_units in by_layer.items()
                }
                for kind, by_layer in data["sensitivity"].items()
            }
            details = cls(**{**data, "choices": choices, "sensitivity": losses})
            for name, value in vars(cls()).items():
                if type(found := getattr(details, name)) is not type(value):
                    raise TypeError(f"{name} takes {type(value).__name__}, found {type(found).__name__}")
            return details
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StructPruneError(f"{path} is not the record of a pruning: {error!r}.") from error


def _between(mine: Sequence[float], theirs: Sequence[float], share: float) -> tuple[float, ...]:
    """Weighted means; empty where either side knows nothing."""
    if not (mine and theirs):
        return ()
    return tuple(a + share * (b - a) for a, b in zip(mine, theirs, strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
