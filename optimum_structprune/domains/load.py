"""Load the domains of a config, and divide their token samples into calibration and held-out samples."""

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
from ..config.domains import ANY, BUILTIN, GENERAL, WRITTEN, DomainConfig, Reiterable, is_general, written_by_model
from ..config.pruning import StructPruneConfig
from ..system.errors import StructPruneError, capitalized, warn
from ..system.margins import MANY_DOCUMENTS
from .manifest import Manifest
from .packing import HELDOUT, PROBE, USED, DocumentPool, Domain, SampleFormat, Tokens, check_vocabulary, tokenised
from .sources import documents, resolve


# The number of tokens that measure the perplexity of a run, over all domains.
MEASURED_TOKENS = 4000
# Documents that are held out in addition to the required tokens are cut to this number of tokens.
BEGINNING = 64
logger = logging.getLogger(__name__)


def calibration_domains(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    writes: bool = True,
    earlier: Manifest | None = None,
) -> tuple[StructPruneConfig, list[Domain]]:
    """Load the domains of a config, and general text that the model writes.

    Args:
        config: The config.
        model: The original model.
        tokenizer: The tokenizer of the original model.
        writes: Whether to generate text; see `load_domains`.
        earlier: The text of earlier runs. By default it is read from the model.

    Returns:
        The config, which names the general text, and the domains.
    """
    manifest = earlier or Manifest.seen_by(model)
    load = partial(load_domains, tokenizer=tokenizer, model=model, earlier=manifest, writes=writes)
    if config.general_share == 0 or not can_write(model, tokenizer):
        return config, load(config)

    general_config = with_written_text(config)
    try:
        return general_config, load(general_config)
    except StructPruneError as error:
        if general_config is config:
            raise

        # Some models write no usable text. A mistake in the domains themselves is raised here again.
        domains = load(config)
        logger.warning("The model cannot write general text, so only the configured domains are used: %s", error)
        return config, domains


def load_domains(
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | None = None,
    heldout_samples: int | None = None,
    earlier: Manifest | None = None,
    writer: PreTrainedTokenizerBase | None = None,
    writes: bool = True,
) -> list[Domain]:
    """Read, tokenize and pack the domains of a config.

    Args:
        config: The config.
        tokenizer: The tokenizer.
        model: The model, which writes the domains of its own text.
        heldout_samples: The number of held-out samples of each domain. By default the config determines it.
        earlier: The text of earlier runs. Its documents keep their use.
        writer: The tokenizer for text that the model writes, by default `tokenizer`.
        writes: Whether the model writes. If not, domains of its own text are left out.

    Raises:
        StructPruneError: If the tokenizer is None, or if a domain cannot be read or has too little text for a sample.
    """
    if tokenizer is None:
        raise StructPruneError("The domains are text, and reading them takes a tokenizer. Pass the model's own.")

    sample_format = SampleFormat.of(tokenizer, config.seq_length)
    domains = resolve(texts_of(config))
    vocab_size = None
    if model is not None:
        vocab_size = model.config.get_text_config().vocab_size
    counts = split_samples(config.num_samples, [domain.weight for domain in domains])
    uses = _earlier_uses(config, earlier)
    packer = _Packer(config, domains, counts, sample_format, heldout_samples, uses, vocab_size)

    write = None
    if model is not None and writes and any(map(written_by_model, domains)):
        from .generated import self_documents

        write = partial(self_documents, model, writer or tokenizer, ANY)

    pools = {}
    written_pools = {}
    for index, domain in enumerate(domains):
        if not written_by_model(domain):
            texts = documents(domain, config.seed, tokenizer)
            pools[index] = DocumentPool(tokenised(texts, tokenizer))
        elif writes:
            write_domain = None
            if write is not None:
                write_domain = partial(write, tokens=packer.tokens(index))
            texts = documents(domain, config.seed, tokenizer, write_domain)
            written_pools[index] = DocumentPool(tokenised(texts, tokenizer, batch_size=1))

    # Generation takes long, so all other domains are loaded first, because this may fail.
    loaded = packer.load(pools)
    loaded.update(packer.load(written_pools))
    return [loaded[index] for index in sorted(loaded)]


