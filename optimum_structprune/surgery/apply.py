"""Puts a plan onto the dense model that it was made for."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from ..arch.load import describe
from ..arch.plain import check_no_adapter, dequantized
from ..arch.shrink import legal_sizes
from ..arch.spec import EXPERT, HIDDEN, LAYER, MODEL, ArchSpec, Space
from ..errors import StructPruneError
from .cut import drop_layers_, shrink_
from .plan import Plan
from .residual import narrow_


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_plan(model: PreTrainedModel, plan: Plan, arch_file: str | None = None) -> PreTrainedModel:
    """Remove from a dense model what a plan removes, without any text.

    Nothing is refitted: the kept weights are those of the dense model, so the result computes what the dense model
    computes where the removed units are masked. It equals the result of a pruning with `refit="none"`; after one with
    another refit, the saved model is the better one.

    Args:
        model: The dense model, of which the plan numbers the layers and units; it is left as it is. A quantized model
            is unpacked, where transformers can.
        plan: The kept units, from `pruner.plan` or `Plan.load`.
        arch_file: A YAML file that describes architectures of your own, in the form of `families.yaml`.

    Returns:
        A smaller model of the same class.

    Raises:
        StructPruneError: If the plan is for another model, keeps units that are not there, or leaves widths that this
            model cannot have.
    """
    check_no_adapter(model)
    plain = dequantized(model, inplace=False)
    smaller = deepcopy(model) if plain is model else plain
    arch = describe(smaller, arch_file)
    plan.check(arch)
    _check_widths(smaller, arch, plan)
    if (layers := plan.keep.get((MODEL, LAYER))) is not None:
        drop_layers_(smaller, arch, layers)
    # Experts go before channels of the residual stream, and these before units, as in pruning.
    for part in (plan.of_experts(), None, plan.of_units()):
        arch = describe(smaller, arch_file)
        if part is None:
            if (channels := plan.keep.get((MODEL, HIDDEN))) is not None:
                narrow_(smaller, arch, channels, {})
        elif part.keep:
            shrink_(smaller, arch, part, _widths(arch, part))
    return smaller


def _widths(arch: ArchSpec, plan: Plan) -> dict[str, dict[int, int]]:
    """The widths that a plan leaves, by kind of space and layer, in the units of the config."""
    widths: dict[str, dict[int, int]] = {}
    for space in arch.spaces:
        if (keep := plan.keep.get((space.layer, space.name))) is not None:
            widths.setdefault(space.kind, {})[space.layer] = len(keep) // space.scale
    return widths


def _check_widths(model: PreTrainedModel, arch: ArchSpec, plan: Plan) -> None:
    """Refuse widths that the config of the smaller model could not say, or that it could not run with."""
    layers = plan.keep.get((MODEL, LAYER), range(arch.num_layers))
    for kind in arch.offered:
        spaces = [space for space in arch.of(kind) if space.layer in (MODEL, *layers)]
        widths = {(space.layer, space.name): len(_kept(space, plan)) / space.scale for space in spaces}
        legal = {space.width for space in spaces}
        if set(widths.values()) - legal:
            legal.update(legal_sizes(model.config, arch, kind))
        for (layer, _), width in widths.items():
            if width not in legal:
                nearest = min(legal, key=lambda size: abs(size - width))
                raise StructPruneError(
                    f"The plan keeps {width:g} of {kind!r}{_where(layer)}, and the nearest legal width is {nearest}."
                )
        _check_alike(arch, kind, spaces, plan)


def _check_alike(arch: ArchSpec, kind: str, spaces: list[Space], plan: Plan) -> None:
    """Refuse spaces of a layer, or layers, that differ in width and must not."""
    by_layer: dict[int, set[int]] = {}
    for space in spaces:
        # The experts that go need no width.
        experts = plan.keep.get((space.layer, EXPERT))
        label = space.name.partition("/")[2]
        if experts is None or not label.isdigit() or int(label) in experts:
            by_layer.setdefault(space.layer, set()).add(len(_kept(space, plan)) // space.scale)
    for layer, widths in by_layer.items():
        if len(widths) > 1:
            raise StructPruneError(
                f"The plan keeps {min(widths)} and {max(widths)} units of {kind!r}{_where(layer)}, which share their "
                "width."
            )
    reason = spaces and (arch.uniform or spaces[0].uniform)
    if reason and len(every := set().union(*by_layer.values())) > 1:
        raise StructPruneError(
            f"The plan keeps {min(every)} units of {kind!r} in one layer and {max(every)} in another; a plain "
            f"{arch.model_type} config takes one width for all: {reason}."
        )


def _kept(space: Space, plan: Plan) -> tuple[int, ...] | range:
    return plan.keep.get((space.layer, space.name), range(space.size))


def _where(layer: int) -> str:
    return "" if layer == MODEL else f" in layer {layer}"
