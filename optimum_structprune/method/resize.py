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
from ..arch.spec import HIDDEN, LAYER, MODEL, VOCAB, ArchSpec, Read, ResidualStream, Width
from ..arch.token_space import renumber_
from ..system.errors import StructPruneError, some_of
from .plan import Plan
from .shrink import fill_layer_, slice_tensors, tensors_under


@contextmanager
def rebuilding_(model: PreTrainedModel, config: PretrainedConfig, buffers: bool = False) -> Iterator[PreTrainedModel]:
    """Yield a skeleton with another config, and let the model adopt this config at the end.

    The caller replaces modules of the model by modules of the skeleton inside `with`.
    """
    resized = skeleton(model, config, buffers)
    yield resized
    adopt_config_(model, resized)


def replace_layers_(model: nn.Module, arch: ArchSpec, resized: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace all layers of a model by the layers of a skeleton."""
    for layer in range(arch.num_layers):
        fill_layer_(model, arch, layer, tensors_under(state, arch.layer_prefix(layer)), resized)


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove whole layers. The kept layers are rebuilt with their indices in the shorter config."""
    config = shrunk_config(model.config, arch, {LAYER: len(keep)}, keep=keep)
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
    """Slice the state of an optimizer like the parameters, so that every kept weight keeps its state.

    An optimizer of another class may have state that does not belong to single weights. The state of the resized
    parameters is then removed.

    Args:
        optimizer: The optimizer.
        model: The pruned model.
        arch: The description of the model before pruning.
        plan: The kept units.
        shapes: The shape of each parameter before pruning.

    Returns:
        Whether the state was sliced.
    """
    # A subclass may keep other state, so only the class itself counts.
    kinds = (optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam)
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
    """Resize the layers to the widths of a state dict, before it is loaded. The values are zero until then.

    Raises:
        StructPruneError: If the names in the state dict are different, or if the model cannot have the widths.
    """
    widths_by_kind: dict[str, dict[int, int]] = {}
    unexpected = tensors.keys() - model.state_dict().keys()
    for space in arch.spaces:
        axis = space.producers[0]

        # Without unexpected names, the parameter is in another part of the state dict.
        if unexpected and axis.param not in tensors:
            raise StructPruneError(
                f"The state dict has another name for {axis.param} ({some_of(sorted(unexpected))}), because "
                "transformers renames experts when it saves them. Its Trainer does not load these names and would "
                "continue with other weights. Load the checkpoint with `from_pretrained`, and train it in a new run."
            )

        if axis.param in tensors:
            current_size = model.get_parameter(axis.param).shape[axis.dim]
            loaded_size = tensors[axis.param].shape[axis.dim]
            widths = widths_by_kind.setdefault(space.kind, {})
            widths[space.layer] = space.width * loaded_size // current_size

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
                f"The state dict has {narrowest} units of {kind!r} in one layer and {widest} in another. A plain "
                f"{arch.model_type} config takes one width for all: {reason}."
            )
        sizes[kind] = widths

    if all(space.width_in(sizes) == space.width for space in arch.spaces):
        return

    parameter = next(model.parameters())

    def zeros(name: str, tensor: Tensor) -> Tensor:
        return parameter.new_zeros(tensor.shape)

    _rebuild_(model, arch, shrunk_config(model.config, arch, sizes), zeros)


