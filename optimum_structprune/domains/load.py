"""The domains of a config, as token samples of equal length, some of them held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.domains import DomainConfig, written_by_model
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from .generated import self_documents
from .packing import DOCUMENTS_PER_CALL, Frame, Packed, Tokens, prefix_token, tokenised
from .presets import resolve
from .reweight import MOST
from .select import Selector
from .sources import documents


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Domain:
    """A calibration stream, packed: equal-length token samples, and others from other documents for perplexity.

    Attributes:
        name: What the report calls it.
        weight: Share of the calibration that was asked for; the weights of all domains sum to 1.
        samples: For calibration, shape `(num_samples, seq_length)`, int64.
        heldout: For perplexity, shape `(num_heldout, seq_length)`, int64.
        mask: Tokens of `samples` that give evidence, of the same shape; None for all.
        origin: Where the text came from, presets resolved; None for inputs that were given.
        documents: Hashes of the documents in `samples` and `spare`.
        heldout_documents: Hashes of the documents in `heldout`.
        spare: Further samples, for rounds in which the domain counts more than was asked for.
    """

    name: str
    weight: float
    samples: Tensor
    heldout: Tensor
    mask: Tensor | None = None
    origin: DomainConfig | None = None
    documents: tuple[str, ...] = ()
    heldout_documents: tuple[str, ...] = ()
    spare: Packed | None = None

    @property
    def pool(self) -> Tensor:
        """All samples that a round may use, shape `(num_samples, seq_length)`."""
        return self.samples if self.spare is None else torch.cat([self.samples, self.spare.samples])

    def portion(self, count: int) -> Domain:
        """The same domain with another number of samples, as far as there is text."""
        mask = self.mask
        if self.spare is not None and mask is not None and self.spare.mask is not None:
            mask = torch.cat([mask, self.spare.mask])
        return replace(self, samples=self.pool[:count], mask=None if mask is None else mask[:count])


def load_domains(
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None = None,
    heldout_samples: int | None = None,
    model: PreTrainedModel | None = None,
) -> list[Domain]:
    """Read, tokenise and pack the domains of a config.

    Args:
        config: Names the domains, and says how many samples of what length.
        tokenizer: The model's own.
        vocab_size: Size of the model's vocabulary, which every token has to lie in.
        heldout_samples: Held-out samples per domain, in place of the share that the config says.
        model: Writes the domains `self:NAME`, and sees the pool that `config.select` chooses from.

    Raises:
        StructPruneError: If there is no tokenizer or one of another model, a domain gives too little text, or there
            are fewer samples than domains.
    """
    if tokenizer is None:
        raise StructPruneError("The domains are text, and reading them takes a tokenizer; pass the model's own.")
    frame = Frame(config.seq_length, prefix_token(tokenizer), tokenizer.eos_token_id)
    if frame.body < 1:
        raise StructPruneError(
            f"seq_length={config.seq_length} has no room for text after the prefix; 2 is the least."
        )
    domains = resolve(config.domains, config.presets_file)
    packer = _Packer(config, domains, frame, heldout_samples, Selector(config, model))
    write = partial(self_documents, model, tokenizer, config.self_text) if model is not None else None
    total = sum(domain.weight for domain in domains)
    loaded = []
    for index, domain in enumerate(domains):
        texts = documents(domain, config.seed, tokenizer, write)
        # What a model writes itself is too dear to be read ahead of need.
        at_once = 1 if written_by_model(domain) else DOCUMENTS_PER_CALL
        stream = tokenised(texts, tokenizer, domain.answers_only, at_once)
        heldout, packed = packer.pack(index, stream)
        spare = None if written_by_model(domain) else packer.spare(index, stream)
        _check_tokens(domain, heldout, packed, spare, vocab_size)
        loaded.append(
            Domain(
                domain.name,
                domain.weight / total,
                packed.samples,
                heldout.samples,
                packed.mask,
                domain,
                packed.hashes + (() if spare is None else spare.hashes),
                heldout.hashes,
                spare,
            )
        )
    return loaded


def calibration_domains(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Mapping[str, Tensor] | None = None,
) -> list[Domain]:
    """The text that a config names, or inputs in its place; see `load_domains` and `given_domains`."""
    if inputs is not None:
        return given_domains(inputs, float(config.holdout))
    return load_domains(config, tokenizer, model.config.get_text_config().vocab_size, model=model)


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


def num_heldout(num_samples: int, holdout: float) -> int:
    """Number of held-out samples beside `num_samples` for calibration; 2 at least."""
    return max(2, round(holdout * num_samples))


def check_vocabulary(largest: int, vocab_size: int | None) -> None:
    """Refuse token ids that a model does not have.

    Raises:
        StructPruneError: If the largest id lies outside of the vocabulary, where its size is known.
    """
    if vocab_size is not None and largest >= vocab_size:
        raise StructPruneError(
            f"The tokenizer does not belong to this model: token id {largest}, vocabulary {vocab_size}."
        )


def _check_tokens(
    domain: DomainConfig, heldout: Packed, packed: Packed, spare: Packed | None, vocab_size: int | None
) -> None:
    parts = [heldout, packed, *([] if spare is None else [spare])]
    check_vocabulary(max(int(part.samples.max()) for part in parts), vocab_size)
    if packed.mask is not None and not packed.mask.any():
        raise StructPruneError(
            f"The domain {domain.name!r} has answers_only, but its {len(packed.hashes)} documents hold no answer."
        )


@dataclass(frozen=True)
class _Packer:
    """Divides the text of each domain into held-out and calibration samples."""

    config: StructPruneConfig
    domains: Sequence[DomainConfig]
    frame: Frame
    num_heldout: int | None
    selector: Selector

    def pack(self, index: int, stream: Iterator[Tokens]) -> tuple[Packed, Packed]:
        # Held-out samples come first, so that they are the same text however much calibration follows.
        count = self._counts(self.config.num_samples)[index]
        aside, need = self._needs(count)
        heldout = self.frame.take(stream, aside)
        pool = self.frame.take(stream, need * self.selector.factor)
        if self.frame.length(pool) < need:
            raise StructPruneError(self._too_little(index, [*heldout, *pool]))
        samples = self.selector.pack(self.frame, pool, count)
        return self.frame.pack(heldout, aside // self.frame.body), samples

    def spare(self, index: int, stream: Iterator[Tokens]) -> Packed | None:
        """Further samples, as far as the text goes: as many as the domain may come to count more."""
        config = self.config
        if not config.reweights:
            return None
        count = self._counts(config.num_samples)[index]
        more = min(round(MOST[config.objective] * count), config.num_samples) - count
        packed = self.frame.pack(self.frame.take(stream, self.frame.body * more), more)
        return packed if len(packed.samples) else None

    def _counts(self, num_samples: int) -> list[int]:
        return split_samples(num_samples, [domain.weight for domain in self.domains])

    def _needs(self, count: int) -> tuple[int, int]:
        aside = self.num_heldout or num_heldout(count, float(self.config.holdout))
        return self.frame.body * aside, self.frame.body * count

    def _too_little(self, index: int, found: Sequence[Tokens]) -> str:
        domain, config = self.domains[index], self.config
        if not found:
            spent = "; a generator gives its text only once" if isinstance(domain.source, Iterator) else ""
            return f"The domain {domain.name!r} is empty{spent}."
        advice = "Give it more documents, or choose a smaller seq_length."
        for fewer in range(config.num_samples - 1, len(self.domains) - 1, -1):
            if self._suffices(found, self._counts(fewer)[index]):
                advice = f"num_samples={fewer} would do."
                break
        tokens, need = (
            sum(len(document.ids) for document in found),
            sum(self._needs(self._counts(config.num_samples)[index])),
        )
        return (
            f"The domain {domain.name!r} has {tokens} tokens in {len(found)} documents, but calibration and "
            f"held-out samples take {need}, and a document serves only one of the two. {advice}"
        )

    def _suffices(self, found: Sequence[Tokens], count: int) -> bool:
        left = iter(found)
        return all(self.frame.length(self.frame.take(left, need)) >= need for need in self._needs(count))
