"""A narrower residual stream, in the whole model at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..arch.heterogeneous import heterogeneous
from ..arch.load import layer_list, put_layer_
from ..arch.shrink import shrunk_config
from ..arch.spec import HIDDEN, MODEL, ArchSpec
from .cut import adopt_config_, replace_, slice_tensors
from .plan import Plan


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def narrow_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]) -> None:
    """Give a model a narrower residual stream, and its norms the weights that make up for it.

    A norm divides by the root of a mean square. Once channels that are zero are gone, the mean over the N' others is
    N / N' times the mean over all N. So the whole stream is scaled by sqrt(N' / N), which brings the mean back and
    leaves epsilon right, and whatever reads it by the inverse: norms in their weights, all else in its own. A norm
    over what a layer writes needs nothing but the writers' scale.

    Args:
        model: The model that is changed.
        arch: Its description.
        keep: Channels that stay.
        factors: Further factors of the norms that read the stream, by their full name.

    Raises:
        StructPruneError: If the config class refuses the width, or a tensor does not come out as the config says.
    """
    assert arch.residual is not None
    config = shrunk_config(model.config, arch, {HIDDEN: len(keep)})
    # Buffers that hang on the width, such as the scale of embeddings, have to hold their new values.
    with init_empty_weights(include_buffers=False), heterogeneous():
        narrower = type(model)(config)
    state = _narrow_state(model, arch, keep, factors)
    for path, new in _rebuilt(narrower, arch):
        fresh = {name: buffer for name, buffer in new.named_buffers() if name not in new.state_dict()}
        inside = {name.removeprefix(f"{path}."): state[name] for name in state if name.startswith(f"{path}.")}
        replace_(model.get_submodule(path), new, inside, arch)
        for name, buffer in fresh.items():
            owner, _, leaf = name.rpartition(".")
            like = model.get_submodule(path).get_buffer(name)
            setattr(new.get_submodule(owner), leaf, buffer.to(like.device))
        model.set_submodule(path, new)
    for layer, (old, new) in enumerate(zip(list(layer_list(model, arch)), layer_list(narrower, arch), strict=True)):
        prefix = arch.layer_prefix(layer)
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        replace_(old, new, inside, arch)
        put_layer_(model, arch, layer, new)
    adopt_config_(model, config, narrower)


def _rebuilt(model: nn.Module, arch: ArchSpec) -> list[tuple[str, nn.Module]]:
    """The modules outside the layers that hold a part of the stream."""
    assert arch.residual is not None
    paths = dict.fromkeys(axis.module for axis in arch.residual.space.axes)
    return [(path, model.get_submodule(path)) for path in paths if not path.startswith(f"{arch.layer_path}.")]


def _narrow_state(
    model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]
) -> dict[str, Tensor]:
    stream, tensors = arch.residual, dict(model.state_dict())
    assert stream is not None
    down = (len(keep) / stream.space.size) ** 0.5
    embedding = tensors[stream.embed].data_ptr()
    shared = [name for name, tensor in tensors.items() if tensor.data_ptr() == embedding]
    scale = dict.fromkeys(stream.writers, down)
    if not stream.scaled:
        scale |= dict.fromkeys(shared, down)
    for read in stream.reads:
        if read.norm:
            scale[f"{read.tap}.weight"] = factors.get(read.tap, 1.0) / down
        else:
            scale |= {axis.param: 1 / down for axis in read.readers}
    if len(shared) > 1 and not stream.scaled:
        scale[f"{stream.reads[-1].tap}.weight"] /= down  # for the head, which has got the embedding's scale
    norms = {f"{read.tap}.weight" for read in stream.reads if read.norm}
    for name, factor in scale.items():
        plus = stream.plus if name in norms else 0.0
        tensors[name] = ((tensors[name].float() + plus) * factor - plus).to(tensors[name].dtype)
    plan = Plan(arch.model_type, {(MODEL, HIDDEN): tuple(keep)})
    return slice_tensors(tensors, [stream.space], plan)
