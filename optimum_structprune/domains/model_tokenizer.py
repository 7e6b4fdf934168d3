"""The tokenizer that reads text for a model, and the comparison of two tokenizers by their ids."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import has_file

from ..errors import StructPruneError, some_of
from .manifest import TextRecord


def tokenizer_of(model: Any, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Gives the tokenizer of a model in memory, or else that of its folder for the same number of tokens."""
    name = getattr(model, "name_or_path", None)
    if (carried := TextRecord.of(model).tokenizer) is not None or not name:
        return carried
    with suppress(Exception):  # whatever there is in the place of a tokenizer
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        saved = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        sizes = {each.get_text_config().vocab_size for each in (config, model.config)}
        if len(sizes) == 1 and has_files(saved):
            return saved
    return None


def has_files(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells if a tokenizer was read from files. For lack of them, transformers makes one up for some types."""
    files = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    return any(has_file(tokenizer.name_or_path, file, local_files_only=True) for file in files)


def ids_in(other: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Maps the ids of `tokenizer` below `size` to ids of another tokenizer.

    It is -1 for a token that the other one lacks. An id that neither has a token for is the same in both.
    """
    names, ids = {number: name for name, number in tokenizer.get_vocab().items()}, other.get_vocab()
    taken = {*ids.values()}
    return [
        ids.get(names[number], -1 if number in taken else number) if number in names else number
        for number in range(size)
    ]


def check_tokens(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids are other tokens than the model's own, or have no row in the model."""
    known = tokenizer_of(model) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    if known is None or known is tokenizer:
        return
    rows = model.config.get_text_config().vocab_size
    beyond = {number for number in tokenizer.get_vocab().values() if number >= rows} - {*known.get_vocab().values()}
    others = [number for number, same in enumerate(ids_in(known, tokenizer, rows)) if number != same]
    if wrong := [*others, *sorted(beyond)]:
        advice = (
            "Pass the model's own (after a pruning, pruner.tokenizer); if it was trained with this one, save both to "
            "one folder and load them."
        )
        if not others:
            advice = "The model has no rows for these; model.resize_token_embeddings(len(tokenizer)) adds them."
        raise StructPruneError(
            f"The tokenizer, of {len(tokenizer):,} tokens, is not that of this {type(model).__name__}, which has "
            f"{len(known):,} tokens and {rows:,} rows: {some_of(tokenizer.convert_ids_to_tokens(wrong))} are others "
            f"there. {advice}"
        )
