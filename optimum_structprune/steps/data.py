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
from ..criteria import CRITERIA, parameters_of, reads_gram
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
    from ..method.whole_model import WholeModel

# The weight of text in the configured languages. All other domains share the remaining weight.
LANGUAGES_WEIGHT = 0.1


@dataclass(frozen=True)
class CalibrationData:
    """The samples of a run by domain, and the weights of the domains.

    Attributes:
        config: The config of the run.
        domains: The domains of the calibration text.
        options: The runtime options.
        cache: Values that registered criteria store during the run, by name.
    """

    config: StructPruneConfig
    domains: Sequence[Domain]
    options: RunOptions = field(default_factory=RunOptions)
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

        The result contains the config of the run. It also names the general text that was read.
        """
        options = options or RunOptions()
        if inputs is not None:
            domains = given_domains(inputs, config.holdout, probe=config.allocation != "uniform")
            return cls(config, domains, options)

        # A copy is dequantized, because the run may still fail for lack of text.
        if any(written_by_model(domain) for domain in texts_of(config)):
            model = dequantized(model, inplace=False)
        config, domains = calibration_domains(config, model, tokenizer, earlier=earlier)
        return cls(config, domains, options)

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the weights of the domains, which sum to 1."""
        return tuple(domain.weight for domain in self.domains)

    def with_languages(self, tokenizer: PreTrainedTokenizerBase | None) -> CalibrationData:
        """Return the data with a further domain of text in the configured languages, without held-out text."""
        from ..domains.languages import samples_of

        if tokenizer is None:
            return self

        domains = []
        for domain in self.domains:
            domains.append(replace(domain, weight=(1 - LANGUAGES_WEIGHT) * domain.weight))

        codes = self.config.languages or ()
        rows = samples_of(tokenizer, codes, self.config.seq_length)
        domains.append(Domain(f"languages {','.join(codes)}", LANGUAGES_WEIGHT, rows, rows[:0]))
        return replace(self, domains=domains)

    def mean(self, by_domain: Tensor) -> Tensor:
        """Return the mean of values, shape `(domains, ...)`, by the weights of the domains, shape `(...)`."""
        return torch.tensordot(by_domain.new_tensor(self.shares), by_domain, 1)

    def combined(self, contributions: Tensor) -> Tensor:
        """Return the mean of contributions, shape `(domains, units)`, by the weights of the domains, shape `(units,)`.

        The contributions of each domain are divided by their mean, so that a domain with large activations does not
        dominate.
        """
        size = contributions.abs().mean(1, keepdim=True).clamp(min=torch.finfo(contributions.dtype).tiny)
        return self.mean(contributions / size)

    @property
    def own_batches(self) -> list[Batch]:
        """Return the samples of this process in batches, sorted by domain."""
        domains = [replace(domain, samples=shard(domain.samples)) for domain in self.domains]

        # Samples that every process runs count only in the first process.
        is_first_process = process_index() == 0
        counts = [is_first_process or not every_process_runs(domain.samples) for domain in self.domains]
        batches = batches_of(domains, self.options.batch_size)
        return [replace(batch, counts=counts[batch.domain]) for batch in batches]

    def portion(self, tokens: int) -> CalibrationData:
        """Return the data with at most `tokens` tokens, and with the same number of samples in each domain."""
        seq_length = self.domains[0].samples.shape[1]
        count = max(1, tokens // len(self.domains) // seq_length)
        domains = [replace(domain, samples=domain.samples[:count]) for domain in self.domains]
        return replace(self, domains=domains)

    def method(self, model: PreTrainedModel, arch: ArchSpec) -> Method:
        """Return the settings for scoring and refitting units. Some criteria run the whole model for them."""
        config = self.config
        criterion = CRITERIA.get(config.scored_by)

        statistics: dict[str, Tensor] = {}
        if criterion.whole_model_statistics is not None:
            statistics_by_domain = criterion.whole_model_statistics(model, arch, self)
            statistics = {module: self.mean(values) for module, values in statistics_by_domain.items()}

        return Method(
            criterion=criterion,
            parameters=partial(parameters_of, criterion, config),
            refit=REFITS.get(config.refit),
            shares=self.shares,
            damping=config.damping,
            gram=reads_gram(config),
            statistics=statistics,
        )

    def key(self, model: PreTrainedModel, *settings: Any) -> str:
        """Return the SHA-256 of an original model, the text, and the settings that a result depends on."""
        entries = []
        for domain in self.domains:
            entry = asdict(Entry.of(domain))
            entry["origin"] = None
            entries.append(entry)

        return json_hash([fingerprint(model), entries] + list(settings))


class AcrossProcesses(OneProcess):
    """Sums of moments over the processes that share the samples; see `processes.across_processes`."""

    @torch.no_grad()
    def sum_(self, moments: Moments) -> Moments:
        """Sum moments over all processes in place. Each process weights its means by its number of tokens."""
        local_count = moments.count
        totals = torch.tensor([local_count, moments.energy is not None], device=moments.mean.device)
        all_reduce_([totals])
        moments.count = int(totals[0])

        # A process without tokens must take part in the sum too.
        if moments.energy is None and totals[1]:
            moments.energy = moments.mean.new_zeros(())

        tensors = list(moments.tensors().values())
        for tensor in tensors:
            tensor.mul_(local_count / max(moments.count, 1))
        all_reduce_(tensors)
        return moments

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the first process in every process."""
        return broadcast_(tensor)


def ranks() -> OneProcess:
    """Return the object that sums moments over the processes that share the samples."""
    if process_count() > 1:
        return AcrossProcesses()
    return OneProcess()


def source_of(
    model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], feedback: float = 0.0, fixed: bool = False
) -> InMemory | WholeModel:
    """Return a source that runs the layers of a model one by one, or the whole model if they cannot run alone."""
    source: InMemory | WholeModel
    if is_offloaded(model):
        from ..method.offloaded import Offloaded

        source = Offloaded(model, arch, batches, feedback, fixed)
    else:
        try:
            source = InMemory(model, arch, batches, feedback, fixed)
        except NotSequentialError:
            from ..method.whole_model import WholeModel

            source = WholeModel(model, arch, batches)

    source.ranks = ranks()
    if any(space.experts for space in arch.spaces):
        from ..method.expert_source import expert_moments

        source.expert_moments = expert_moments
    return source


def batches_of(domains: Sequence[Domain], batch_size: int) -> list[Batch]:
    """Return the samples of every domain in batches. A batch has samples of one domain only."""
    batches = []
    for index, domain in enumerate(domains):
        for start in range(0, len(domain.samples), batch_size):
            batches.append(Batch(index, domain.samples[start : start + batch_size]))
    return batches
