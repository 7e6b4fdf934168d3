"""Gives whole models other sizes, and cuts the state of their optimizers."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.meta import skeleton
from ..arch.modules import adopt_config_, layer_list, replace_
from ..arch.shrink import shrunk_config
from ..arch.spec import HIDDEN, LAYER, MODEL, VOCAB, ArchSpec, ResidualStream, Width
from ..arch.token_space import renumber_
from ..errors import StructPruneError, some_of
from ..method.shrink import fill_layer_, slice_tensors, tensors_under
from ..record.plan import Plan


@contextmanager
def rebuilding_(model: PreTrainedModel, config: PretrainedConfig, buffers: bool = False) -> Iterator[PreTrainedModel]:
    """Give a model another config; inside `with`, modules of the skeleton that it gives are put into the model."""
    new = skeleton(model, config, buffers)
    yield new
    adopt_config_(model, new)


def replace_layers_(model: nn.Module, arch: ArchSpec, other: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace all layers of a model by those of a skeleton."""
    for layer in range(arch.num_layers):
        fill_layer_(model, arch, layer, tensors_under(state, arch.layer_prefix(layer)), other)


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove whole layers; the others are built anew, with their indices in the shorter config."""
    config = shrunk_config(model.config, arch, {LAYER: len(keep)}, stay=keep)
    with rebuilding_(model, config) as shorter:
        old, new = layer_list(model, arch), layer_list(shorter, arch)
        for index, layer in zip(keep, new, strict=True):
            replace_(model, f"{arch.layer_path}.{index}", layer, old[index].state_dict(), arch)
        layers = model.get_submodule(arch.layer_path)
        assert isinstance(layers, nn.ModuleList)
        del layers[:]
        layers.extend(new)


@torch.no_grad()
def cut_state_(
    optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan, shapes: Mapping[str, torch.Size]
) -> bool:
    """Cut an optimizer's state down with the parameters, which had these shapes; every kept weight keeps its state.

    An optimizer without state for single weights begins that of the cut parameters anew, and the result is False.
    """
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                tensors[key][name] = value
    # Those whose state is one number per weight, or one per parameter, as that of a subclass may not be.
    kinds = (optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam)
    if type(optimizer) not in kinds:
        for name, parameter in model.named_parameters():
            if parameter.shape != shapes[name]:
                optimizer.state.pop(parameter, None)
        return False
    for key, held in tensors.items():
        for name, tensor in slice_tensors(held, arch.spaces, plan.keep).items():
            states[name][key] = tensor
    return True


@torch.no_grad()
def resize_(model: PreTrainedModel, arch: ArchSpec, tensors: Mapping[str, Tensor]) -> None:
    """Give the layers the widths of a state dict that is about to be loaded; the values are zero until then."""
    widths_by_kind: dict[str, dict[int, int]] = {}
    others = tensors.keys() - model.state_dict().keys()
    for space in arch.spaces:
        axis = space.producers[0]
        if others and axis.param not in tensors:  # without others, it is in another part of the state dict
            raise StructPruneError(
                f"The state dict names {axis.param} otherwise ({some_of(sorted(others))}), as transformers saves "
                "experts, and its Trainer does not read these back: it would go on with other weights. "
                "`from_pretrained` reads the checkpoint; train that model in a run of its own."
            )
        if axis.param in tensors:
            present, loaded = model.get_parameter(axis.param).shape[axis.dim], tensors[axis.param].shape[axis.dim]
            widths_by_kind.setdefault(space.kind, {})[space.layer] = space.width * loaded // present
    sizes: dict[str, Width] = {}
    for name, widths in widths_by_kind.items():
        narrowest, widest = min(widths.values()), max(widths.values())
        if narrowest < widest and (reason := arch.uniform or arch.of(name)[0].uniform):
            raise StructPruneError(
                f"The state dict has {narrowest} units of {name!r} in one layer and {widest} in another; a plain "
                f"{arch.model_type} config takes one width for all: {reason}."
            )
        sizes[name] = widest if narrowest == widest else widths
    if all(space.width_in(sizes) == space.width for space in arch.spaces):
        return
    like = next(model.parameters())
    _rebuild_(model, arch, shrunk_config(model.config, arch, sizes), lambda _, new: like.new_zeros(new.shape))


@torch.no_grad()
def pad_(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Give every layer the largest width of its kind; zeros in the consumers keep the outputs the same."""
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