def _earlier_uses(config: StructPruneConfig, earlier: Manifest | None) -> dict[str, str]:
    """Return the use of each document in the text of earlier runs, by its hash."""
    if earlier is None:
        return {}

    uses = earlier.uses()
    if config.allocation == "uniform":
        # Probe documents may be used for calibration, but not for evaluation.
        for document, use in uses.items():
            if use == PROBE:
                uses[document] = USED
    return uses


def given_domains(inputs: Mapping[str, Tensor], holdout: float, probe: bool = False) -> list[Domain]:
    """Return domains of inputs that a program passes, with equal weights.

    Args:
        inputs: The samples of each domain as the model reads them, shape `(samples, ...)`.
        holdout: The share of held-out samples.
        probe: Whether to reserve the same number of samples for choices.

    Raises:
        StructPruneError: If a domain has too few samples.
    """
    domains = []
    for name, samples in inputs.items():
        heldout_end = num_heldout(len(samples), holdout)
        probe_end = heldout_end
        if probe:
            probe_end += heldout_end

        if len(samples) <= probe_end:
            raise StructPruneError(
                f"`inputs[{name!r}]` has {len(samples)} samples, and {probe_end} of them are held out. "
                f"Pass at least {probe_end + 1} samples."
            )

        domain = Domain(name, 1 / len(inputs), samples[probe_end:], samples[:heldout_end])
        if probe:
            domain = replace(domain, probe=samples[heldout_end:probe_end])
        domains.append(domain)
    return domains


def num_heldout(num_samples: int, holdout: float) -> int:
    """Return the number of samples to hold out for `num_samples`: the share `holdout`, at least 2."""
    return max(2, round(holdout * num_samples))


