"""Which tokenizer a model reads with, and whether two tokenizers mean the same tokens by the same ids."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Module
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import has_file

from ..errors import StructPruneError, some_of


_READERS: WeakKeyDictionary[Module, PreTrainedTokenizerBase] = WeakKeyDictionary()


def note_reader(model: Module, tokenizer: Any) -> None:
    """Remember the tokenizer of a model in memory; other readers, such as image processors, are not compared."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        _READERS[model] = tokenizer


def reader_of(model: Any, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer noted for a model, or the one where it was loaded from if the number of tokens is the same."""
    name = getattr(model, "name_or_path", None)
    if model in _READERS or not name:
        return _READERS.get(model)
    with suppress(Exception):  # whatever there is in the place of a tokenizer
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        saved = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        sizes = {each.get_text_config().vocab_size for each in (config, model.config)}
        if len(sizes) == 1 and has_files(saved):
            return saved
    return None


def has_files(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer was read from files; where there are none, transformers makes one up for some types."""
    files = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    return any(has_file(tokenizer.name_or_path, file, local_files_only=True) for file in files)


def ids_in(other: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """The id that another tokenizer has for each token of a tokenizer below id `size`; -1 where it has not the token,
    and another one in its place. An id that one of the two has no token for is the same in both.
    """
    names, ids = {number: name for name, number in tokenizer.get_vocab().items()}, other.get_vocab()
    taken = {*ids.values()}
    return [
        ids.get(names[number], -1 if number in taken else number) if number in names else number
        for number in range(size)
    ]


def check_tokens(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that means other tokens by its ids than the model's own, or that the model lacks rows for."""
    known = reader_of(model) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    if known is None or known is tokenizer:
        return
    rows = model.config.get_text_config().vocab_size
    beyond = {number for number in tokenizer.get_vocab().values() if number >= rows} - {*known.get_vocab().values()}
    others = [number for number, same in enumerate(ids_in(known, tokenizer, rows)) if number != same]
    if wrong := [*others, *sorted(beyond)]:
        raise StructPruneError(
            f"The tokenizer, of {len(tokenizer):,} tokens, is not that of this {type(model).__name__}, which has "
            f"{len(known):,} tokens and {rows:,} rows: {some_of(tokenizer.convert_ids_to_tokens(wrong))} are others "
            "there. Pass the model's own (after a pruning, pruner.tokenizer); if it was trained with this one, save "
            "both to one folder and load them."
        )
