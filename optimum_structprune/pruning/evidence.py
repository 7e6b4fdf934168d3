"""What a run knows of the text: made once, and handed down to everything that needs samples or moments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import log
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import dequantized
from ..arch.spec import ArchSpec
from ..calibration.mixture import Mixture
from ..calibration.passes import Passes, batches_of, passes_over
from ..calibration.stored import Statistics, StoredPasses
from ..config.domains import written_by_model
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA
from ..criteria.layers import LAYER_CRITERIA
from ..domains.domain import Domain
from ..domains.load import calibration_domains, given_domains, load_domains, split_samples
from ..domains.manifest import Entry, Manifest
from ..domains.resolve import reweighted, texts_of
from ..forward.layers import Batch
from ..system.fingerprint import fingerprint
from ..system.processes import every_process_runs, own_part, process_index


@dataclass(frozen=True)
class Evidence:
    """The samples of a run by domain, or stored moments in their place, and the weights of the domains.

    Attributes:
        domains: The domains with their samples; with stored moments, shapes without content.
        shares: The present weight of each domain; they sum to 1.
        statistics: Stored moments of the dense model; None where the samples are run.
        memory: What registered criteria and allocations remember during the run, by a name of their own.
        run_passes: Makes passes over samples; see `calibration.passes.passes_over`.
    """

    config: StructPruneConfig
    domains: Sequence[Domain]
    shares: tuple[float, ...]
    batch_size: int
    statistics: Statistics | None = None
    run_passes: Callable[..., Passes] = passes_over
    memory: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        config: StructPruneConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        counts: bool = False,
    ) -> Evidence:
        """Read the evidence that a config names; its own config says which general text was read. With `counts` the
        pools hold more text, in which tokens are counted.

        A quantized model that writes text, or is compared with a stored one, is unpacked for that in a copy, so that
        it is still packed where a run ends for lack of text.
        """
        if config.stats is not None or any(map(written_by_model, texts_of(config))):
            model = dequantized(model, inplace=False)
        if config.stats is not None:
            statistics = Statistics.load(config.stats)
            statistics.check(model, tokenizer)
            return cls.of(config, statistics.chosen(config), statistics)
        if inputs is not None:
            return cls.of(config, given_domains(inputs, float(config.holdout), config.chooses))
        return cls.of(*calibration_domains(config, model, tokenizer, counts))

    def read_again(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reader: PreTrainedTokenizerBase,
        seen: Manifest | None,
    ) -> Evidence:
        """The evidence of the same text in tokens of the `reader`, without what is held out here; the model writes
        with the `tokenizer` that has read it first, and has `seen` the text of earlier runs.
        """
        seen = self.manifest(tokenizer).after(seen)
        vocab_size = model.config.get_text_config().vocab_size
        return replace(self, domains=load_domains(self.config, reader, vocab_size, None, model, seen, tokenizer))

    @classmethod
    def of(
        cls, config: StructPruneConfig, domains: Sequence[Domain], statistics: Statistics | None = None
    ) -> Evidence:
        """The evidence in domains that are read already."""
        shares = tuple(domain.weight for domain in domains)
        return cls(config, domains, shares, config.samples_at_once, statistics)

    @property
    def names(self) -> list[str]:
        """The names of the domains."""
        return [domain.name for domain in self.domains]

    @property
    def mixture(self) -> Mixture:
        """How the moments and scores of the domains are brought together."""
        return Mixture(self.shares)

    def total_loss(self, by_domain: Tensor) -> float:
        """The one loss that choices go by, of the losses by domain, shape `(domains,)`: the highest with the objective
        `worst`, and the weighted mean otherwise.
        """
        worst = self.config.objective == "worst"
        return float(by_domain.max() if worst else self.mixture.mean(by_domain))

    @property
    def own_batches(self) -> list[Batch]:
        """The samples of all domains that this process runs in the next round, one domain after the other."""
        counts = self._counts(self.shares)
        parts = [domain.portion(count) for domain, count in zip(self.domains, counts, strict=True)]
        return batches_of(list(map(_own, parts)), self.batch_size)

    def portion(self, tokens: int) -> Evidence:
        """The evidence cut to at most `tokens` tokens, as many samples in each domain; stored moments stay."""
        most = max(1, tokens // len(self.domains) // self.domains[0].samples.shape[1])
        domains = self.domains if self.statistics is not None else [domain.portion(most) for domain in self.domains]
        return replace(self, domains=domains)

    def passes(self, model: PreTrainedModel, arch: ArchSpec, fixed: bool = False) -> Passes:
        """Passes over the samples with the model as it is now, or the stored moments.

        Each domain has as many samples as its present weight is worth, so that what counts more is known better; their
        number in all stays the same.
        """
        config = self.config
        watch = CRITERIA.get(config.scored_by).watches
        if self.statistics is not None:
            return StoredPasses(self.statistics, self.domains, next(model.parameters()).device)
        by_domain = None if watch is None else watch(model, arch, self)
        feedback = config.error_feedback if config.fits and not fixed else 0.0
        passes = self.run_passes(model, arch, self.own_batches, feedback, fixed)
        if by_domain is not None:
            passes.saliency = {module: self.mixture.mean(values) for module, values in by_domain.items()}
        return passes

    def reweighted(self, ratios: Mapping[str, float]) -> Evidence:
        """The evidence of the next round, in which a domain that has lost more counts more."""
        asked = [domain.weight for domain in self.domains]
        losses = [log(ratio) for ratio in ratios.values()]
        return replace(self, shares=reweighted(self.shares, asked, losses))

    def entries(self) -> Sequence[Entry]:
        """What identifies the text."""
        if self.statistics is not None:
            return self.statistics.manifest(self.domains).domains
        return [Entry.of(domain) for domain in self.domains]

    def key(self, model: PreTrainedModel, *more: Any) -> str:
        """The SHA-256 of a dense model, of the text, and of what else a result depends on, as JSON takes it."""
        parts = [fingerprint(model), [{**asdict(entry), "origin": None} for entry in self.entries()], *more]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def manifest(self, tokenizer: PreTrainedTokenizerBase | None, rounds: Iterable[Sequence[float]] = ()) -> Manifest:
        """The record of what was calibrated on, in rounds with these shares of the domains."""
        if self.statistics is not None:
            return self.statistics.manifest(self.domains)
        counts = [self._counts(shares) for shares in [*rounds] or [self.shares]]
        used = [
            replace(domain.portion(max(of)), spare=None, weight=share)
            for domain, share, *of in zip(self.domains, self.shares, *counts, strict=True)
        ]
        return Manifest.of(self.config, used, tokenizer)

    def _counts(self, shares: Sequence[float]) -> list[int]:
        """The number of samples that a round with these shares runs, by domain."""
        counts = [len(domain.samples) for domain in self.domains]
        return split_samples(sum(counts), shares) if self.config.reweights else counts


def judges_layers(config: StructPruneConfig) -> bool:
    """Whether the criterion of a config scores whole layers, and nothing inside them."""
    return config.scored_by in LAYER_CRITERIA.names()


def _own(domain: Domain) -> Domain:
    """A domain with the samples that this process runs."""
    mask = None if domain.mask is None else own_part(domain.mask)
    if every_process_runs(domain.samples) and process_index() > 0:
        # The tokens of these samples count once, in the first process.
        mask = torch.zeros_like(domain.samples, dtype=torch.bool)
    return replace(domain, samples=own_part(domain.samples), mask=mask)
