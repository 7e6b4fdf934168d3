"""Held-out text: a source in its own order, cut into blocks, for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import StructPruneError
from ..schema import DomainConfig
from .blocks import check_vocabulary, pack, prefix_token
from .sources import documents, endless


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Heldout:
    """The first blocks of a domain.

    Attributes:
        name: Of the domain.
        source: Where it was read from.
        blocks: Token ids, shape `(num_blocks, seq_length)`, int64.
        documents: SHA-256 of each text that the blocks were cut from.
    """

    name: str
    source: str
    blocks: Tensor
    documents: tuple[str, ...]


def read_heldout(
    domain: DomainConfig,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    num_blocks: int | None = None,
    vocab_size: int | None = None,
) -> Heldout:
    """Read a domain in the order in which its source gives it: the same text for every model with this tokenizer.

    Documents follow each other with an EOS token between them, and are cut into blocks that each begin with the prefix
    token of `prefix_token`. What does not fill the last block is left out.

    Args:
        domain: Names the source; its weight plays no part.
        tokenizer: The model's own.
        seq_length: Tokens per block, the prefix among them.
        num_blocks: Blocks to read at most; None reads everything.
        vocab_size: Size of the model's vocabulary, which every token has to lie in.

    Raises:
        StructPruneError: If the text does not fill one block, has no known end while `num_blocks` is None, or belongs
            to another vocabulary.
    """
    if num_blocks is None and endless(domain):
        raise StructPruneError(
            f"The domain {domain.name!r} ({domain.source}) has no known end; say how many blocks to read (num_blocks)."
        )
    prefix, eos = prefix_token(tokenizer), tokenizer.eos_token_id
    body = seq_length - (prefix is not None)
    if body < 1 or seq_length < 2:
        raise StructPruneError(f"seq_length={seq_length} leaves nothing to predict; 2 is the least.")
    tokens: list[int] = []
    hashes: list[str] = []
    for text in documents(domain, seed=None):
        if tokens and eos is not None:
            tokens.append(eos)
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        hashes.append(sha256(text.encode()).hexdigest())
        if num_blocks is not None and len(tokens) >= num_blocks * body:
            break
    count = min(len(tokens) // body, num_blocks or len(tokens))
    if count < 1:
        raise StructPruneError(
            f"The domain {domain.name!r} has {len(tokens)} tokens, and a block takes {body}; "
            f"choose a smaller seq_length."
        )
    blocks = pack(tokens[: count * body], body, prefix)
    check_vocabulary(blocks.max(), vocab_size)
    return Heldout(domain.name, str(domain.to_dict()["source"]), blocks, tuple(hashes))
