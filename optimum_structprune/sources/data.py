"""Holds the calibration data of a run, which is made once and handed to all that needs samples or moments."""

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
from ..domains.manifest import Entry
from ..domains.packing import Domain
from ..method.calibrate import Moments
from ..method.layers import Batch, InMemory, NotSequentialError, OneProcess
from ..method.loop import Method
from ..method.refit import least_squares, no_refit
from ..system.fingerprint import fingerprint, json_hash
from ..system.processes import all_reduce_, broadcast_, every_process_runs, process_count, process_index, shard


for _name, _refit in (("none", no_refit), ("least_squares", least_squares)):
    REFITS.register(_name)(_refit)

if TYPE_CHECKING:
    from .whole_model import WholeModel

LANGUAGES_WEIGHT = 0.1  # of text of the languages to keep, beside all domains


@dataclass(frozen=True)
class CalibrationData:
    """The samples of a run by domain, and the weights of the domains."""

    config: StructPruneConfig
    domains: Sequence[Domain]
    options: RunOptions = field(default_factory=RunOptions)
    # What registered criteria remember during the run, by a name of their own.
    cache: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        config: StructPruneConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        options: RunOptions | None = None,
    ) -> CalibrationData:
        """Read the text that a config names; the config of the data says which general text was read."""
        if any(map(written_by_model, texts_of(config))):  # in a copy: a run may yet end for lack of text
            model = dequantized(model, inplace=False)
        if inputs is not None:
            read = config, given_domains(inputs, config.holdout, config.allocation != "uniform")
        else:
            read = calibration_domains(config, model, tokenizer)
        return cls(*read, options or RunOptions())

    @property
    def shares(self) -> tuple[float, ...]:
        """Give the weight of each domain; they sum to 1."""
        return tuple(domain.weight for domain in self.domains)

    def with_languages(self, tokenizer: PreTrainedTokenizerBase | None) -> CalibrationData:
        """Add a domain of text in the languages to keep, of which none is held out."""
        from ..vocabulary.languages import samples_of

        codes = self.config.languages or ()
        if tokenizer is None:
            return self
        rows = samples_of(tokenizer, codes, self.config.seq_length)
        domain = Domain(f"languages {','.join(codes)}", LANGUAGES_WEIGHT, rows, rows[:0])
        others = [replace(other, weight=(1 - LANGUAGES_WEIGHT) * other.weight) for other in self.domains]
        return replace(self, domains=[*others, domain])

    def mean(self, by_domain: Tensor) -> Tensor:
        """Average values of shape `(domains, ...)` by the weights of the domains; the result has shape `(...)`."""
        return torch.tensordot(by_domain.new_tensor(self.shares), by_domain, 1)

    def combined(self, contributions: Tensor) -> Tensor:
        """Average contributions of shape `(domains, units)` to one score per unit, shape `(units,)`.

        Each domain is divided by its mean, so that one with large activations does not outweigh the others.
        """
        size = contributions.abs().mean(1, keepdim=True).clamp(min=torch.finfo(contributions.dtype).tiny)
        return self.mean(contributions / size)

    @property
    def own_batches(self) -> list[Batch]:
        """Batch the samples that this process runs, one domain after the other."""
        domains = [replace(domain, samples=shard(domain.samples)) for domain in self.domains]
        # What every process runs counts in the first one alone.
        counts = [process_index() == 0 or not every_process_runs(domain.samples) for domain in self.domains]
        batches = batches_of(domains, self.options.batch_size)
        return [replace(batch, counts=counts[batch.domain]) for batch in batches]

    def portion(self, tokens: int) -> CalibrationData:
        """Cut the data to at most `tokens` tokens, with as many samples in each domain."""
        most = max(1, tokens // len(self.domains) // self.domains[0].samples.shape[1])
        return replace(self, domains=[replace(domain, samples=domain.samples[:most]) for domain in self.domains])

    def method(self, model: PreTrainedModel, arch: ArchSpec) -> Method:
        """Describe how units are scored and refitted; some criteria run the whole model for that."""
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
        """Hash a dense model, the text, and what `more` a result depends on, by SHA-256."""
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
            moments.energy = moments.mean.new_zeros(())  # no token came here, and every process has to take part
        tensors = list(moments.tensors().values())
        for tensor in tensors:
            tensor.mul_(local_count / max(moments.count, 1))
        all_reduce_(tensors)
        return moments

    def broadcast(self, tensor: Tensor) -> Tensor:
        return broadcast_(tensor)


def ranks() -> OneProcess:
    """Give what sums moments over the processes that share the samples."""
    return AcrossProcesses() if process_count() > 1 else OneProcess()


def source_of(
    model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], feedback: float = 0.0, fixed: bool = False
) -> InMemory | WholeModel:
    """Give a source that runs the layers of a model one by one, or the whole model if it does not allow that."""
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
    """Cut the samples of every domain into batches; no batch holds two domains."""
    return [
        Batch(index, domain.samples[start : start + batch_size])
        for index, domain in enumerate(domains)
        for start in range(0, len(domain.samples), batch_size)
    ]
