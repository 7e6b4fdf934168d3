"""Trials of removing tokens from a model whose type is not described, before text is read or a weight is touched.

The trial takes the weights that belong to tokens from the shapes of a model with one token less. Then it runs that
model without real weights in all ways in which a pruning runs it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..errors import StructPruneError, one_line
from .inference import last_states, random_inputs, run_model
from .meta import predicts_gaps, predicts_next, reads_text, skeleton
from .modules import give_zeros_
from .shrink import shrunk_config
from .spec import VOCAB, ArchSpec, Axis, Space


TRIAL_TOKENS = 64
MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class UnsuitedError(StructPruneError):
    """Tokens cannot be removed from a model of an undescribed type."""


def tried_vocabulary(model: PreTrainedModel, arch: ArchSpec) -> Space:
    """Return the vocabulary of a model of an undescribed type, once a trial of removing a token has passed.

    Args:
        model: The model; only its class, its config and its shapes are used.
        arch: Its description, with a vocabulary.

    Raises:
        UnsuitedError: If the model with one token less cannot be built, or cannot run as a pruning runs it.
    """
    vocabulary = arch.of(VOCAB)[0]
    try:
        config = shrunk_config(model.config, arch, {VOCAB: vocabulary.size - 1})
        smaller = skeleton(model, config, buffers=True).eval()
        space = _with_all_axes(model, smaller, vocabulary)
        give_zeros_(smaller)
        with catch_warnings():
            simplefilter("ignore")
            _run(smaller)
    except Exception as error:  # every model class raises its own errors
        raise UnsuitedError(
            f"the model type {model.config.model_type!r} is not described, and {type(model).__name__} does not work "
            f"with fewer tokens ({one_line(error)})"
        ) from error
    return space


def _with_all_axes(model: PreTrainedModel, smaller: PreTrainedModel, vocabulary: Space) -> Space:
    """Return the vocabulary with all axes in which the model with one token less is smaller.

    A second embedding, or a head of an unusual form, is found only so.
    """
    size = vocabulary.size
    tensors = dict(model.state_dict(keep_vars=True))
    smaller_shapes = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}

    axes = list(vocabulary.axes)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        smaller_shape = smaller_shapes.get(name)
        if shape == smaller_shape:
            continue
        dims = [dim for dim, length in enumerate(shape) if _one_less(shape, dim) == smaller_shape and length == size]
        if len(dims) != 1:
            raise StructPruneError(f"{name} of shape {shape} becomes {smaller_shape} with {size - 1} of {size} tokens")
        if Axis(name, dims[0]) not in axes:
            axes.append(Axis(name, dims[0]))

    owned: dict[int, int] = {}
    for axis in axes:
        tensor = tensors[axis.param]
        # The second embedding of Gemma 3n lacks the last tokens, so the removal of the last one leaves it as it is.
        if tensor.shape[axis.dim] == size and tuple(tensor.shape) == smaller_shapes.get(axis.param):
            raise StructPruneError(f"the number of rows of {axis.param} is not in the config")
        if isinstance(tensor, nn.Parameter):
            owned[id(tensor)] = tensor.numel() // size
    return replace(vocabulary, producers=tuple(axes), unit_params=sum(owned.values()))


def _one_less(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return a shape with one index less in dimension `dim`."""
    return (*shape[:dim], shape[dim] - 1, *shape[dim + 1 :])


class _WithoutProducts(TorchDispatchMode):
    """Returns zeros in place of the products with weights of zero, which take most of the time of a pass.

    Weights that a model changes in a pass, as RWKV rescales them, stay zero: they share one number in memory, which
    torch does not write to.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATRIX_PRODUCTS:
            first, second = args[-2:]
            if first.shape[1] != second.shape[0]:
                raise RuntimeError(f"a matrix of shape {tuple(first.shape)} is multiplied by {tuple(second.shape)}")
            return first.new_zeros(first.shape[0], second.shape[1])

        # The names of operations that write to their first argument end in an underscore.
        if func.overloadpacket.__name__.endswith("_") and set(args[0].stride()) == {0}:
            return args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _run(model: Any) -> None:
    """Run a model as a pruning does: for its outputs, for its hidden states, and with labels."""
    inputs = random_inputs(model, TRIAL_TOKENS)
    ids = inputs.flatten()[None]
    with _WithoutProducts():
        run_model(model, inputs)
        if reads_text(model) and not predicts_next(model):
            last_states(model, ids)
        if predicts_gaps(model):
            model(input_ids=ids, labels=ids)