@dataclass(frozen=True)
class _Packer:
    """Divide the text of each domain into held-out and calibration samples.

    Attributes:
        config: The config.
        domains: The configs of the domains.
        counts: The numbers of calibration samples of the domains.
        sample_format: The format of the samples.
        num_heldout: The number of held-out samples of each domain. None uses the share in the config.
        uses: The uses of documents by their hashes. New uses are added.
        vocab_size: The number of tokens of the model, if there is a model.
    """

    config: StructPruneConfig
    domains: Sequence[DomainConfig]
    counts: list[int]
    sample_format: SampleFormat
    num_heldout: int | None
    uses: dict[str, str]
    vocab_size: int | None

    def load(self, pools: Mapping[int, DocumentPool]) -> dict[int, Domain]:
        """Return the domains of the pools. No domain uses held-out text of another domain.

        A domain with too little text has fewer samples, with a warning. Its weight does not change.
        """
        earlier_uses = dict(self.uses)
        texts = self._divided(pools, self.counts, self.uses)
        for index in pools:
            if self._suffices(texts[index], self.counts[index], index):
                continue

            self.counts[index] = self._possible_count(index, pools, earlier_uses)
            self.uses.clear()
            self.uses.update(earlier_uses)
            pools = _again(pools)
            texts = self._divided(pools, self.counts, self.uses)

        return {index: self._packed(index, texts[index]) for index in pools}

    def _divided(
        self, pools: Mapping[int, DocumentPool], counts: Sequence[int], uses: dict[str, str]
    ) -> dict[int, list[list[Tokens]]]:
        """Return the texts of each domain for each use, in the order of `_needs`."""
        needs = {index: self._needs(counts[index], index) for index in pools}
        texts: dict[int, list[list[Tokens]]] = {index: [] for index in pools}

        # The margin of error shrinks with the number of documents, so the beginnings of more documents are held out.
        steps = ((HELDOUT, None), (USED, None), (PROBE, None), (HELDOUT, BEGINNING))
        for step, (use, max_length) in enumerate(steps):
            for index, pool in pools.items():
                texts[index].append(pool.take(self.sample_format, needs[index][step], use, uses, max_length))

        return texts

    def _packed(self, index: int, texts: Sequence[Sequence[Tokens]]) -> Domain:
        """Pack the texts of a domain, one list for each use, into samples."""
        domain = self.domains[index]
        needs = self._needs(self.counts[index], index)
        samples = []
        hashes = []
        for text, need in zip(texts, needs, strict=True):
            text_samples, text_hashes = self.sample_format.pack(text, need // self.sample_format.body)
            samples.append(text_samples)
            hashes.append(text_hashes)
        check_vocabulary(int(torch.cat(samples).max()), self.vocab_size)

        heldout, calibration, probe, beginnings = samples
        heldout_hashes, calibration_hashes, probe_hashes, beginning_hashes = hashes
        packed = Domain(
            name=domain.name,
            weight=domain.weight / sum(domain.weight for domain in self.domains),
            samples=calibration,
            heldout=torch.cat([heldout, beginnings]),
            origin=domain,
            documents=calibration_hashes,
            heldout_documents=heldout_hashes + beginning_hashes,
            probe_documents=probe_hashes,
        )
        if self.config.allocation != "uniform":
            packed = replace(packed, probe=probe)
        return packed

    def tokens(self, index: int) -> int:
        """Return the number of tokens that a run requires of a domain."""
        return sum(self._needs(self.counts[index], index)[:3])

    def _needs(self, count: int, index: int) -> tuple[int, ...]:
        """Return the numbers of tokens of a domain: for holdout, calibration and probe, and for additional holdout.

        The text is divided in this order, so that it is the same in all runs. The additional text is optional.
        """
        heldout = self.num_heldout or num_heldout(count, self.config.holdout)
        probe = 0
        if self.config.allocation != "uniform":
            probe = heldout

        beginnings = 0
        if not written_by_model(self.domains[index]):
            for_tokens = min(ceil(MEASURED_TOKENS / self.sample_format.body), count // 2)
            for_documents = min(ceil(MANY_DOCUMENTS * BEGINNING / self.sample_format.body), count)
            beginnings = max(for_documents, for_tokens - heldout)

        return tuple(self.sample_format.body * number for number in (heldout, count, probe, beginnings))

    def _suffices(self, texts: Sequence[Sequence[Tokens]], count: int, index: int) -> bool:
        """Return whether the texts of a domain have the required lengths for a number of samples."""
        needs = list(self._needs(count, index)[:3])
        # An earlier run may have used the remaining held-out text.
        if self.num_heldout is not None:
            needs[0] = self.sample_format.body

        return all(self.sample_format.length(text) >= need for text, need in zip(texts, needs, strict=False))

    def _possible_count(self, index: int, pools: Mapping[int, DocumentPool], earlier_uses: Mapping[str, str]) -> int:
        """Return the largest number of samples of a domain with too little text, and warn.

        Raises:
            StructPruneError: If there is too little text for one sample, or the model itself writes the text.
        """
        domain = self.domains[index]
        texts = pools[index].documents
        if not texts:
            cause = ""
            if isinstance(domain.source, Reiterable):
                cause = "; a generator yields its text only once"
            raise StructPruneError(
                f"The domain {domain.name!r} is empty{cause}. Pass documents that have tokens. If the source holds "
                "text, check that the tokenizer belongs to the model."
            )

        def fails(count: int) -> bool:
            counts = list(self.counts)
            counts[index] = count
            divided = self._divided(_again(pools), counts, dict(earlier_uses))
            return not self._suffices(divided[index], count, index)

        possible = bisect_left(range(1, self.counts[index]), True, key=fails)
        num_different = len({text.hash for text in texts})
        duplicates = ""
        if num_different < len(texts):
            duplicates = f" ({num_different} without duplicates)"
        num_tokens = sum(len(text.ids) for text in texts)
        amount = f"the domain {domain.name!r} has {num_tokens} tokens in {len(texts)} documents{duplicates}"

        if not possible or written_by_model(domain):
            needed = sum(self._needs(1, index)[:3])
            self.config.refuse(
                "seq_length",
                f"is {self.config.seq_length}, and {amount}. Calibration and held-out samples take at least {needed} "
                "tokens, and a document serves only one of the two. Add documents, or choose shorter samples",
            )
        warn(
            f"{capitalized(amount)}, which are {possible} calibration samples instead of {self.counts[index]}. The "
            "domain keeps its weight. Add documents for a better result."
        )
        return possible


def _again(pools: Mapping[int, DocumentPool]) -> dict[int, DocumentPool]:
    """Return new pools of the documents that were read."""
    return {index: DocumentPool(pool.documents) for index, pool in pools.items()}


def can_write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether a model can write text: it is causal, and its weights are in memory and not quantized."""
    if tokenizer is None or is_offloaded(model) or is_quantized(model):
        return False
    return predicts_next(model)


def builtin_domains() -> list[DomainConfig]:
    """Return the default domains, with equal weights. They do not need a download."""
    return [DomainConfig(name=name, source=f"{BUILTIN}{name}") for name in ("prose", "code", "math")]


def texts_of(config: StructPruneConfig) -> list[DomainConfig]:
    """Return the domains of a config, by default the built-in domains, and general text if it has a share."""
    domains = config.domains
    default_share = 0.0
    if config.general_text is not None:
        default_share = 0.2
    if domains is None:
        domains = builtin_domains()
        default_share = 0.5

    share = config.general_share
    if share is None:
        share = default_share
    if share == 0:
        return domains

    weight = share / (1 - share) * sum(domain.weight for domain in domains)
    source = config.general_text or builtin_source_except(domains, bool(config.removes_tokens))
    return domains + [DomainConfig(name=GENERAL, source=source, weight=weight)]


def with_written_text(config: StructPruneConfig) -> StructPruneConfig:
    """Add general text to a config that does not set it: built-in text if tokens are removed, else the model's own."""
    domains = config.domains or []
    has_room = 0 < len(domains) < config.num_samples and not any(map(is_general, domains))
    if not has_room or config.general_text is not None or config.general_share == 0:
        return config

    source = WRITTEN
    if config.removes_tokens:
        source = builtin_source_except(domains, trims=True)
    return replace(config, general_text=source)


def builtin_source_except(domains: list[DomainConfig], trims: bool = False) -> str:
    """Return the source of all kinds of built-in text except the kinds in the domains.

    With `trims`, text in other languages is left out too, because its tokens may be removed.
    """
    kinds = [GENERAL]
    for domain in domains:
        if isinstance(domain.source, str) and domain.source.startswith(BUILTIN):
            kinds += domain.source.removeprefix(BUILTIN).split("+")
    if trims:
        kinds.append("languages")
    return BUILTIN + "-".join(kinds)


def split_samples(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Divide samples in proportion to weights: whole numbers by largest remainder, and at least 1 each."""
    num_domains = len(weights)
    if num_samples < num_domains:
        raise StructPruneError(
            f"`num_samples={num_samples}` is too small for {num_domains} domains. Set it to at least {num_domains}."
        )

    total = sum(weights)
    quotas = [num_samples * weight / total for weight in weights]
    counts = [int(quota) for quota in quotas]

    def excess(index: int) -> float:
        return counts[index] - quotas[index]

    by_remainder = sorted(range(num_domains), key=excess)
    for index in by_remainder[: num_samples - sum(counts)]:
        counts[index] += 1

    # Every domain needs a sample, which is taken from the domain that is farthest above its quota.
    while 0 in counts:
        donors = [index for index, count in enumerate(counts) if count > 1]
        counts[max(donors, key=excess)] -= 1
        counts[counts.index(0)] = 1
    return counts
