"""The vocabulary as a space, whose units are tokens: what a model has for each of them, and the ids in its config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .spec import MODEL, ONE_PER_MODEL, TOKEN, VOCAB, Axis, Space


SIZE = "vocab_size"
# A second embedding, of which every layer reads a part, may leave out the last tokens.
SIZE_PER_LAYER = "vocab_size_per_layer_input"
# The fields of a config, and of the config of generation, that hold ids of tokens.
IDS = re.compile(r"\w*token_(ids?|index|indices)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|sequence_bias")


def vocabulary_of(model: PreTrainedModel, config: PretrainedConfig) -> Space | None:
    """The vocabulary of a model whose text `config` describes; None where it has no rows that tokens could lose."""
    size, embedding, head = getattr(config, SIZE, None), model.get_input_embeddings(), model.get_output_embeddings()
    tensors = model.state_dict(keep_vars=True)
    rows = {id(module.weight) for module in (embedding, head) if isinstance(getattr(module, "weight", None), Tensor)}
    axes = [Axis(name, 0) for name, tensor in tensors.items() if id(tensor) in rows]
    if size is None or not axes or any(tensors[axis.param].shape[0] != size for axis in axes):
        return None
    axes += _biases(head, model, tensors, size) if head is not None else []
    per_layer = getattr(config, SIZE_PER_LAYER, None)
    axes += [
        Axis(f"{name}.weight", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == per_layer and id(module.weight) not in rows
    ]
    owned = {
        id(tensor): tensor.numel() // size for axis in axes if isinstance(tensor := tensors[axis.param], nn.Parameter)
    }
    keys = ((SIZE, 1),)
    return Space(VOCAB, MODEL, size, tuple(axes), (), keys, (), sum(owned.values()), unit=TOKEN, uniform=ONE_PER_MODEL)


def _biases(head: nn.Module, model: nn.Module, tensors: dict[str, Tensor], size: int) -> Iterator[Axis]:
    """What is added to the logits: one number per token, in the head or beside it."""
    path = next(name for name, module in model.named_modules() if module is head)
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] in (path, path.rpartition(".")[0]) and tensor.shape[-1] == tensor.numel() == size:
            yield Axis(name, tensor.ndim - 1)


def renumber_(config: PretrainedConfig | GenerationConfig, keep: Sequence[int], size: int) -> None:
    """Give the tokens that a config names the ids that they have once only `keep` of `size` tokens are left.

    A token that is not kept becomes the last one: that is for models that are built for their shapes alone.
    """
    new = {old: place for place, old in enumerate(keep)}
    for key, value in list(vars(config).items()):
        if IDS.fullmatch(key):
            setattr(config, key, _mapped(value, lambda old: new.get(old, len(keep) - 1) if 0 <= old < size else old))
        elif key == SIZE_PER_LAYER and value is not None:
            setattr(config, key, sum(old < value for old in keep))


def named_ids(config: PretrainedConfig | GenerationConfig) -> set[int]:
    """The ids of tokens that a config names."""
    ids: set[int] = set()
    for key, value in vars(config).items():
        if IDS.fullmatch(key):
            _mapped(value, lambda old: ids.add(old))
    return ids


def _mapped(value: Any, change: Any) -> Any:
    """A value with every whole number in it changed."""
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(of, change) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, change) for part in value)
    return change(value) if type(value) is int else value
