"""The vocabulary of a GGUF file: what llama.cpp needs to cut text into the tokens that the model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter
from transformers import PreTrainedTokenizerBase

from ..arch.llama_cpp import PRE_TOKENIZERS
from ..errors import StructPruneError


SPACE = "\u2581"  # how SentencePiece writes a space
LEAST = -1e6  # the score of what no merge makes
# The special tokens of a language model, under gguf's names for them.
SPECIAL = ("bos", "eos", "unk", "sep", "pad")
# What tokenizers calls the steps before the merges, in the words of `PRE_TOKENIZERS`, and the field that tells more.
STEPS = {"Digits": ("digits", "individual_digits"), "ByteLevel": ("bytes", "use_regex"), "Split": ("split", "pattern")}


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a tokenizer into a GGUF file."""
    if not tokenizer.is_fast:
        raise StructPruneError(
            f"A GGUF file holds a BPE tokenizer of the tokenizers library, found a {type(tokenizer).__name__}."
        )
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_vocabulary(parts, len(tokenizer), size)
    from gguf import BpeVocab, LlamaHfVocab

    pieces = parts["model"].get("byte_fallback", False)
    writer.add_tokenizer_model((LlamaHfVocab if pieces else BpeVocab).tokenizer_model)
    writer.add_tokenizer_pre("default" if pieces else pre_tokenizer(parts))
    names, types = _tokens(tokenizer, size)
    writer.add_token_list(names)
    if pieces:
        writer.add_token_scores(_scores(parts["model"], names))
    writer.add_token_types(types)
    if pieces:
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(SPACE))
    else:
        writer.add_token_merges([" ".join(pair) for pair in _merges(parts["model"])])
    _add_special(writer, tokenizer)


def _check_vocabulary(parts: Mapping[str, Any], tokens: int, size: int) -> None:
    """Refuse a tokenizer that llama.cpp does not have."""
    if parts["model"]["type"] != "BPE":
        raise StructPruneError(
            "A GGUF file holds a BPE tokenizer, on bytes or on SentencePiece's pieces, found "
            f"{parts['model']['type']}."
        )
    if tokens > size:
        raise StructPruneError(
            f"The tokenizer has {tokens:,} tokens and the model's embedding {size:,} rows, and a GGUF file has one "
            "for each; the two have to be of the same model."
        )
    if not parts["model"].get("byte_fallback", False):
        pre_tokenizer(parts)


def pre_tokenizer(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for what a byte-level tokenizer does before its merges.

    llama.cpp's own converter knows a tokenizer by a hash of what it makes of one text, which a new vocabulary changes.
    This compares the steps themselves.
    """
    step: Mapping[str, Any] = parts.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    kinds = tuple(_kind(step) for step in steps)
    key: Any = (*kinds, bool(parts["model"].get("ignore_merges")))
    normalizer = (parts.get("normalizer") or {}).get("type")
    # llama.cpp does not normalise what it reads. In NFC, as Qwen's tokenizers want it, nearly all text is already.
    if key not in PRE_TOKENIZERS or normalizer not in (None, "NFC"):
        raise StructPruneError(
            "llama.cpp would cut text in another way than this tokenizer, whose steps before its merges are "
            f"{[*filter(None, (normalizer, *(step.get('type') for step in steps)))]}; structprune knows those of "
            f"{', '.join(PRE_TOKENIZERS.values())}."
        )
    return PRE_TOKENIZERS[key]


def _kind(step: Mapping[str, Any]) -> tuple[Any, Any]:
    """A step before the merges as `PRE_TOKENIZERS` writes it; what it writes in no way becomes a pair of None."""
    kind, field = STEPS.get(step.get("type", ""), (None, ""))
    value = step.get(field)
    if kind is None or step.get("add_prefix_space") or step.get("invert"):
        return (None, None)
    return kind, value.get("Regex") if isinstance(value, dict) else value


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each token."""
    from gguf import TokenType

    names = {number: name for name, number in tokenizer.get_vocab().items()}
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    texts: list[str] = []
    types: list[int] = []
    for number in range(size):
        text, kind = names.get(number, f"[PAD{number}]"), TokenType.NORMAL
        if number not in names:
            kind = TokenType.UNUSED
        elif number in special or (number in added and (added[number].special or _looks_special(text))):
            kind = TokenType.CONTROL
        elif number in added:
            text, kind = text.replace(SPACE, " "), TokenType.USER_DEFINED
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = TokenType.BYTE
        texts.append(text)
        types.append(kind)
    return texts, types


def _looks_special(text: str) -> bool:
    """Whether a token that is not marked as special is one nevertheless, as in the vocabularies of several models."""
    return text in ("<pad>", "<mask>") or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _scores(model: Mapping[str, Any], names: list[str]) -> list[float]:
    """What llama.cpp goes by where it puts pieces together: it takes the pair whose whole scores highest.

    That is the order of the merges, so a piece scores minus the number of the first merge that makes it.
    """
    rank: dict[str, int] = {}
    for number, pair in enumerate(_merges(model)):
        rank.setdefault("".join(pair), number)
    return [-float(rank[name]) if name in rank else LEAST for name in names]


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write which tokens have a meaning of their own, which are put around a text, and the chat template."""
    for name in SPECIAL:
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
