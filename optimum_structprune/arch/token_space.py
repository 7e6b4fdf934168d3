"""The vocabulary as a space, whose units are tokens: what a model has for each of them, and the ids in its config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..errors import StructPruneError
from .spec import MODEL, ONE_PER_MODEL, TOKEN, VOCAB, Axis, Space


SIZE = "vocab_size"
# A second embedding, of which every layer reads a part, may leave out the last tokens.
SIZE_PER_LAYER = "vocab_size_per_layer_input"
# The fields of a config, and of the config of generation, that hold ids of tokens.
IDS = re.compile(
    r"\w*token_(ids?|index|indices)|(begin_)?suppress_tokens|(bad_words|force_words|forced_decoder)_ids|sequence_bias"
)
# Those that hold pairs, and which part of a pair is ids: the other is a bias, or a position.
PAIRS = {"sequence_bias": 0, "forced_decoder_ids": 1}


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


def renumber_(
    config: PretrainedConfig | GenerationConfig, keep: Sequence[int], size: int, only_shapes: bool = False
) -> None:
    """Give the tokens that a config names the ids that they have once only `keep`, ascending, of `size` rows is left;
    an id beyond both is no token, and stays. A model of `only_shapes` may name rows that are gone: as the last one.
    """
    new = dict.fromkeys(range(size), len(keep) - 1) if only_shapes else {}
    new |= {old: place for place, old in enumerate(keep)}

    def changed(old: int) -> int:
        if old not in new and 0 <= old < size:
            raise StructPruneError(
                f"The {type(config).__name__} names the token {old}, which is none of the {len(keep):,} of {size:,} "
                "that stay; leave it out of the config, or keep it."
            )
        return new.get(old, old)

    for field in [(part, key, _mapped(value, changed, PAIRS.get(key))) for part, key, value in _fields(config)]:
        setattr(*field)


def named_ids(model: PreTrainedModel) -> set[int]:
    """The ids of tokens that the config of a model names, and that of its generation."""
    ids: set[int] = set()
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for _, key, value in _fields(config):
            _mapped(value, ids.add, PAIRS.get(key))
    return ids


def _fields(config: PretrainedConfig | GenerationConfig) -> Iterator[tuple[Any, str, Any]]:
    """The fields that hold ids, of a config and of those inside it that do not number tokens of their own: each with
    its config, name and value.
    """
    for key, value in vars(config).items():
        if IDS.fullmatch(key):
            yield config, key, value
        elif isinstance(value, PretrainedConfig) and (key == "text_config" or not hasattr(value, SIZE)):
            yield from _fields(value)


def _mapped(value: Any, change: Any, place: int | None = None) -> Any:
    """A value with every id in it changed: in a list of pairs the part at `place`, and in biases by ids the ids."""
    if isinstance(value, dict):
        return {_mapped(ids, change): bias for ids, bias in value.items()}
    if isinstance(value, (list, tuple)) and place is not None:
        return [[_mapped(part, change) if at == place else part for at, part in enumerate(pair)] for pair in value]
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, change) for part in value)
    return change(value) if type(value) is int else value