@torch.no_grad()
def pad_(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Pad every layer to the largest width of its kind. Zeros in the consumers keep the outputs the same."""
    widths: dict[str, int] = {}
    for space in arch.spaces:
        widths[space.kind] = max(space.width, widths.get(space.kind, 0))

    # The new indices of the old rows or columns, by parameter and dimension.
    indices: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for space in arch.spaces:
        size = widths[space.kind] * space.scale
        for axis in space.axes:
            # All experts of a layer get the same width, so the indices are the same for all experts.
            if axis.part not in (None, 0):
                continue

            # The parts of a packed weight follow each other, so a part begins at the end of the padded earlier parts.
            new_axis = replace(axis, offset=axis.offset // space.size * size)
            indices[axis.param][axis.dim] += new_axis.indices(range(space.size))

    state = model.state_dict()

    def padded(name: str, padded_tensor: Tensor) -> Tensor:
        tensor = state[name]
        for dim, dim_indices in indices[name].items():
            shape = list(tensor.shape)
            shape[dim] = padded_tensor.shape[dim]
            index = torch.tensor(dim_indices, device=tensor.device)
            tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        return tensor

    _rebuild_(model, arch, shrunk_config(model.config, arch, widths), padded)


def _rebuild_(
    model: PreTrainedModel, arch: ArchSpec, config: PretrainedConfig, values: Callable[[str, Tensor], Tensor]
) -> None:
    """Replace the layers of a model by layers of other sizes.

    `values(name, tensor)` returns the values of a parameter from its name and the empty resized tensor.
    """
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
    removed_channels = sorted(set(range(residual.space.size)) - set(keep))
    for axis in residual.space.producers:
        if axis.param != residual.embed and axis.param not in residual.writers:
            continue

        weight = model.get_parameter(axis.param)
        indices = torch.tensor(removed_channels, dtype=torch.long, device=weight.device)
        weight.index_fill_(axis.dim, indices, 0)


@contextmanager
def scaled_norms(model: PreTrainedModel, residual: ResidualStream, factors: Mapping[str, float]) -> Iterator[None]:
    """Multiply the norms that read the residual stream by factors inside `with`.

    `factors` maps the names of norms to factors. Other norms do not change.
    """
    norms = [place.tap for place in residual.reads if place.norm and place.tap in factors]
    weights = {norm: model.get_parameter(f"{norm}.weight").detach() for norm in norms}
    originals = {norm: weight.clone() for norm, weight in weights.items()}
    for norm, weight in weights.items():
        weight.copy_((weight.float() + residual.norm_offset) * factors[norm] - residual.norm_offset)

    try:
        yield
    finally:
        for norm, weight in weights.items():
            weight.copy_(originals[norm])


@torch.no_grad()
def narrow_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]) -> None:
    """Narrow the residual stream of a model, and scale its weights so that the outputs are the same.

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
    old_module = model.get_submodule(path)
    new_module = narrower.get_submodule(path)
    saved_names = set(new_module.state_dict())
    buffers = {name: buffer for name, buffer in new_module.named_buffers() if name not in saved_names}

    replace_(model, path, new_module, tensors_under(state, f"{path}."), arch)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        device = old_module.get_buffer(name).device
        setattr(new_module.get_submodule(owner), attribute, buffer.to(device))


def _scaled_state(
    model: PreTrainedModel, residual: ResidualStream, width: int, factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the state dict, scaled for a residual stream of `width` channels."""
    tensors = dict(model.state_dict())
    scale = (width / residual.space.size) ** 0.5

    # A tied head has the same tensor as the embedding.
    address = tensors[residual.embed].data_ptr()
    embeddings = [name for name, tensor in tensors.items() if tensor.data_ptr() == address]

    # If transformers multiplies embeddings by the root of the width, the narrower config already scales them.
    embedding_scale = scale
    if residual.scaled_embedding:
        embedding_scale = 1.0

    # The norm before a tied head undoes the scale of the embeddings.
    head_scale = 1.0
    if len(embeddings) > 1:
        head_scale = embedding_scale

    norms: list[Read] = []
    readers: set[str] = set()
    for place in residual.reads:
        if place.norm:
            norms.append(place)
        else:
            readers.update(axis.param for axis in place.readers)

    roles: list[tuple[Iterable[str], float]] = []
    roles.append((embeddings, embedding_scale))
    roles.append((residual.writers, scale))
    roles.append((readers, 1 / scale))
    for norm in norms:
        factor = factors.get(norm.tap, 1.0) / scale
        if norm.layer == MODEL:
            factor /= head_scale
        roles.append(([f"{norm.tap}.weight"], factor))

    norm_names = {f"{norm.tap}.weight" for norm in norms}
    for names, factor in roles:
        if factor == 1:
            continue

        for name in names:
            # transformers adds the offset to the weights of norms.
            offset = 0.0
            if name in norm_names:
                offset = residual.norm_offset
            tensor = (tensors[name].float() + offset) * factor - offset
            tensors[name] = tensor.to(tensors[name].dtype)

    return tensors


@torch.no_grad()
def drop_tokens_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove all tokens that are not in `keep`, and renumber the kept tokens from 0.

    Ids in `keep` without rows in the model must be the largest.
    """
    space = arch.of(VOCAB)[0]
    tensors = model.state_dict(keep_vars=True)
    config = shrunk_config(model.config, arch, {VOCAB: bisect_left(keep, space.size)}, keep=keep)

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
