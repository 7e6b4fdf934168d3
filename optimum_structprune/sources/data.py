"""The calibration data of a run, and the source of activations for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import dequantized, is_offloaded
from ..arch.spec import ArchSpec
from ..config.domains import written_by_model
from ..config.pruning import REFITS, RunOptions, StructPruneConfig
from ..criteria import CRITERIA, parameters_of
from ..domains.load import calibration_domains, given_domains, texts_of
from ..domains.manifest import Entry, Manifest
from ..domains.packing import Domain
from ..method.calibrate import Moments
from ..method.layers import Batch, InMemory, NotSequentialError, OneProcess
from ..method.loop import Method
from ..method.refit import least_squares, no_refit
from ..system.fingerprint import fingerprint, json_hash
from ..system.processes import all_reduce_, broadcast_, every_process_runs, process_count, process_index, shard


REFITS.register("none")(no_refit)
REFITS.register("least_squares")(least_squares)

if TYPE_CHECKING:
    from .whole_model import WholeModel

# The weight of text in the languages to keep, beside all domains.
LANGUAGES_WEIGHT = 0.1


@dataclass(frozen=True)
class CalibrationData:
    """The samples of a run by domain, and the weights of the domains."""

    config: StructPruneConfig
    domains: Sequence[Domain]
    options: RunOptions = field(default_factory=RunOptions)
    # Values that registered criteria keep during the run, by a name of their own.
    cache: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        config: StructPruneConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        options: RunOptions | None = None,
        earlier: Manifest | None = None,
    ) -> CalibrationData:
        """Read the text of a config. Documents of `earlier` runs keep their use.

        The config of the result is the config of the run from there on: it also names the general text that was read.
        """
        options = options or RunOptions()
        if inputs is not None:
            domains = given_domains(inputs, config.holdout, probe=config.allocation != "uniform")
            return cls(config, domains, options)

        if any(written_by_model(domain) for domain in texts_of(config)):
            # A copy is unpacked, because the run may still be refused for lack of text.
            model = dequantized(model, inplace=False)
        config, domains = calibration_domains(config, model, tokenizer, earlier=earlier)
        return cls(config, domains, options)

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the weights of the domains, which sum to 1."""
        return tuple(domain.weight for domain in self.domains)

    def with_languages(self, tokenizer: PreTrainedTokenizerBase | None) -> CalibrationData:
        """Return the data with a further domain of text in the languages to keep. None of it is held out."""
        from ..vocabulary.languages import samples_of

        codes = self.config.languages or ()
        if tokenizer is None:
            return self
        rows = samples_of(tokenizer, codes, self.config.seq_length)
        domain = Domain(f"languages {','.join(codes)}", LANGUAGES_WEIGHT, rows, rows[:0])
        domains = [replace(given, weight=(1 - LANGUAGES_WEIGHT) * given.weight) for given in self.domains]
        return replace(self, domains=[*domains, domain])

    def mean(self, by_domain: Tensor) -> Tensor:
        """Return the mean of values, shape `(domains, ...)`, by the weights of the domains, shape `(...)`."""
        return torch.tensordot(by_domain.new_tensor(self.shares), by_domain, 1)

    def combined(self, contributions: Tensor) -> Tensor:
        """Return the mean of contributions, shape `(domains, units)`, by the weights of the domains, shape `(units,)`.

        Each domain is divided by its mean, so that one with large activations does not outweigh the others.
        """
        size = contributions.abs().mean(1, keepdim=True).clamp(min=torch.finfo(contributions.dtype).tiny)
        return self.mean(contributions / size)

    @property
    def own_batches(self) -> list[Batch]:
        """Return the samples that this process runs in batches, one domain after the other."""
        domains = [replace(domain, samples=shard(domain.samples)) for domain in self.domains]
        # Samples that every process runs count in the first process alone.
        is_first = process_index() == 0
        counts = [is_first or not every_process_runs(domain.samples) for domain in self.domains]
        batches = batches_of(domains, self.options.batch_size)
        return [replace(batch, counts=counts[batch.domain]) for batch in batches]

    def portion(self, tokens: int) -> CalibrationData:
        """Return the data with at most `tokens` tokens, and with the same number of samples in each domain."""
        seq_length = self.domains[0].samples.shape[1]
        count = max(1, tokens // len(self.domains) // seq_length)
        domains = [replace(domain, samples=domain.samples[:count]) for domain in self.domains]
        return replace(self, domains=domains)

    def method(self, model: PreTrainedModel, arch: ArchSpec) -> Method:
        """Return how units are scored and refitted. Some criteria run the whole model for that."""
        config, criterion = self.config, CRITERIA.get(self.config.scored_by)
        whole = criterion.whole_model_statistics
        by_domain = {} if whole is None else whole(model, arch, self)

        return Method(
            criterion=criterion,
            parameters=partial(parameters_of, criterion, config),
            refit=REFITS.get(config.refit),
            shares=self.shares,
            damping=config.damping,
            gram=criterion.needs_gram or config.refit != "none",
            statistics={module: self.mean(values) for module, values in by_domain.items()},
        )

    def key(self, model: PreTrainedModel, *more: Any) -> str:
        """Return the SHA-256 of a dense model, the text, and further values that a result depends on."""
        entries = [{**asdict(Entry.of(domain)), "origin": None} for domain in self.domains]
        return json_hash([fingerprint(model), entries, *more])


class AcrossProcesses(OneProcess):
    """Sums moments over the processes that share the samples; see `processes.across_processes`."""

    @torch.no_grad()
    def sum_(self, moments: Moments) -> Moments:
        local_count = moments.count
        totals = torch.tensor([local_count, moments.energy is not None], device=moments.mean.device)
        all_reduce_([totals])
        moments.count = int(totals[0])
        if moments.energy is None and totals[1]:
            # No token came to this process, but every process has to take part in the sum.
            moments.energy = moments.mean.new_zeros(())
        tensors = list(moments.tensors().values())
        for tensor in tensors:
            tensor.mul_(local_count / max(moments.count, 1))
        all_reduce_(tensors)
        return moments

    def broadcast(self, tensor: Tensor) -> Tensor:
        return broadcast_(tensor)


def ranks() -> OneProcess:
    """Return the object that sums moments over the processes that share the samples."""
    return AcrossProcesses() if process_count() > 1 else OneProcess()


def source_of(
    model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], feedback: float = 0.0, fixed: bool = False
) -> InMemory | WholeModel:
    """Return a source that runs the layers of a model one by one, or the whole model if they cannot run alone."""
    source: InMemory | WholeModel
    if is_offloaded(model):
        from .offloaded import Offloaded

        source = Offloaded(model, arch, batches, feedback, fixed)
    else:
        try:
            source = InMemory(model, arch, batches, feedback, fixed)
        except NotSequentialError:
            from .whole_model import WholeModel

            source = WholeModel(model, arch, batches)
    source.ranks = ranks()
    if any(space.experts for space in arch.spaces):
        from .experts import expert_moments

        source.expert_moments = expert_moments
    return source


def batches_of(domains: Sequence[Domain], batch_size: int) -> list[Batch]:
    """Return the samples of every domain in batches. No batch holds samples of two domains."""
    return [
        Batch(index, domain.samples[start : start + batch_size])
        for index, domain in enumerate(domains)
        for start in range(0, len(domain.samples), batch_size)
    ]
