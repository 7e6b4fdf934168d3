"""From what a whole model may have at most to the largest widths that keep to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import MODEL, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from .allocation import choices, least_widths, legal_widths, target_widths


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def widths_of(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    scores: Mapping[tuple[int, str], Tensor] | None = None,
    itemsize: int | None = None,
) -> dict[str, int | Mapping[int, int]]:
    """The final widths, in whichever way a config says how much is removed; see `target_widths`.

    With `budget` they are the largest that keep to it: one unit more would exceed it, where `round_to` is 1 (with
    other allocations than `uniform`, to within the cheapest step of one layer).

    Args:
        config: How much to remove, and how it is spread.
        arch: The model.
        model: The dense model; shapes are enough, so it may be on the meta device.
        scores: Of all units, where layers get widths of their own.
        itemsize: Bytes per parameter; those of the model's dtype by default.

    Raises:
        StructPruneError: If widths are not legal, or the budget cannot be met, or is met already.
    """
    if config.budget is None:
        return target_widths(config, arch, model.config, scores)
    ((name, most),) = config.budget.items()
    legal = legal_widths(config, arch, model.config)
    gauge = _gauge(config, arch, model, legal, itemsize or model.dtype.itemsize)
    if name == "cache_bytes_per_token":
        legal = {
            kind: sizes
            for kind, sizes in legal.items()
            if gauge(least_widths(config, arch, {kind: sizes})) < gauge({})
        }
    least = least_widths(config, arch, legal)
    _check_reach(config, gauge({}), gauge(least), list(legal))
    removable = _removed(arch, least)
    # Parameters that go with one unit of what is limited.
    price = removable / (gauge({}) - gauge(least))
    goal, more = (gauge({}) - most) * price, 0.0
    while goal < removable:
        asked = replace(config, budget=None, targets=tuple(legal), sparsity=goal / sum(arch.layer_params))
        widths = target_widths(asked, arch, model.config, scores, legal)
        if (excess := gauge(widths) - most) <= 0:
            return _filled_up(widths, config, arch, legal, lambda larger: gauge(larger) <= most)
        # What is chosen lies within half a unit of what is asked for, on either side. Doubled steps find the other
        # side before they have gone a whole unit too far.
        more = max(2 * more, excess * price)
        goal += more
    return least


def _filled_up(
    widths: dict[str, int | Mapping[int, int]],
    config: StructPruneConfig,
    arch: ArchSpec,
    legal: Mapping[str, Sequence[int]],
    fits: Callable[[Widths], bool],
) -> dict[str, int | Mapping[int, int]]:
    """Larger widths where they still fit: a coarse step of one space may leave room for a finer one of another."""
    for name, width in widths.items():
        larger = choices(config, arch, name, legal[name])
        while isinstance(width, int) and width < larger[-1]:
            width = next(choice for choice in larger if choice > width)
            if not fits({**widths, name: width}):
                break
            widths = {**widths, name: width}
    return widths


def _check_reach(config: StructPruneConfig, dense: float, least: float, names: list[str]) -> None:
    ((name, most),) = (config.budget or {}).items()
    if most >= dense:
        raise StructPruneError(f"budget {name}={most:,} is met by the dense model, which has {dense:,}; ask for less.")
    if not names:
        raise StructPruneError(
            f"budget {name}={most:,} is not met by the dense model, which has {dense:,}, and targets="
            f"{list(config.targets)} leave that as it is; target 'attention'."
        )
    if most < least:
        raise StructPruneError(
            f"budget {name}={most:,} cannot be met: with all that may go from {', '.join(names)} the model still has "
            f"{least:,} of {dense:,}; allow that, or add targets."
        )


def _gauge(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str], itemsize: int
) -> Callable[[Widths], int]:
    """What a model of given widths has of that which the budget limits."""
    if "cache_bytes_per_token" in (config.budget or {}):

        def cached(widths: Widths) -> int:
            values = cached_values(_small(model, arch, widths), arch)
            if not values:
                raise StructPruneError(
                    f"How much a {arch.model_type} model keeps per token cannot be told without running it; give the "
                    "budget in parameters or bytes."
                )
            return values * itemsize

        return cached
    biased = biased_spaces(config, arch, [name for name in names if arch.of(name)[0].inside])
    whole = {name: arch.widths(name) for name in biased}
    dense = _small(model, arch, whole, biased).num_parameters() if biased else model.num_parameters()
    size = itemsize if "bytes" in (config.budget or {}) else 1
    if any(space.layer == MODEL for name in names for space in arch.of(name)):
        # Such a space also reaches into what is outside of the layers, which its `unit_params` leave out.
        return lambda widths: size * _small(model, arch, widths, biased).num_parameters()
    return lambda widths: size * (dense - _removed(arch, widths))


def _small(model: PreTrainedModel, arch: ArchSpec, widths: Widths, biased: Collection[str] = ()) -> PreTrainedModel:
    # In any other precision, the product that runs experts refuses tensors without memory.
    small: Any = skeleton(model, shrunk_config(model.config, arch, widths, biased))
    return small.to(torch.bfloat16).eval()


def _removed(arch: ArchSpec, widths: Widths) -> int:
    """Parameters that go from the layers."""
    spaces = (*arch.model_spaces, *arch.spaces)
    return sum((space.width - space.width_in(widths)) * space.scale * space.unit_params for space in spaces)


@torch.no_grad()
def cached_values(model: PreTrainedModel, arch: ArchSpec) -> int | None:
    """Number of values that generation keeps for one token, read off the cache of a run on the meta device: 0 for a
    model that does not generate, None for one that cannot be run there.
    """
    if not (arch.causal or model.config.is_encoder_decoder):
        return 0
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    token = torch.zeros(1, 1, width, dtype=model.dtype, device=model.device)
    # The masks of other implementations depend on values.
    model.set_attn_implementation("eager")
    try:
        output = model.get_decoder()(inputs_embeds=token, use_cache=True)
    except (RuntimeError, TypeError):
        return None
    # The field has another name in newer releases of transformers.
    cache = next(value for value in output.values() if isinstance(value, Cache))
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers)


def biased_spaces(config: StructPruneConfig, arch: ArchSpec, widths: Collection[str]) -> tuple[str, ...]:
    """The spaces whose consumers get a bias.

    Raises:
        StructPruneError: If `refit` asks for a bias that a config of this model cannot express.
    """
    if config.refit != "bias":
        return ()
    for name in widths:
        if any(space.bias_flag is None and not space.biased for space in arch.of(name)):
            raise StructPruneError(
                f"refit='bias' needs a bias in the projections of {name!r}, which a {arch.model_type} config cannot "
                "express; use refit='least_squares' or 'none'."
            )
    return tuple(widths)
