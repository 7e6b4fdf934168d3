"""Resize whole models, and slice the state of their optimizers."""

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
    """Give a model another config. Inside `with`, put modules of the yielded skeleton into the model."""
    new = skeleton(model, config, buffers)
    yield new
    adopt_config_(model, new)


def replace_layers_(model: nn.Module, arch: ArchSpec, other: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace all layers of a model by the layers of a skeleton."""
    for layer in range(arch.num_layers):
        fill_layer_(model, arch, layer, tensors_under(state, arch.layer_prefix(layer)), other)


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove whole layers. The kept layers are rebuilt with their indices in the shorter config."""
    config = shrunk_config(model.config, arch, {LAYER: len(keep)}, stay=keep)
    with rebuilding_(model, config) as shorter:
        old_layers = layer_list(model, arch)
        new_layers = layer_list(shorter, arch)
        for index, layer in zip(keep, new_layers, strict=True):
            replace_(model, f"{arch.layer_path}.{index}", layer, old_layers[index].state_dict(), arch)

        layers = model.get_submodule(arch.layer_path)
        assert isinstance(layers, nn.ModuleList)
        del layers[:]
        layers.extend(new_layers)


@torch.no_grad()
def cut_state_(
    optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan, shapes: Mapping[str, torch.Size]
) -> bool:
    """Slice the state of an optimizer like the parameters, whose shapes were `shapes`.

    Every kept weight keeps its state. An optimizer of another kind may have state that does not belong to single
    weights. Then the state of the resized parameters is removed, and the result is False.
    """
    kinds = (optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam)
    # A subclass may keep other state, so only the class itself counts.
    if type(optimizer) not in kinds:
        for name, parameter in model.named_parameters():
            if parameter.shape != shapes[name]:
                optimizer.state.pop(parameter, None)
        return False

    states = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            states[name] = optimizer.state[parameter]

    tensors_by_key: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                tensors_by_key[key][name] = value

    for key, tensors in tensors_by_key.items():
        for name, tensor in slice_tensors(tensors, arch.spaces, plan.keep).items():
            states[name][key] = tensor
    return True


@torch.no_grad()
def resize_(model: PreTrainedModel, arch: ArchSpec, tensors: Mapping[str, Tensor]) -> None:
    """Give the layers the widths of a state dict that is about to be loaded; the values are zero until then."""
    widths_by_kind: dict[str, dict[int, int]] = {}
    unexpected = tensors.keys() - model.state_dict().keys()
    for space in arch.spaces:
        axis = space.producers[0]
        # Without unexpected names, the parameter is in another part of the state dict.
        if unexpected and axis.param not in tensors:
            raise StructPruneError(
                f"The state dict names {axis.param} otherwise ({some_of(sorted(unexpected))}), as transformers saves "
                "experts, and its Trainer does not read these back: it would go on with other weights. "
                "`from_pretrained` reads the checkpoint; train that model in a run of its own."
            )
        if axis.param in tensors:
            present_size = model.get_parameter(axis.param).shape[axis.dim]
            loaded_size = tensors[axis.param].shape[axis.dim]
            widths = widths_by_kind.setdefault(space.kind, {})
            widths[space.layer] = space.width * loaded_size // present_size

    sizes: dict[str, Width] = {}
    for kind, widths in widths_by_kind.items():
        narrowest = min(widths.values())
        widest = max(widths.values())
        if narrowest == widest:
            sizes[kind] = widest
            continue

        reason = arch.uniform or arch.of(kind)[0].uniform
        if reason:
            raise StructPruneError(
                f"The state dict has {narrowest} units of {kind!r} in one layer and {widest} in another; a plain "
                f"{arch.model_type} config takes one width for all: {reason}."
            )
        sizes[kind] = widths

    if all(space.width_in(sizes) == space.width for space in arch.spaces):
        return
    like = next(model.parameters())
    _rebuild_(model, arch, shrunk_config(model.config, arch, sizes), lambda _, new: like.new_zeros(new.shape))


@torch.no_grad()
def pad_(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Give every layer the largest width of its kind; zeros in the consumers keep the outputs the same."""
    largest: dict[str, int] = {}
    for space in arch.spaces:
        largest[space.kind] = max(space.width, largest.get(space.kind, 0))

    places: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for space in arch.spaces:
        size = largest[space.kind] * space.scale
        for axis in space.axes:
            # All experts of a layer get the same width, so the places are the same for all experts.
            if axis.part not in (None, 0):
                continue
            # The parts of a packed weight follow each other, so a part begins at the end of the padded earlier parts.
            moved = replace(axis, offset=axis.offset // space.size * size)
            places[axis.param][axis.dim] += moved.indices(range(space.size))

    state = model.state_dict()

    def padded(name: str, new: Tensor) -> Tensor:
        tensor = state[name]
        for dim, place in places[name].items():
            shape = list(tensor.shape)
            shape[dim] = new.shape[dim]
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
        state = {}
        for name, tensor in resized.state_dict().items():
            if name.startswith(prefixes):
                state[name] = values(name, tensor)

        replace_layers_(model, arch, resized, state)


@torch.no_grad()
def mask_channels_(model: PreTrainedModel, residual: ResidualStream, keep: Sequence[int]) -> None:
    """Set the removed channels to zero in all weights that write to the residual stream."""
    removed = sorted(set(range(residual.space.size)) - set(keep))
    for axis in residual.space.producers:
        if axis.param in (residual.embed, *residual.writers):
            weight = model.get_parameter(axis.param)
            weight.index_fill_(axis.dim, torch.tensor(removed, dtype=torch.long, device=weight.device), 0)


@contextmanager
def scaled_norms(model: PreTrainedModel, residual: ResidualStream, factors: Mapping[str, float]) -> Iterator[None]:
    """Multiply the norms that read the residual stream, by name, by factors inside `with`."""
    names = [f"{read.tap}.weight" for read in residual.reads if read.norm and read.tap in factors]
    weights = {name: model.get_parameter(name).detach() for name in names}
    originals = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        factor = factors[name.removesuffix(".weight")]
        weight.copy_((weight.float() + residual.norm_offset) * factor - residual.norm_offset)

    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(originals[name])


@torch.no_grad()
def narrow_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]) -> None:
    """Give a model a narrower residual stream, and scale its weights so that the outputs are the same.

    A norm divides by the root of a mean square. Without the channels that are zero, the mean over the N' kept channels
    is N / N' times the mean over all N. The residual stream is therefore scaled by sqrt(N' / N), which restores the
    mean, so the epsilon of the norms has the same effect. The weights of all readers, such as norms, are scaled by the
    inverse. A norm over the output of a layer needs only the scale of the writers.
    """
    assert arch.residual is not None
    residual = arch.residual
    config = shrunk_config(model.config, arch, {HIDDEN: len(keep)})
    state = _scaled_state(model, residual, len(keep), factors)
    state = slice_tensors(state, [residual.space], {(MODEL, HIDDEN): tuple(keep)})

    # Buffers that depend on the width, such as the scale of embeddings, take their new values.
    with rebuilding_(model, config, buffers=True) as narrower:
        for path in dict.fromkeys(axis.module for axis in residual.space.axes):
            if not path.startswith(f"{arch.layer_path}."):
                _replace_with_buffers_(model, arch, path, narrower, state)
        replace_layers_(model, arch, narrower, state)


def _replace_with_buffers_(
    model: PreTrainedModel, arch: ArchSpec, path: str, narrower: PreTrainedModel, state: Mapping[str, Tensor]
) -> None:
    """Replace a module by a narrower module, including the buffers that are not in the state dict."""
    old = model.get_submodule(path)
    new = narrower.get_submodule(path)
    saved = new.state_dict()
    buffers = {name: buffer for name, buffer in new.named_buffers() if name not in saved}

    replace_(model, path, new, tensors_under(state, f"{path}."), arch)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(new.get_submodule(owner), attribute, buffer.to(old.get_buffer(name).device))


def _scaled_state(
    model: PreTrainedModel, residual: ResidualStream, width: int, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the state dict, scaled for a residual stream of `width` channels."""
    tensors = dict(model.state_dict())
    scale = (width / residual.space.size) ** 0.5
    address = tensors[residual.embed].data_ptr()
    # A tied head has the same tensor.
    embeddings = [name for name, tensor in tensors.items() if tensor.data_ptr() == address]

    # If transformers multiplies embeddings by the root of the width, the narrower config already scales them.
    embedding_scale = scale
    if residual.scaled_embedding:
        embedding_scale = 1.0
    # The norm before a tied head undoes the scale of the embeddings.
    head_scale = 1.0
    if len(embeddings) > 1:
        head_scale = embedding_scale

    norms = []
    readers = set()
    for read in residual.reads:
        if read.norm:
            norms.append(read)
        else:
            readers.update(axis.param for axis in read.readers)

    roles: list[tuple[Iterable[str], float]] = []
    roles.append((embeddings, embedding_scale))
    roles.append((residual.writers, scale))
    roles.append((readers, 1 / scale))
    for norm in norms:
        inverse = head_scale if norm.layer == MODEL else 1.0
        roles.append(([f"{norm.tap}.weight"], factors.get(norm.tap, 1.0) / scale / inverse))

    norm_names = {f"{norm.tap}.weight" for norm in norms}
    for names, factor in roles:
        if factor == 1:
            continue
        for name in names:
            offset = residual.norm_offset if name in norm_names else 0.0
            tensor = (tensors[name].float() + offset) * factor - offset
            tensors[name] = tensor.to(tensors[name].dtype)
    return tensors


@torch.no_grad()
def drop_tokens_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove all tokens except those in `keep`, which are numbered from 0. Ids in `keep` without rows come last."""
    space = arch.of(VOCAB)[0]
    tensors = model.state_dict(keep_vars=True)
    config = shrunk_config(model.config, arch, {VOCAB: bisect_left(keep, space.size)}, stay=keep)

    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        renumber_(generation_config, keep, space.size)

    with rebuilding_(model, config):
        # A tied head has the same tensor, which is sliced once.
        axes = {id(tensors[axis.param]): axis for axis in space.axes}
        for axis in axes.values():
            tensor = tensors[axis.param]
            num_rows = tensor.shape[axis.dim]
            rows = torch.tensor([token for token in keep if token < num_rows], device=tensor.device)
            tensor.data = tensor.data.index_select(axis.dim, rows)
            tensor.grad = None
