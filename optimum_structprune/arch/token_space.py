"""Find and change the fields of a config that hold token ids or sizes of the vocabulary.

transformers does not mark the fields that hold token ids, so they are recognized by their names. The rule is broad: a
number whose name ends in `_id`, `_ids`, `_index` or the like is a token id unless `OTHER_NUMBERS` says otherwise. A
test walks all config classes of transformers and checks the rule.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..system.errors import StructPruneError
from .modules import embedding_of, module_files


VOCAB_SIZE = "vocab_size"
# The second embedding of Gemma 3n may lack the last tokens, and the logits of Inkling lack the rows of the padding.
VOCAB_SIZE_PER_LAYER = "vocab_size_per_layer_input"
BOUNDS = (VOCAB_SIZE_PER_LAYER, "unpadded_vocab_size")
# The first of a run of tokens that stand for codes of images or audio: the id is the sum of offset and code.
OFFSETS = re.compile(r"(\w+_)?(vocab|token)_offset")

# The names of fields that hold token ids.
TOKEN_IDS = re.compile(
    r"(\w+_)?(id|ids|idx|index|indices)"
    r"|(begin_)?suppress_tokens"
    r"|sequence_bias"
    r"|(\w+_)?(token|map|mapping)"
    r"|id_to_text"
)
# The names that `TOKEN_IDS` matches although the numbers are something else:
OTHER_NUMBERS = re.compile(
    r"\w*(layer|block|channel|hidden_state|hook)\w*"  # places in the model,
    r"|\w*out_indices|head_in_index|encoder_projection_indices|decode_index|eval_idx|merge_index|altup_active_idx"
    r"|\w*ignore_index|\w*label\w*"  # labels,
    r"|\w*per_token|(auto|device|attribute)_map"  # numbers per token, classes and devices,
    r"|lang_id|default_prompt_id|max_initial_timestamp_index"  # languages, prompts and steps of time,
    r"|(codec|codebook|audio_stream|t2u|vocoder|subs|tag|char)_\w*"  # and entries of another vocabulary.
)
# Mappings whose keys are names of a user's own.
NAMES_OF_USERS = ("label2id", "id2label")
# The entries of a `vocabulary_map` that Chameleon and Emu3 look up: codes of images, and special tokens.
LOOKED_UP = re.compile(r"IMGIMG\w*|<.+>", re.DOTALL)
# The token ids in the module configs of sentence-transformers.
MODULE_IDS = re.compile(r'"(?:keep_only|true|false)_token_ids?": *(?:\[[\d,\s]*\]|\d+)')

Config = PretrainedConfig | GenerationConfig


def holds_token_ids(name: str) -> bool:
    """Return whether a field of this name holds token ids."""
    return bool(TOKEN_IDS.fullmatch(name)) and not OTHER_NUMBERS.fullmatch(name)


def renumber_(config: Config, keep: Sequence[int], size: int, only_shapes: bool = False) -> None:
    """Renumber the token ids in a config after a trim.

    Entries of a `vocabulary_map` or an `id_to_text` whose tokens are removed are removed too.

    Args:
        config: The config of a model, or a generation config.
        keep: The ids of the kept tokens, ascending.
        size: The number of rows of the original vocabulary. Ids outside of it do not change.
        only_shapes: Whether only the sizes of the result matter. Removed tokens then count as the last kept token.

    Raises:
        StructPruneError: If a field names a removed token.
    """
    new_ids = {token_id: index for index, token_id in enumerate(keep)}

    for fields, name in list(_token_fields(config, size)):

        def new_id(token_id: int, name: str = name) -> int:
            if token_id in new_ids:
                return new_ids[token_id]
            if not 0 <= token_id < size:
                return token_id
            if only_shapes:
                return len(keep) - 1
            raise StructPruneError(
                f"`{name}` of the {type(config).__name__} names the token {token_id}, which is not one of the "
                f"{len(keep):,} kept tokens of {size:,}. Keep the token, or remove it from the config."
            )

        value = fields[name]
        if name == "vocabulary_map" and not only_shapes:
            value = {token: number for token, number in value.items() if number in new_ids or number >= size}
        if name == "id_to_text":
            value = {str(new_ids[int(number)]): text for number, text in value.items() if int(number) in new_ids}
        fields[name] = _with_new_ids(name, value, new_id)


def resize_(config: PretrainedConfig, keep: Sequence[int], size: int) -> None:
    """Set the sizes of the vocabulary in a config after a trim.

    Args:
        config: The config of a model.
        keep: The ids of the kept tokens, ascending.
        size: The number of rows of the original vocabulary.
    """
    for fields in list(_sections(config, size)):
        for name, value in list(fields.items()):
            if type(value) is not int:
                continue

            is_size = name.endswith(VOCAB_SIZE) and value == size
            if is_size or name in BOUNDS or OFFSETS.fullmatch(name):
                fields[name] = bisect_left(keep, value)


def named_ids(model: PreTrainedModel) -> set[int]:
    """Return the token ids in the configs of a model, also for generation and of sentence-transformers."""
    size = getattr(model.config.get_text_config(), VOCAB_SIZE, None)
    ids: set[int] = set()

    def note(token: int) -> int:
        ids.add(token)
        return token

    for config in (model.config, getattr(model, "generation_config", None)):
        if config is None:
            continue

        for fields, name in _token_fields(config, size):
            value = fields[name]
            if name == "vocabulary_map":
                value = {token: number for token, number in value.items() if LOOKED_UP.fullmatch(token)}
            _with_new_ids(name, value, note)

    for fields in _sections(model.config, size):
        for name, value in fields.items():
            if OFFSETS.fullmatch(str(name)) and type(value) is int and size is not None:
                ids.update(range(value, size))

    for text in module_files(model.config).values():
        for field in MODULE_IDS.findall(text):
            ids.update(int(number) for number in re.findall(r"\d+", field))

    return ids


def first_position(model: PreTrainedModel) -> int:
    """Return the position of the first token, 0 in most models.

    The position embedding of RoBERTa has a row for the padding token, and the tokens use the rows after that row. In
    such a model the first position is the id of the padding token plus one.
    """
    token_weight = getattr(embedding_of(model), "weight", None)
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    for module in model.modules():
        weight = getattr(module, "weight", None)
        padding_id = getattr(module, "padding_idx", None)
        if weight is None or weight is token_weight or padding_id is None:
            continue
        if len(weight) == num_positions:
            return padding_id + 1

    return 0


def counted_from(model: PreTrainedModel) -> int:
    """Return the id of the padding token if positions are counted from it, or else 0."""
    return max(first_position(model) - 1, 0)


def _sections(config: Config | dict[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    """Yield the fields of a config, and of the configs and mappings inside it that number the same vocabulary."""
    fields = config
    if not isinstance(fields, dict):
        fields = vars(fields)
    yield fields

    for name, value in list(fields.items()):
        if not isinstance(value, (PretrainedConfig, dict)) or name in NAMES_OF_USERS or holds_token_ids(str(name)):
            continue
        if not _has_own_vocabulary(value, size):
            yield from _sections(value, size)


def _has_own_vocabulary(config: PretrainedConfig | dict[str, Any], size: int | None) -> bool:
    """Return whether a config inside a config numbers another vocabulary, which has another size."""
    if isinstance(config, dict):
        sizes = {config.get(VOCAB_SIZE)}
    else:
        parts = (config, getattr(config, "text_config", None))
        sizes = {getattr(part, VOCAB_SIZE, None) for part in parts}

    sizes.discard(None)
    return bool(sizes) and size not in sizes


def _token_fields(config: Config, size: int | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each field that holds token ids, as its name and the mapping that has it."""
    for fields in _sections(config, size):
        for name, value in fields.items():
            if value is not None and holds_token_ids(str(name)):
                yield fields, name


def _with_new_ids(name: str, value: Any, new_id: Callable[[int], int]) -> Any:
    """Return the value of a field with `new_id` applied to every token id in it."""
    if name == "sequence_bias" and isinstance(value, dict):
        return {_mapped(ids, new_id): bias for ids, bias in value.items()}
    if name == "sequence_bias":
        return [[_mapped(ids, new_id), bias] for ids, bias in value]
    if name == "forced_decoder_ids":
        return [[position, _mapped(token, new_id)] for position, token in value]
    return _mapped(value, new_id)


def _mapped(value: Any, new_id: Callable[[int], int]) -> Any:
    """Return a token id, or a sequence or mapping of token ids, with `new_id` applied to each id."""
    if type(value) is int:
        return new_id(value)
    if isinstance(value, dict):
        return {key: _mapped(part, new_id) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, new_id) for part in value)
    return value
