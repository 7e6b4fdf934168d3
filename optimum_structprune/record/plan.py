"""The plan: which units of the dense model are kept, as a value that changes no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arch.spec import EXPERT, LAYER, MODEL, ArchSpec, kind_of
from ..config.fields import by_layer, read_json
from ..errors import StructPruneError
from ..system.fingerprint import fingerprint
from ..written import replace_text, versioned


PLAN_NAME = "pruning_plan.json"


@dataclass(frozen=True)
class Plan:
    """The kept units by layer and space, as ascending indices into the dense model.

    Attributes:
        model_type: The model type that the plan is for.
        keep: The kept units as `{(layer, space): indices}`, with `MODEL` (-1) in the place of a layer where a space
            belongs to the whole model; spaces that are not named keep their full width.
        sizes: The dense model's greatest width in each kind of space.
        dense: The `fingerprint` of the dense model; empty, and no sizes, where a plan was made by hand.
    """

    model_type: str
    keep: Mapping[tuple[int, str], tuple[int, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dense: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel, arch: ArchSpec) -> Plan:
        """The plan that keeps all of a dense model."""
        sizes = {kind: max(arch.widths(kind).values()) for kind in arch.offered}
        return cls(arch.model_type, {}, sizes, fingerprint(model))

    def widths(self) -> dict[str, dict[int, int]]:
        """The number of kept units, by kind of space and layer: the width in the config."""
        widths: dict[str, dict[int, int]] = {}
        for (layer, name), keep in sorted(self.keep.items()):
            by_layer = widths.setdefault(kind_of(name), {})
            by_layer[layer] = min(by_layer.get(layer, len(keep)), len(keep))
        return widths

    def then(self, later: Plan) -> Plan:
        """This plan and a later one for the smaller model, as one plan for the dense model.

        Where this plan removes whole layers or whole experts, the later one numbers those that remain.

        Args:
            later: The plan for the model that this plan leaves.

        Raises:
            StructPruneError: If the later one keeps units that this plan has removed.
        """
        keep = dict(self.keep)
        try:
            for (layer, name), units in later.keep.items():
                key = self._dense_key(layer, name)
                keep[key] = tuple(keep[key][unit] for unit in units) if key in keep else units
        except IndexError:
            raise StructPruneError(
                f"The later plan keeps units of {name!r} that this plan has removed; it is for another model, such as "
                "the dense one, than this plan leaves."
            ) from None
        layers = keep.get((MODEL, LAYER))
        removed = {key for key in keep if layers is not None and key[0] not in (MODEL, *layers)}
        return replace(self, keep={key: units for key, units in keep.items() if key not in removed})

    def _dense_key(self, layer: int, name: str) -> tuple[int, str]:
        """The key in the dense model of a space of the model that this plan leaves."""
        layers = self.keep.get((MODEL, LAYER))
        if layers is not None and layer != MODEL:
            layer = layers[layer]
        experts = self.keep.get((layer, EXPERT))
        kind, _, label = name.partition("/")
        if experts is not None and label.isdigit():
            name = f"{kind}/{experts[int(label)]}"
        return layer, name

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON; `from_dict` reads them."""
        keep: dict[str, dict[str, list[int]]] = {}
        for (layer, name), units in sorted(self.keep.items()):
            keep.setdefault(name, {})[str(layer)] = list(units)
        return {"model_type": self.model_type, "sizes": dict(self.sizes), "dense": self.dense, "keep": keep}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            StructPruneError: If it is no plan.
        """
        try:
            keep = {
                (layer, str(name)): tuple(units)
                for name, of_layers in data["keep"].items()
                for layer, units in by_layer(of_layers, repr(name)).items()
            }
            return cls(data["model_type"], keep, dict(data["sizes"]), data["dense"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StructPruneError(f"This is not a pruning plan: {error!r}.") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, in one step."""
        replace_text(Path(path), json.dumps(versioned(self.to_dict())) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            StructPruneError: If the file cannot be read or is not a plan.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except StructPruneError as error:
            raise StructPruneError(f"{path} is not a pruning plan: {error.__cause__!r}") from error
