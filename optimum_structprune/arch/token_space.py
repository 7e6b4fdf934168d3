"""The vocabulary as a space, whose units are tokens: what a model has for each of them, and the ids in its config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..errors import StructPruneError
from .modules import embedding_of, module_files


VOCAB_SIZE = "vocab_size"
# A second embedding, of which every layer reads a part, may leave out the last tokens.
VOCAB_SIZE_PER_LAYER = "vocab_size_per_layer_input"
# The fields of a config, and of the config of generation, that hold ids of tokens.
TOKEN_ID_KEYS = re.compile(
    r"\w*token_(ids?|index|indices)|(begin_)?suppress_tokens|(bad_words|force_words|forced_decoder)_ids|sequence_bias"
    r"|(lang|task)_to_id|(image|im|slice)_(start|end|patch|newline)_id|newline_id"  # of Molmo 2 and MiniCPM-V
)
# Those that hold pairs, and which part of a pair is ids: the other is a bias, a position, or the name of a token.
ID_PAIR_KEYS = {"sequence_bias": 0, "forced_decoder_ids": 1, "lang_to_id": 1, "task_to_id": 1}
# Those of the modules of sentence-transformers, with their ids.
MODULE_IDS = re.compile(r'"(?:keep_only|true|false)_token_ids?": *(?:\[[\d,\s]*\]|\d+)')


def renumber_(
    config: PretrainedConfig | GenerationConfig, keep: Sequence[int], size: int, only_shapes: bool = False
) -> None:
    """Change the token ids in a config to those that remain once only `keep`, ascending, of `size` rows is left.

    An id beyond both is no token, and stays. With `only_shapes`, rows that are gone count as the last one.
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

    for fields, key, value in [(f, k, _mapped(v, changed, ID_PAIR_KEYS.get(k))) for f, k, v in _fields(config)]:
        fields[key] = value


def named_ids(model: PreTrainedModel) -> set[int]:
    """The ids of tokens in the config of a model, in its generation config and in those of modules around it."""
    fields = MODULE_IDS.findall(" ".join(module_files(model.config).values()))
    ids = {int(number) for field in fields for number in re.findall(r"\d+", field)}
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for _, key, value in _fields(config):
            _mapped(value, ids.add, ID_PAIR_KEYS.get(key))
    return ids


def counted_from(model: PreTrainedModel) -> int:
    """The id of the padding where positions are counted from it, and 0 elsewhere."""
    rows = getattr(embedding_of(model), "num_embeddings", 0)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max((table.padding_idx or 0 for table in tables if table.num_embeddings != rows), default=0)


def _fields(config: PretrainedConfig | GenerationConfig | dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The fields that hold token ids, each with the mapping of all beside it, its name and value.

    Configs and mappings inside a config count too, unless they number tokens of their own.
    """
    fields = config if isinstance(config, dict) else vars(config)
    for key, value in fields.items():
        if TOKEN_ID_KEYS.fullmatch(str(key)):
            yield fields, key, value
        elif isinstance(value, PretrainedConfig):
            if key in ("text_config", "vlm_config", "decoder", "decoder_config") or not hasattr(value, VOCAB_SIZE):
                yield from _fields(value)
        elif isinstance(value, dict) and VOCAB_SIZE not in value:  # as what a config has for a task
            yield from _fields(value)


def _mapped(value: Any, change: Any, place: int | None = None) -> Any:
    """A value with every id in it changed: in a list of pairs the part at `place`, and in biases by ids the ids."""
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(part, change) if place == 1 else part for key, part in value.items()}
    if isinstance(value, (list, tuple)) and place is not None:
        return [[_mapped(part, change) if at == place else part for at, part in enumerate(pair)] for pair in value]
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, change) for part in value)
    return change(value) if type(value) is int else value
