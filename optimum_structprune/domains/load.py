"""The domains of a config, and their token samples of equal length, some of them held out."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import is_offloaded, is_quantized, predicts_next
from ..config.domains import ANY, BUILTIN, GENERAL, SELF, DomainConfig, Reiterable, is_general, written_by_model
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..forward.metrics import MANY_DOCUMENTS, MEASURED_TOKENS
from .manifest import Manifest
from .packing import HELDOUT, PROBE, USED, DocumentPool, Domain, SampleFormat, Tokens, check_vocabulary, tokenised
from .sources import documents, resolve


WRITTEN = SELF + ANY
BEGINNING = 64  # tokens of each document that is held out beyond need
logger = logging.getLogger(__name__)


def calibration_domains(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    writes: bool = True,
    earlier: Manifest | None = None,
) -> tuple[StructPruneConfig, list[Domain]]:
    """Load the domains of a config and general text that the model writes; the new config names this text."""
    written = with_written_text(config) if can_write(model, tokenizer) else config
    seen = earlier or Manifest.seen_by(model)
    load = partial(load_domains, tokenizer=tokenizer, model=model, seen=seen, writes=writes)
    try:
        return written, load(written)
    except StructPruneError as error:
        if written is config:
            raise
        # Some models write nothing that is of use. A mistake in the domains themselves is found again.
        domains = load(config)
        logger.warning("No text of every kind is written: %s", error)
        return config, domains


def load_domains(
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | None = None,
    heldout_samples: int | None = None,
    seen: Manifest | None = None,
    writer: PreTrainedTokenizerBase | None = None,
    writes: bool = True,
) -> list[Domain]:
    """Reads, tokenises and packs the domains of a config; `heldout_samples` of each are held out.

    Documents of the text `seen` by an earlier run keep their use. The model writes domains of its own text, with the
    tokenizer `writer` if that is another one; such domains are left out unless it `writes`.
    """
    if tokenizer is None:
        raise StructPruneError("The domains are text, and reading them takes a tokenizer; pass the model's own.")
    frame, domains = SampleFormat.of(tokenizer, config.seq_length), resolve(texts_of(config))
    uses = {} if seen is None else seen.uses()
    if config.allocation == "uniform":  # what choices were made on may be trained on, but tells nothing new
        uses = {name: USED if use == PROBE else use for name, use in uses.items()}
    vocab_size = None if model is None else model.config.get_text_config().vocab_size
    packer = _Packer(config, domains, frame, heldout_samples, uses, vocab_size)
    write = None
    if model is not None and writes and any(map(written_by_model, domains)):
        from .generated import self_documents

        write = partial(self_documents, model, writer or tokenizer)
    loaded: dict[int, Domain] = {}
    for written in (False, True)[: 1 + writes]:  # a model takes long to write, so what can fail before comes first
        pools = {}
        for index, domain in enumerate(domains):
            if written_by_model(domain) == written:
                write_all = partial(write, tokens=packer.tokens(index)) if write else None
                texts = documents(domain, config.seed, tokenizer, write_all)
                pools[index] = DocumentPool(tokenised(texts, tokenizer, 1 if written else 32))
        loaded |= packer.load(pools)
    return [loaded[index] for index in sorted(loaded)]


def given_domains(inputs: Mapping[str, Tensor], holdout: float, probe: bool = False) -> list[Domain]:
    """Makes domains of inputs that are ready for the model, each `(samples, ...)`, in equal shares."""
    domains = []
    for name, samples in inputs.items():
        aside = num_heldout(len(samples), holdout)
        used = 2 * aside if probe else aside
        if len(samples) <= used:
            raise StructPruneError(
                f"inputs[{name!r}] has {len(samples)} samples, of which {used} are held out; {used + 1} is the least."
            )
        probed = samples[aside:used] if probe else None
        domains.append(Domain(name, 1 / len(inputs), samples[used:], samples[:aside], probe=probed))
    return domains


def num_heldout(num_samples: int, holdout: float) -> int:
    """Counts the samples to hold out beside `num_samples`: their share `holdout`, and 2 at least."""
    return max(2, round(holdout * num_samples))


@dataclass(frozen=True)
class _Packer:
    """Divides the text of each domain into held-out and calibration samples."""

    config: StructPruneConfig
    domains: Sequence[DomainConfig]
    frame: SampleFormat
    num_heldout: int | None
    uses: dict[str, str]
    vocab_size: int | None

    def load(self, pools: Mapping[int, DocumentPool]) -> dict[int, Domain]:
        """Divide the text of domains, so that none uses held-out text of another one."""
        before = dict(self.uses)
        texts = self._divided(pools, self.config.num_samples, self.uses)
        for index in pools:
            if not self._suffices(texts[index], self.config.num_samples, index):
                raise StructPruneError(self._too_little(index, pools, before))
        return {index: self._packed(index, texts[index]) for index in pools}

    def _divided(
        self, pools: Mapping[int, DocumentPool], num_samples: int, uses: dict[str, str]
    ) -> dict[int, list[list[Tokens]]]:
        needs = {index: self._needs(num_samples, index) for index in pools}
        texts: dict[int, list[list[Tokens]]] = {index: [] for index in pools}
        # Beyond need, the beginnings of many documents are held out: the margin of error is one over documents.
        steps = (HELDOUT, None), (USED, None), (PROBE, None), (HELDOUT, BEGINNING)
        for step, (use, longest) in enumerate(steps):
            for index, pool in pools.items():
                texts[index].append(pool.take(self.frame, needs[index][step], use, uses, longest))
        return texts

    def _packed(self, index: int, texts: Sequence[Sequence[Tokens]]) -> Domain:
        domain, needs = self.domains[index], self._needs(self.config.num_samples, index)
        parts = [self.frame.pack(text, need // self.frame.body) for text, need in zip(texts, needs, strict=True)]
        check_vocabulary(int(torch.cat([samples for samples, _ in parts]).max()), self.vocab_size)
        (heldout, aside), (samples, documents), (probe, probed), (more, also_aside) = parts
        return Domain(
            name=domain.name,
            weight=domain.weight / sum(domain.weight for domain in self.domains),
            samples=samples,
            heldout=torch.cat([heldout, more]),
            origin=domain,
            documents=documents,
            heldout_documents=aside + also_aside,
            probe=None if self.config.allocation == "uniform" else probe,
            probe_documents=probed,
        )

    def tokens(self, index: int) -> int:
        """Counts the tokens of a domain that a run cannot do without."""
        return sum(self._needs(self.config.num_samples, index)[:3])

    def _needs(self, num_samples: int, index: int) -> tuple[int, ...]:
        """Counts the tokens of a domain, each taken in this order, so that it is the same text in all runs: held out,
        calibrated on, probed, and more held out, as far as there is text.
        """
        count = split_samples(num_samples, [domain.weight for domain in self.domains])[index]
        aside = self.num_heldout or num_heldout(count, self.config.holdout)
        enough = min(ceil(MEASURED_TOKENS / self.frame.body), count // 2)
        many = min(ceil(MANY_DOCUMENTS * BEGINNING / self.frame.body), count)
        probe = 0 if self.config.allocation == "uniform" else aside
        more = 0 if written_by_model(self.domains[index]) else max(many, enough - aside)
        return tuple(self.frame.body * number for number in (aside, count, probe, more))

    def _suffices(self, texts: Sequence[Sequence[Tokens]], num_samples: int, index: int) -> bool:
        needs = self._needs(num_samples, index)[:3]
        if self.num_heldout is not None:  # an earlier run may have used the rest
            needs = (self.frame.body, *needs[1:])
        return all(self.frame.length(text) >= need for text, need in zip(texts, needs, strict=False))

    def _too_little(self, index: int, pools: Mapping[int, DocumentPool], before: Mapping[str, str]) -> str:
        domain, config, texts = self.domains[index], self.config, pools[index].read
        if not texts:
            spent = "; a generator gives its text only once" if isinstance(domain.source, Reiterable) else ""
            return f"The domain {domain.name!r} is empty{spent}."

        def suffices(few: int) -> bool:
            again = {number: DocumentPool(pool.read) for number, pool in pools.items()}
            return self._suffices(self._divided(again, few, dict(before))[index], few, index)

        advice = "Give it more documents, or choose a smaller seq_length."
        numbers = range(len(self.domains), config.num_samples)
        # The text suffices for the first so many of these numbers of samples.
        if enough := bisect_left(numbers, True, key=lambda few: not suffices(few)):
            few = numbers[enough - 1]
            advice = f"num_samples={few} would do, in a recovery tokens={few * config.seq_length}."
        tokens, need = sum(len(text.ids) for text in texts), self.tokens(index)
        kinds = len({text.hash for text in texts})
        differ = f", of which {kinds} differ" if kinds < len(texts) else ""
        return (
            f"The domain {domain.name!r} has {tokens} tokens in {len(texts)} documents{differ}, but calibration and "
            f"held-out samples take {need}, and a document serves only one of the two. {advice}"
        )


def can_write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tells if a model can write text: it is causal, and its weights are in memory and not quantized."""
    in_memory = tokenizer is not None and not is_offloaded(model) and not is_quantized(model)
    return in_memory and predicts_next(model)


