"""The plan: which units are kept. A value; nothing has changed yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arch.spec import EXPERT, LAYER, MODEL, ArchSpec
from ..errors import StructPruneError


def best_units(scores: Tensor, width: int) -> tuple[int, ...]:
    """The units with the highest scores, ascending.

    Args:
        scores: One score per unit, shape `(units,)`, higher = keep.
        width: The number of units to keep.
    """
    return tuple(scores.topk(width).indices.sort().values.tolist())


@dataclass(frozen=True)
class Plan:
    """Kept units by layer and space, as ascending indices into the dense model.

    Attributes:
        model_type: What the plan is for.
        keep: `{(layer, space): kept indices}`, with `MODEL` (-1) in the place of a layer where a space belongs to
            the whole model; spaces that are not named stay whole.
    """

    model_type: str
    keep: Mapping[tuple[int, str], tuple[int, ...]]

    def check(self, arch: ArchSpec) -> None:
        """Hold the plan against a model.

        Raises:
            StructPruneError: If it is for another model type, names a space the model does not have, or keeps units
                that are not there.
        """
        if self.model_type != arch.model_type:
            raise StructPruneError(
                f"The plan is for a {self.model_type!r} model, this is a {arch.model_type!r} model."
            )
        sizes = {(space.layer, space.name): space.size for space in (*arch.model_spaces, *arch.spaces)}
        for (layer, name), keep in self.keep.items():
            if (layer, name) not in sizes:
                raise StructPruneError(f"The plan names {name!r} in layer {layer}, which this model does not have.")
            size = sizes[layer, name]
            if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= size:
                raise StructPruneError(
                    f"The plan for {name!r} in layer {layer} has to keep ascending units between 0 and {size - 1}."
                )

    def widths(self) -> dict[str, dict[int, int]]:
        """Number of kept units, by kind of space and layer: the width in the config."""
        widths: dict[str, dict[int, int]] = {}
        for (layer, name), keep in sorted(self.keep.items()):
            at = widths.setdefault(name.partition("/")[0], {})
            at[layer] = min(at.get(layer, len(keep)), len(keep))
        return widths

    def then(self, later: Plan) -> Plan:
        """This plan and a later one for the smaller model, as one plan for the dense model.

        Where this one removes whole layers or whole experts, the later one numbers those that are left.
        """
        keep = dict(self.keep)
        layers = self.keep.get((MODEL, LAYER), ())
        for (place, name), units in later.keep.items():
            layer = layers[place] if layers and place != MODEL else place
            kind, _, label = name.partition("/")
            left = self.keep.get((layer, EXPERT), ())
            at = (layer, f"{kind}/{left[int(label)]}" if left and label.isdigit() else name)
            keep[at] = tuple(keep[at][unit] for unit in units) if at in keep else units
        stay = keep.get((MODEL, LAYER))
        return Plan(self.model_type, {at: keep[at] for at in keep if stay is None or at[0] in (MODEL, *stay)})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it."""
        keep: dict[str, dict[str, list[int]]] = {}
        for (layer, name), units in sorted(self.keep.items()):
            keep.setdefault(name, {})[str(layer)] = list(units)
        return {"model_type": self.model_type, "keep": keep}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`."""
        keep = {(int(layer), name): tuple(units) for name, at in data["keep"].items() for layer, units in at.items()}
        return cls(model_type=data["model_type"], keep=keep)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            StructPruneError: If the file is not a plan.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StructPruneError(f"{path} is not a pruning plan: {error}") from error
