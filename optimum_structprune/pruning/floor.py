"""Widths between two others, for a search that halves what is in question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..widths.schedule import next_legal


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def whole_widths(arch: ArchSpec, like: Widths) -> Widths:
    """The present widths of the spaces in `like`, in its form: one number, or one per layer."""
    sizes = {name: arch.widths(name) for name in like}
    return {
        name: max(sizes[name].values()) if isinstance(width, int) else {at: sizes[name][at] for at in width}
        for name, width in like.items()
    }


def halfway(
    config: StructPruneConfig, model_config: PretrainedConfig, arch: ArchSpec, high: Widths, low: Widths
) -> Widths:
    """The legal widths halfway between two; those of `high` wherever there are none in between.

    Args:
        config: Channels come in multiples of its `round_to`.
        model_config: That of the model.
        arch: The model.
        high: Legal widths.
        low: Others, nowhere above them and in the same form.
    """
    found: dict[str, int | Mapping[int, int]] = {}
    for name, least in low.items():
        multiple = config.round_to if arch.of(name)[0].rounds else 1
        most = high[name]
        if isinstance(least, int) and isinstance(most, int):
            found[name] = between(most, least, multiple)
        elif isinstance(least, Mapping) and isinstance(most, Mapping):
            found[name] = {at: between(most[at], width, multiple) for at, width in least.items()}
    return next_legal(model_config, arch, found)


def between(high: int, low: int, multiple: int) -> int:
    """The multiple halfway between two widths; `high` where there is none in between."""
    middle = -(-(high + low) // (2 * multiple)) * multiple
    middle -= multiple if middle >= high else 0
    return middle if low < middle else high