@torch.no_grad()
def mask_channels_(model: PreTrainedModel, residual: ResidualStream, keep: Sequence[int]) -> None:
    """Have a model write only to the channels of its residual stream that it keeps."""
    gone = sorted({*range(residual.space.size)} - {*keep})
    for axis in residual.space.producers:
        if axis.param in (residual.embed, *residual.writers):
            weight = model.get_parameter(axis.param)
            weight.index_fill_(axis.dim, torch.tensor(gone, dtype=torch.long, device=weight.device), 0)


@contextmanager
def scaled_norms(model: PreTrainedModel, residual: ResidualStream, factors: Mapping[str, float]) -> Iterator[None]:
    """Multiply the norms that read the residual stream, by name, by factors inside `with`."""
    names = [f"{read.tap}.weight" for read in residual.reads if read.norm and read.tap in factors]
    weights = {name: model.get_parameter(name).detach() for name in names}
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        factor = factors[name.removesuffix(".weight")]
        weight.copy_((weight.float() + residual.norm_offset) * factor - residual.norm_offset)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])


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
    state = slice_tensors(state, [residual.space], {(MODEL, HIDDEN): tuple(keep)})
    # Buffers that depend on the width, such as the scale of embeddings, have to get their new values.
    with rebuilding_(model, config, buffers=True) as narrower:
        modules = dict.fromkeys(axis.module for axis in residual.space.axes)
        for path in (path for path in modules if not path.startswith(f"{arch.layer_path}.")):
            old, new = model.get_submodule(path), narrower.get_submodule(path)
            fresh = {name: buffer for name, buffer in new.named_buffers() if name not in new.state_dict()}
            replace_(model, path, new, tensors_under(state, f"{path}."), arch)
            for name, buffer in fresh.items():
                owner, _, leaf = name.rpartition(".")
                setattr(new.get_submodule(owner), leaf, buffer.to(old.get_buffer(name).device))
        replace_layers_(model, arch, narrower, state)


def _scaled_state(
    model: PreTrainedModel, residual: ResidualStream, width: int, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """The state dict with the scale that a residual stream of `width` channels needs."""
    tensors = dict(model.state_dict())
    scale = (width / residual.space.size) ** 0.5
    address = tensors[residual.embed].data_ptr()
    embeddings = [name for name, tensor in tensors.items() if tensor.data_ptr() == address]  # with a tied head
    # Where transformers multiplies embeddings by the root of the width, the narrower config scales them already.
    embedding = 1.0 if residual.scaled_embedding else scale
    head = embedding if len(embeddings) > 1 else 1.0  # the norm before a tied head undoes the embedding's scale
    norms = {read: f"{read.tap}.weight" for read in residual.reads if read.norm}
    readers = {axis.param for read in residual.reads if not read.norm for axis in read.readers}
    roles: list[tuple[Iterable[str], float]] = [(embeddings, embedding), (residual.writers, scale)]
    roles.append((readers, 1 / scale))
    for read, name in norms.items():
        roles.append(([name], factors.get(read.tap, 1.0) / scale / (head if read.layer == MODEL else 1.0)))
    for names, factor in roles:
        for name in names if factor != 1 else ():
            plus = residual.norm_offset if name in norms.values() else 0.0
            tensors[name] = ((tensors[name].float() + plus) * factor - plus).to(tensors[name].dtype)
    return tensors


@torch.no_grad()
def drop_tokens_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove all tokens but those in `keep`, numbered anew from 0; ids there without rows come last."""
    space, tensors = arch.of(VOCAB)[0], model.state_dict(keep_vars=True)
    config = shrunk_config(model.config, arch, {VOCAB: bisect_left(keep, space.size)}, stay=keep)
    if (generation := getattr(model, "generation_config", None)) is not None:
        renumber_(generation, keep, space.size)
    with rebuilding_(model, config):
        for tensor, dim in {id(tensors[axis.param]): (tensors[axis.param], axis.dim) for axis in space.axes}.values():
            rows = torch.tensor([token for token in keep if token < tensor.shape[dim]], device=tensor.device)
            tensor.data, tensor.grad = tensor.data.index_select(dim, rows), None
