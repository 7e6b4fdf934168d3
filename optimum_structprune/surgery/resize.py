"""Layers of other widths: those of a state dict, or the widest for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arch.load import layer_list, put_layer_
from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from .cut import adopt_config_, replace_


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@torch.no_grad()
def resize_(model: PreTrainedModel, arch: ArchSpec, tensors: Mapping[str, Tensor]) -> None:
    """Give the layers the widths of a state dict that is about to be loaded; the values are zero until then.

    Args:
        model: The model that is changed.
        arch: Its description.
        tensors: The state dict, or a part of it.

    Raises:
        StructPruneError: If the layers' widths differ where this architecture takes one for all.
    """
    found: dict[str, dict[int, int]] = {}
    for space in arch.spaces:
        axis = space.out[0]
        if axis.param in tensors:
            here, there = (held.shape[axis.dim] for held in (model.get_parameter(axis.param), tensors[axis.param]))
            found.setdefault(space.kind, {})[space.layer] = space.width * there // here
    sizes: dict[str, int | Mapping[int, int]] = {}
    for name, widths in found.items():
        least, most = min(widths.values()), max(widths.values())
        if least < most and (reason := arch.uniform or arch.of(name)[0].uniform):
            raise StructPruneError(
                f"The state dict has {least} units of {name!r} in one layer and {most} in another; a plain "
                f"{arch.model_type} config takes one width for all: {reason}."
            )
        sizes[name] = most if least == most else widths
    if all(space.width_in(sizes) == space.width for space in arch.spaces):
        return
    like = next(model.parameters())
    _rebuild_(model, arch, shrunk_config(model.config, arch, sizes), lambda _, new: like.new_zeros(new.shape))


@torch.no_grad()
def pad_(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Give every layer the width of the widest; what is added is zero, and the model computes what it did before.

    Zero columns in the consumers make it exact: whatever the added units give, none of it gets through.

    Args:
        model: The model that is changed.
        arch: Its description.
    """
    widest = {kind: max(space.width for space in arch.of(kind)) for kind in {space.kind for space in arch.spaces}}
    state = model.state_dict()
    places: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for space in arch.spaces:
        size = widest[space.kind] * space.scale
        # The experts of a layer grow alike, so the first speaks for all.
        for axis in (axis for axis in space.axes if axis.part in (None, 0)):
            # Packed parts move apart: each begins where those before it end once they have grown.
            moved = replace(axis, offset=axis.offset // space.size * size)
            places[axis.param][axis.dim] += moved.indices(range(space.size))

    def padded(name: str, new: Tensor) -> Tensor:
        tensor = state[name]
        for dim, place in places[name].items():
            shape = (*tensor.shape[:dim], new.shape[dim], *tensor.shape[dim + 1 :])
            index = torch.tensor(place, device=tensor.device)
            tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        return tensor

    _rebuild_(model, arch, shrunk_config(model.config, arch, widest), padded)


def _rebuild_(
    model: PreTrainedModel, arch: ArchSpec, config: PretrainedConfig, values: Callable[[str, Tensor], Tensor]
) -> None:
    """Put layers of other sizes in the place of a model's own.

    Args:
        model: The model that is changed.
        arch: Its description.
        config: With the new sizes.
        values: Gives every tensor of the new layers, from its full name and one of its shape on the meta device.
    """
    resized = skeleton(model, config)
    for layer, (old, new) in enumerate(zip(layer_list(model, arch), layer_list(resized, arch), strict=True)):
        prefix = arch.layer_prefix(layer)
        replace_(old, new, {name: values(prefix + name, tensor) for name, tensor in new.state_dict().items()}, arch)
        put_layer_(model, arch, layer, new)
    adopt_config_(model, config, resized)
