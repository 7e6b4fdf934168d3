"""A narrower residual stream, in the whole model at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.shrink import shrunk_config
from ..arch.spec import HIDDEN, MODEL, ArchSpec, ResidualStream
from .cut import rebuilding_, replace_, replace_layers_, slice_tensors, tensors_under
from .plan import Plan


@torch.no_grad()
def narrow_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]) -> None:
    """Give a model a narrower residual stream, and its norms the weights that make up for it.

    A norm divides by the root of a mean square. Once channels that are zero have been removed, the mean over the N'
    others is N / N' times the mean over all N. So the residual stream is scaled by sqrt(N' / N), which restores the
    mean and leaves the norms' epsilon right, and whatever reads it is scaled by the inverse: norms in their weights,
    other readers in their own. A norm over what a layer writes needs nothing but the writers' scale.
    """
    assert arch.residual is not None
    residual = arch.residual
    config = shrunk_config(model.config, arch, {HIDDEN: len(keep)})
    state = _scaled_state(model, residual, len(keep), factors)
    state = slice_tensors(state, [residual.space], Plan(arch.model_type, {(MODEL, HIDDEN): tuple(keep)}))
    # Buffers that depend on the width, such as the scale of embeddings, have to get their new values.
    with rebuilding_(model, config, buffers=True) as narrower:
        for path in _outside_layers(residual, arch):
            old, new = model.get_submodule(path), narrower.get_submodule(path)
            fresh = {name: buffer for name, buffer in new.named_buffers() if name not in new.state_dict()}
            replace_(old, new, tensors_under(state, f"{path}."), arch)
            for name, buffer in fresh.items():
                owner, _, leaf = name.rpartition(".")
                setattr(new.get_submodule(owner), leaf, buffer.to(old.get_buffer(name).device))
            model.set_submodule(path, new)
        replace_layers_(model, arch, narrower, state)


def _outside_layers(residual: ResidualStream, arch: ArchSpec) -> Iterable[str]:
    """The full names of the modules outside the layers whose parameters have channels of the residual stream."""
    modules = dict.fromkeys(axis.module for axis in residual.space.axes)
    return [path for path in modules if not path.startswith(f"{arch.layer_path}.")]


def _scaled_state(
    model: PreTrainedModel, residual: ResidualStream, width: int, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """The state dict with the scale that a residual stream of `width` channels needs."""
    tensors = dict(model.state_dict())
    scale = (width / residual.space.size) ** 0.5
    address = tensors[residual.embed].data_ptr()
    embeddings = [name for name, tensor in tensors.items() if tensor.data_ptr() == address]  # with a tied head
    # Where transformers multiplies embeddings by the root of the width, the narrower config scales them already.
    embedding = 1.0 if residual.scaled else scale
    head = embedding if len(embeddings) > 1 else 1.0  # the norm before a tied head undoes the embedding's scale
    norms = {read: f"{read.tap}.weight" for read in residual.reads if read.norm}
    readers = {axis.param for read in residual.reads if not read.norm for axis in read.readers}
    roles: list[tuple[Iterable[str], float]] = [
        (embeddings, embedding),
        (residual.writers, scale),
        (readers, 1 / scale),
        *(
            ([name], factors.get(read.tap, 1.0) / scale / (head if read.layer == MODEL else 1.0))
            for read, name in norms.items()
        ),
    ]
    for names, factor in roles:
        for name in names if factor != 1 else ():
            plus = residual.plus if name in norms.values() else 0.0
            tensors[name] = ((tensors[name].float() + plus) * factor - plus).to(tensors[name].dtype)
    return tensors
