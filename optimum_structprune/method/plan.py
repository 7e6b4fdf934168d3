"""The plan of a pruning: the kept units of the original model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arch.spec import EXPERT, LAYER, MODEL, ArchSpec, kind_of
from ..config.fields import read_json
from ..system.codec import by_layer
from ..system.errors import StructPruneError
from ..system.fingerprint import fingerprint
from ..system.written import replace_text, versioned


PLAN_NAME = "pruning_plan.json"


@dataclass(frozen=True)
class Plan:
    """The kept units by layer and space, as ascending indices into the original model.

    Attributes:
        model_type: The model type that the plan is for.
        keep: The kept units as `{(layer, space): indices}`. For a space of the whole model, the layer is `MODEL` (-1).
            All other spaces keep their full width.
        sizes: The original model's greatest width in each kind of space; empty for a plan that was made by hand.
        original: The `fingerprint` of the original model; empty for a plan that was made by hand.
    """

    model_type: str
    keep: Mapping[tuple[int, str], tuple[int, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    original: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel, arch: ArchSpec) -> Plan:
        """Return the plan that keeps all units of an original model."""
        sizes = {kind: max(arch.widths(kind).values()) for kind in arch.offered}
        return cls(arch.model_type, {}, sizes, fingerprint(model))

    def widths(self) -> dict[str, dict[int, int]]:
        """Return the number of kept units by kind of space and layer, which is the width in the config."""
        widths: dict[str, dict[int, int]] = {}

        for (layer, name), units in sorted(self.keep.items()):
            widths_of_kind = widths.setdefault(kind_of(name), {})
            widths_of_kind[layer] = min(widths_of_kind.get(layer, len(units)), len(units))

        return widths

    def then(self, later: Plan) -> Plan:
        """Combine this plan and a later one for the smaller model into one plan for the original model.

        If this plan removes whole layers or whole experts, the later plan numbers the remaining ones from 0.

        Args:
            later: The plan for the model that this plan results in.

        Raises:
            StructPruneError: If the later plan keeps units that this plan removes.
        """
        keep = dict(self.keep)

        for (layer, name), units in later.keep.items():
            try:
                key = self._original_key(layer, name)
                if key in keep:
                    units = tuple(keep[key][unit] for unit in units)
            except IndexError:
                raise StructPruneError(
                    f"The later plan keeps units of {name!r} that this plan has removed. It is for another model, "
                    "such as the original one, than this plan leaves."
                ) from None
            keep[key] = units

        kept_layers = keep.get((MODEL, LAYER))
        if kept_layers is not None:
            keep = {key: units for key, units in keep.items() if key[0] == MODEL or key[0] in kept_layers}
        return replace(self, keep=keep)

    def _original_key(self, layer: int, name: str) -> tuple[int, str]:
        """Return the layer and the name of a space in the original model.

        Args:
            layer: The layer of the space in the model that this plan results in.
            name: The name of the space there.
        """
        kept_layers = self.keep.get((MODEL, LAYER))
        if kept_layers is not None and layer != MODEL:
            layer = kept_layers[layer]

        kept_experts = self.keep.get((layer, EXPERT))
        kind, _, label = name.partition("/")
        if kept_experts is not None and label.isdigit():
            name = f"{kind}/{kept_experts[int(label)]}"
        return layer, name

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON; `from_dict` reads them."""
        keep: dict[str, dict[str, list[int]]] = {}
        for (layer, name), units in sorted(self.keep.items()):
            keep.setdefault(name, {})[str(layer)] = list(units)

        # Saved plans call the original model "dense".
        return {"model_type": self.model_type, "sizes": dict(self.sizes), "dense": self.original, "keep": keep}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan with these plain values.

        Args:
            data: The output of `to_dict`.

        Raises:
            StructPruneError: If the values do not describe a plan.
        """
        keep: dict[tuple[int, str], tuple[int, ...]] = {}
        try:
            for name, units_by_layer in data["keep"].items():
                for layer, units in by_layer(units_by_layer, repr(name)).items():
                    keep[layer, str(name)] = tuple(units)
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
