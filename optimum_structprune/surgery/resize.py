"""Layers of other widths: those of a state dict, or the largest width for all layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.shrink import shrunk_config
from ..arch.spec import ArchSpec, Width
from ..errors import StructPruneError
from .cut import rebuilding_, replace_layers_


@torch.no_grad()
def resize_(model: PreTrainedModel, arch: ArchSpec, tensors: Mapping[str, Tensor]) -> None:
    """Give the layers the widths of a state dict that is about to be loaded; the values are zero until then."""
    widths_by_kind: dict[str, dict[int, int]] = {}
    for space in arch.spaces:
        axis = space.out[0]
        if axis.param in tensors:
            present, loaded = (
                holder.shape[axis.dim] for holder in (model.get_parameter(axis.param), tensors[axis.param])
            )
            widths_by_kind.setdefault(space.kind, {})[space.layer] = space.width * loaded // present
    sizes: dict[str, Width] = {}
    for name, widths in widths_by_kind.items():
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
    """Give every layer the largest width of its kind; what is added is zero, and the outputs stay the same.

    The added columns of the consumers are zero, so whatever the added units compute has no effect.
    """
    largest = {kind: max(space.width for space in arch.of(kind)) for kind in {space.kind for space in arch.spaces}}
    state = model.state_dict()
    places: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for space in arch.spaces:
        size = largest[space.kind] * space.scale
        # All experts of a layer get the same width, so the first one gives the places for all.
        for axis in (axis for axis in space.axes if axis.part in (None, 0)):
            # The parts of a packed weight follow each other, so a part begins where the padded ones before it end.
            moved = replace(axis, offset=axis.offset // space.size * size)
            places[axis.param][axis.dim] += moved.indices(range(space.size))

    def padded(name: str, new: Tensor) -> Tensor:
        tensor = state[name]
        for dim, place in places[name].items():
            shape = (*tensor.shape[:dim], new.shape[dim], *tensor.shape[dim + 1 :])
            index = torch.tensor(place, device=tensor.device)
            tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        return tensor

    _rebuild_(model, arch, shrunk_config(model.config, arch, largest), padded)


def _rebuild_(
    model: PreTrainedModel, arch: ArchSpec, config: PretrainedConfig, values: Callable[[str, Tensor], Tensor]
) -> None:
    """Replace the layers of a model by layers of other sizes."""
    with rebuilding_(model, config) as resized:
        prefixes = tuple(arch.layer_prefix(layer) for layer in range(arch.num_layers))
        new = {name: tensor for name, tensor in resized.state_dict().items() if name.startswith(prefixes)}
        replace_layers_(model, arch, resized, {name: values(name, tensor) for name, tensor in new.items()})
