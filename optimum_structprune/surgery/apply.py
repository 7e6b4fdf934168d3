"""Puts a plan onto the dense model that it was made for."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from transformers import PreTrainedModel

from ..arch.load import describe
from ..arch.plain import check_no_adapter, dequantized
from ..arch.shrink import legal_sizes
from ..arch.spec import EXPERT, HIDDEN, LAYER, MODEL, ArchSpec, Space
from ..errors import StructPruneError
from .cut import drop_layers_, shrink_
from .plan import Plan
from .residual import narrow_


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
    experts, units = _inside(plan)
    _shrink_(smaller, experts, arch_file)
    if (channels := plan.keep.get((MODEL, HIDDEN))) is not None:
        narrow_(smaller, describe(smaller, arch_file), channels, {})
    _shrink_(smaller, units, arch_file)
    return smaller


def _inside(plan: Plan) -> tuple[Plan, Plan]:
    """What a plan removes inside the layers: experts, and the units that are left when those have gone. Layers and
    experts are numbered as in the model that is left by then.
    """
    keep: tuple[dict[tuple[int, str], tuple[int, ...]], dict[tuple[int, str], tuple[int, ...]]] = ({}, {})
    layers = plan.keep.get((MODEL, LAYER))
    for (layer, name), units in plan.keep.items():
        if layer == MODEL or (layers is not None and layer not in layers):
            continue
        place = layer if layers is None else layers.index(layer)
        kind, _, label = name.partition("/")
        experts = plan.keep.get((layer, EXPERT))
        if experts is not None and label.isdigit():
            if int(label) not in experts:
                continue
            name = f"{kind}/{experts.index(int(label))}"
        keep[kind != EXPERT][place, name] = units
    experts_kept, units_kept = keep
    return Plan(plan.model_type, experts_kept), Plan(plan.model_type, units_kept)


def _shrink_(model: PreTrainedModel, plan: Plan, arch_file: str | None) -> None:
    if plan.keep:
        arch = describe(model, arch_file)
        shrink_(model, arch, plan, _widths(arch, plan))


def _widths(arch: ArchSpec, plan: Plan) -> dict[str, dict[int, int]]:
    """The widths that a plan leaves, by kind of space and layer, in the units of the config."""
    widths: dict[str, dict[int, int]] = {}
    for space in arch.spaces:
        if (keep := plan.keep.get((space.layer, space.name))) is not None:
            widths.setdefault(space.kind, {})[space.layer] = len(keep) // space.scale
    return widths


def _check_widths(model: PreTrainedModel, arch: ArchSpec, plan: Plan) -> None:
    """Refuse widths that the config of the smaller model could not say, or that it could not run with."""
    for kind in arch.offered:
        widths: dict[int, set[float]] = {}
        for space in _left(arch, kind, plan):
            kept = plan.keep.get((space.layer, space.name), range(space.size))
            widths.setdefault(space.layer, set()).add(len(kept) / space.scale)
        legal = set(arch.widths(kind).values())
        if set().union(*widths.values()) - legal:
            legal.update(legal_sizes(model.config, arch, kind))
        for layer, of_layer in widths.items():
            where = "" if layer == MODEL else f" in layer {layer}"
            for width in of_layer - legal:
                nearest = min(legal, key=lambda size: abs(size - width))  # noqa: B023  # called at once
                raise StructPruneError(
                    f"The plan keeps {width:g} of {kind!r}{where}, and the nearest legal width is {nearest}."
                )
            if len(of_layer) > 1:
                raise StructPruneError(
                    f"The plan keeps {min(of_layer):g} and {max(of_layer):g} units of {kind!r}{where}, which share "
                    "their width."
                )
        every = set().union(*widths.values())
        reason = arch.uniform or arch.of(kind)[0].uniform
        if reason and len(every) > 1:
            raise StructPruneError(
                f"The plan keeps {min(every):g} units of {kind!r} in one layer and {max(every):g} in another; a plain "
                f"{arch.model_type} config takes one width for all: {reason}."
            )


def _left(arch: ArchSpec, kind: str, plan: Plan) -> Iterator[Space]:
    """The spaces of a kind that are still there after whole layers and experts have gone."""
    layers = plan.keep.get((MODEL, LAYER))
    for space in arch.of(kind):
        experts, label = plan.keep.get((space.layer, EXPERT)), space.name.partition("/")[2]
        if layers is not None and space.layer not in (MODEL, *layers):
            continue
        if experts is None or not label.isdigit() or int(label) in experts:
            yield space