def builtin_domains() -> list[DomainConfig]:
    """Gives the domains where none are named, in equal shares; they need no download."""
    return [DomainConfig(name=name, source=f"{BUILTIN}{name}") for name in ("prose", "code", "math")]


def texts_of(config: StructPruneConfig) -> list[DomainConfig]:
    """Gives the domains of a config, or the built-in ones, and the general text where it has a share."""
    domains = builtin_domains() if config.domains is None else config.domains
    share = config.general_share
    if share is None:
        share = 0.5 if config.domains is None else 0.2 if config.general_text is not None else 0.0
    if share == 0:
        return domains
    weight = share / (1 - share) * sum(domain.weight for domain in domains)
    source = config.general_text or builtin_beside(domains, bool(config.removes_tokens))
    return [*domains, DomainConfig(name=GENERAL, source=source, weight=weight)]


def with_written_text(config: StructPruneConfig) -> StructPruneConfig:
    """Adds general text where a config says nothing of it: the model's own, or built-in where tokens go."""
    domains = config.domains or []
    placed = 0 < len(domains) < config.num_samples and not any(map(is_general, domains))
    if not placed or config.general_text is not None or config.general_share == 0:
        return config
    return replace(config, general_text=builtin_beside(domains, True) if config.removes_tokens else WRITTEN)


def builtin_beside(domains: list[DomainConfig], trims: bool = False) -> str:
    """Names built-in text of all kinds but those of the domains, and without languages where it `trims`."""
    sources = [domain.source for domain in domains if isinstance(domain.source, str)]
    named = [source.removeprefix(BUILTIN) for source in sources if source.startswith(BUILTIN)]
    return BUILTIN + "-".join([GENERAL, *(kind for name in named for kind in name.split("+")), *["languages"] * trims])


def split_samples(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Divide samples in proportion to weights: whole numbers by largest remainder, and at least 1 each."""
    if num_samples < (least := len(weights)):
        raise StructPruneError(
            f"num_samples={num_samples} does not give each of the {least} domains a sample; {least} is the least."
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
