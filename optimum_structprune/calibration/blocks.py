"""Packing: documents to token blocks of equal length, some of them held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import StructPruneConfig
from ..errors import StructPruneError
from .sources import documents


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 32


@dataclass(frozen=True)
class Domain:
    """A calibration stream, packed: equal-length token blocks, and others from other documents for perplexity.

    Attributes:
        name: What the report calls it.
        weight: Share of the calibration that was asked for; the weights of all domains sum to 1.
        blocks: For calibration, shape `(num_blocks, seq_length)`, int64.
        heldout: For perplexity, shape `(num_heldout, seq_length)`, int64.
    """

    name: str
    weight: float
    blocks: Tensor
    heldout: Tensor


@dataclass(frozen=True)
class _Frame:
    """What a block holds apart from text, and how many blocks are held out."""

    seq_length: int
    prefix: int | None
    eos: int | None
    holdout: float
    num_heldout: int | None

    @property
    def body(self) -> int:
        """Tokens of text per block."""
        return self.seq_length - (self.prefix is not None)

    def needs(self, count: int) -> list[int]:
        """Tokens of text for the held-out blocks and for `count` others."""
        heldout = self.num_heldout or num_heldout(count, self.holdout)
        return [self.body * heldout, self.body * count]

    def pack(self, tokens: list[int]) -> Tensor:
        """Blocks of `seq_length` out of a whole number of bodies."""
        return pack(tokens, self.body, self.prefix)


def load_domains(
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None = None,
    heldout_blocks: int | None = None,
) -> list[Domain]:
    """Read, tokenise and pack the domains of a config.

    Args:
        config: Names the domains, and says how many blocks of what length.
        tokenizer: The model's own.
        vocab_size: Size of the model's vocabulary, which every token has to lie in.
        heldout_blocks: Held-out blocks per domain, in place of the share that the config says.

    Raises:
        StructPruneError: If there is no tokenizer or one of another model, a domain gives too little text, or there
            are fewer samples than domains.
    """
    if tokenizer is None:
        raise StructPruneError("The domains are text, and reading them takes a tokenizer; pass the model's own.")
    prefix, eos = prefix_token(tokenizer), tokenizer.eos_token_id
    frame = _Frame(config.seq_length, prefix, eos, float(config.holdout), heldout_blocks)
    if frame.body < 1:
        raise StructPruneError(
            f"seq_length={config.seq_length} has no room for text after the prefix; 2 is the least."
        )
    counts = split_samples(config.num_samples, [domain.weight for domain in config.domains])
    total = sum(domain.weight for domain in config.domains)
    loaded = []
    for index, domain in enumerate(config.domains):
        texts = documents(domain, config.seed)
        heldout, blocks = _pack(config, index, counts[index], frame, _tokenised(texts, tokenizer))
        check_vocabulary(max(heldout.max(), blocks.max()), vocab_size)
        loaded.append(Domain(domain.name, domain.weight / total, blocks, heldout))
    return loaded


def pack(tokens: Sequence[int], body: int, prefix: int | None) -> Tensor:
    """Cut a whole number of `body` tokens into blocks, each with the prefix at its head if there is one."""
    blocks = torch.tensor(tokens).view(-1, body)
    if prefix is None:
        return blocks
    return torch.cat([torch.full((len(blocks), 1), prefix), blocks], dim=1)


def check_vocabulary(largest: Tensor, vocab_size: int | None) -> None:
    """Refuse token ids that a model does not have.

    Raises:
        StructPruneError: If the largest id lies outside of the vocabulary, where its size is known.
    """
    if vocab_size is not None and int(largest) >= vocab_size:
        raise StructPruneError(
            f"The tokenizer does not belong to this model: token id {int(largest)}, vocabulary {vocab_size}."
        )


def given_domains(inputs: Mapping[str, Tensor], holdout: float) -> list[Domain]:
    """Domains out of inputs that are ready for the model, in equal shares.

    Args:
        inputs: By name, shape `(samples, ...)`.
        holdout: Share of each that is set aside.

    Raises:
        StructPruneError: If there are no inputs, or too few to set some aside.
    """
    if not inputs:
        raise StructPruneError("inputs has to name at least one domain, got {}.")
    domains = []
    for name, samples in inputs.items():
        aside = num_heldout(len(samples), holdout)
        if len(samples) <= aside:
            raise StructPruneError(
                f"inputs[{name!r}] has {len(samples)} samples, of which {aside} are held out; "
                f"{aside + 1} is the least."
            )
        domains.append(Domain(name, 1 / len(inputs), samples[aside:], samples[:aside]))
    return domains


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands at the head of a text: the tokenizer's own prefix, else its BOS, else its EOS token."""
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if whole[:1] != plain[:1]:
        return whole[0]
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def split_samples(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Divide samples in proportion to weights: whole numbers by largest remainder, and at least 1 each.

    Raises:
        StructPruneError: If there are fewer samples than weights.
    """
    if num_samples < len(weights):
        raise StructPruneError(
            f"num_samples={num_samples} does not give each of the {len(weights)} domains a sample; "
            f"{len(weights)} is the least."
        )
    total = sum(weights)
    quotas = [num_samples * weight / total for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: num_samples - sum(counts)]:
        counts[i] += 1
    while 0 in counts:
        donors = (i for i, count in enumerate(counts) if count > 1)
        counts[max(donors, key=lambda i: counts[i] - quotas[i])] -= 1
        counts[counts.index(0)] = 1
    return counts


def num_heldout(num_blocks: int, holdout: float) -> int:
    """Number of held-out blocks beside `num_blocks` for calibration; 2 at least."""
    return max(2, round(holdout * num_blocks))


def _tokenised(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    while batch := list(islice(texts, DOCUMENTS_PER_CALL)):
        yield from filter(None, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])


def _pack(
    config: StructPruneConfig, index: int, count: int, frame: _Frame, tokenised: Iterator[list[int]]
) -> tuple[Tensor, Tensor]:
    # Held-out blocks come first, so that they are the same text however much calibration follows.
    lengths: list[int] = []
    needs = frame.needs(count)
    heldout, blocks = (_take(tokenised, need, frame.eos, lengths) for need in needs)
    if len(blocks) < needs[1]:
        raise StructPruneError(_too_little(config, index, frame, lengths, sum(needs)))
    return frame.pack(heldout), frame.pack(blocks)


def _take(tokenised: Iterator[list[int]], need: int, eos: int | None, lengths: list[int]) -> list[int]:
    # Whole documents: what is left of the last one is dropped, so that no document serves twice.
    tokens: list[int] = []
    while len(tokens) < need and (document := next(tokenised, None)) is not None:
        if tokens and eos is not None:
            tokens.append(eos)
        tokens += document
        lengths.append(len(document))
    return tokens[:need]


def _too_little(config: StructPruneConfig, index: int, frame: _Frame, lengths: list[int], need: int) -> str:
    domain = config.domains[index]
    if not lengths:
        spent = "; a generator gives its text only once" if isinstance(domain.source, Iterator) else ""
        return f"The domain {domain.name!r} is empty{spent}."
    weights = [domain.weight for domain in config.domains]
    for fewer in range(config.num_samples - 1, len(weights) - 1, -1):
        count = split_samples(fewer, weights)[index]
        if _suffice(lengths, frame.needs(count), frame.eos):
            advice = f"num_samples={fewer} would do."
            break
    else:
        advice = "Give it more documents, or choose a smaller seq_length."
    return (
        f"The domain {domain.name!r} has {sum(lengths)} tokens in {len(lengths)} documents, but calibration and "
        f"held-out blocks take {need}, and a document serves only one of the two. {advice}"
    )


def _suffice(lengths: list[int], needs: list[int], eos: int | None) -> bool:
    left = iter(lengths)
    for need in needs:
        have = 0
        while have < need:
            length = next(left, None)
            if length is None:
                return False
            have += length + (have > 0 and eos is not None)
    return True
