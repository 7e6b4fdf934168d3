"""Trials of removing tokens from a model whose type is not described, before text is read or a weight is touched.

The trial finds the weights that belong to tokens from the shapes of a model with one token less. Then it runs that
model without real weights in every way that a pruning runs a model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..system.errors import StructPruneError, one_line
from .inference import last_states, random_inputs, run_model
from .meta import predicts_gaps, predicts_next, reads_text, skeleton
from .modules import set_zeros_
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

    # Every model class raises its own errors.
    try:
        config = shrunk_config(model.config, arch, {VOCAB: vocabulary.size - 1})
        smaller = skeleton(model, config, buffers=True).eval()
        space = _with_all_axes(model, smaller, vocabulary)

        set_zeros_(smaller)
        with catch_warnings():
            simplefilter("ignore")
            _run(smaller)
    except Exception as error:
        raise UnsuitedError(
            f"the model type {model.config.model_type!r} is not described, and {type(model).__name__} does not work "
            f"with fewer tokens ({one_line(error)})"
        ) from error

    return space


def _with_all_axes(model: PreTrainedModel, smaller: PreTrainedModel, vocabulary: Space) -> Space:
    """Return the vocabulary with all axes that are smaller in the model with one token less.

    This also finds a second embedding, or a head of an unusual form.
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

    # Tied weights count once.
    unit_params: dict[int, int] = {}
    for axis in axes:
        tensor = tensors[axis.param]
        # The second embedding of Gemma 3n lacks the last tokens, so it does not shrink with one token less.
        if tensor.shape[axis.dim] == size and tuple(tensor.shape) == smaller_shapes.get(axis.param):
            raise StructPruneError(f"the number of rows of {axis.param} is not in the config")
        if isinstance(tensor, nn.Parameter):
            unit_params[id(tensor)] = tensor.numel() // size

    return replace(vocabulary, producers=tuple(axes), unit_params=sum(unit_params.values()))


def _one_less(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return a shape with one index less in dimension `dim`."""
    lengths = list(shape)
    lengths[dim] -= 1
    return tuple(lengths)


class _WithoutProducts(TorchDispatchMode):
    """Return zeros for matrix products, which take most of the time of a pass. All weights are zero.

    Weights that a model changes during a pass, such as the weights that RWKV rescales, remain zero. They share one
    number in memory, and torch cannot write to such a tensor.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATRIX_PRODUCTS:
            matrix, factor = args[-2:]
            if matrix.shape[1] != factor.shape[0]:
                raise RuntimeError(f"a matrix of shape {tuple(matrix.shape)} is multiplied by {tuple(factor.shape)}")
            return matrix.new_zeros(matrix.shape[0], factor.shape[1])

        # The names of operations that write to their first argument end in an underscore.
        if func.overloadpacket.__name__.endswith("_") and set(args[0].stride()) == {0}:
            return args[0]
        kwargs = kwargs or {}
        return func(*args, **kwargs)


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
