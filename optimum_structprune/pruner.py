"""The main path: a model in, a smaller model of the same class out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arch.load import describe
from .arch.plain import check_model, dequantized
from .arch.spec import LAYER, MODEL, ArchSpec, Widths
from .calibration.passes import batches_of
from .calibration.stored import Statistics
from .config.pruning import StructPruneConfig
from .domains.load import Domain, calibration_domains
from .domains.manifest import Manifest
from .errors import InPlaceError, StructPruneError
from .pruning.checks import COARSE, check_coarse, check_rounds
from .pruning.coarse import prune_coarse_
from .pruning.evidence import dense_scores, mixture
from .pruning.measure import Measure
from .pruning.rounds import Rounds
from .pruning.sensitivity import sensitivities
from .registry import Registry
from .saving.hub import save_pruned
from .saving.report import Report
from .surgery.plan import Plan
from .widths.budget import biased_spaces, widths_of
from .widths.schedule import next_legal, round_widths


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRUNERS: Registry = Registry("pruner", "optimum_structprune.pruners")
register_pruner = PRUNERS.register


@register_pruner("iterative")
class StructPruner:
    """Prunes a causal language model by calibration, scoring, removal and refit, in rounds.

    After `prune_model`, `report` holds the numbers of the run, `plan` what was kept and `manifest` what it was
    calibrated on.
    """

    def __init__(self, config: StructPruneConfig):
        self.config = config
        self.report: Report | None = None
        self.plan: Plan | None = None
        self.manifest: Manifest | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.measure: Measure | None = None
        self.statistics: Statistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StructPruner:
        """A pruner from what `to_dict` gave."""
        return cls(StructPruneConfig.from_dict(data))

    def prune_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inplace: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> PreTrainedModel:
        """Prune a model.

        Args:
            model: A causal language model, an encoder or an encoder-decoder, in any floating-point dtype. A quantized
                one is unpacked first, where transformers can.
            tokenizer: Its tokenizer; reads the calibration domains.
            inputs: Calibration inputs by domain, in place of the text that the config names: pixels, or samples,
                shape `(samples, ...)`; a part of each is held out.
            inplace: Change and return `model` itself, layer by layer, which saves the memory of a copy. Otherwise
                `model` is left as it is and a new one is returned.

        Raises:
            StructPruneError: If the model, the config or a domain cannot be used; nothing has changed then.
            InPlaceError: If pruning failed after a model that was to be changed in place had begun to change.
        """
        model = dequantized(model, inplace)
        check_model(model, self.config)
        arch = describe(model, self.config.arch_file)
        if arch.causal and model.get_output_embeddings() is None:
            raise StructPruneError(
                f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM."
            )
        widths = widths_of(self.config, arch, model)
        check_coarse(self.config, list(widths))
        check_rounds(self.config, arch)
        report = Report(arch.model_type, self.config.scored_by)
        with report.timed("domains"):
            domains = self._domains(model, arch, tokenizer, inputs, widths)
        if self.config.allocation != "uniform":
            scores = self._scores(model, arch, domains, widths, report)
            widths = widths_of(self.config, arch, model, scores)
        self.tokenizer, self.measure = tokenizer, Measure(domains, arch.causal)
        with report.timed("perplexity"):
            self.measure.before(model)
        report.parameters["before"], report.layer_parameters["before"] = model.num_parameters(), sum(arch.layer_params)

        teacher = self._teacher(model, tokenizer, inplace)
        work = model if inplace else deepcopy(model)
        try:
            plan = self._rounds_(work, domains, widths, report, teacher)
        except Exception as error:
            if inplace:
                raise InPlaceError(
                    f"Pruning stopped ({error}), and the model had already begun to change: load it again."
                ) from error
            raise
        report.parameters["after"] = work.num_parameters()
        report.layer_parameters["after"] = sum(describe(work, self.config.arch_file).layer_params)
        report.widths = _widths_of(plan, arch)
        report.dense_widths = {name: max(arch.widths(name).values()) for name in report.widths}
        report.calibration_tokens = {domain.name: domain.samples.numel() for domain in domains}
        self.plan, self.report = plan, report
        given = self.statistics
        self.manifest = Manifest.of(self.config, domains, tokenizer) if given is None else given.manifest(domains)
        return work

    def save(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save the pruned model with the config, the plan, the report and the manifest of the run.

        The folder appears only after plain `from_pretrained` has loaded it and given the same logits.

        Args:
            model: What `prune_model` returned.
            save_directory: Where to.
            tokenizer: Saved beside the model.
            overwrite: Replace a folder that exists.

        Raises:
            StructPruneError: If the folder exists, or the saved model does not come back the same.
        """
        save_pruned(model, save_directory, self.config, self.plan, self.report, tokenizer, overwrite, self.manifest)

    def _domains(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        inputs: Mapping[str, Tensor] | None,
        names: Collection[str],
    ) -> list[Domain]:
        self.statistics = None
        if self.config.stats is None:
            return calibration_domains(self.config, model, tokenizer, inputs)
        if inputs is not None:
            raise StructPruneError(f"inputs are calibration data, and stats={self.config.stats!r} stands in for them.")
        self.statistics = Statistics.load(self.config.stats)
        self.statistics.check(model, tokenizer)
        self.statistics.check_use(self.config, arch, names)
        return self.statistics.chosen(self.config)

    def _scores(
        self, model: PreTrainedModel, arch: ArchSpec, domains: list[Domain], names: Collection[str], report: Report
    ) -> dict[tuple[int, str], Tensor]:
        """Scores of all units on one scale, in the way that `allocation` says."""
        if self.config.allocation == "sensitivity":
            return sensitivities(model, arch, self.config, domains, names, report)
        return dense_scores(model, arch, self.config, domains, names, report, self.statistics)

    def _teacher(self, model: PreTrainedModel, tokenizer: Any, inplace: bool) -> PreTrainedModel | None:
        """What recovery learns from: the dense model, or nothing where its predictions go to disk."""
        recovery = self.config.recovery
        if recovery is None or not recovery.distils:
            return None
        if recovery.teacher_logits is not None:
            return self._healer(recovery, self.config.rounds).write_teacher_logits(model, tokenizer)
        return deepcopy(model) if inplace else model

    def _healer(self, recovery: Any, count: int, number: int = 1) -> Any:
        # Training libraries take seconds to import, and most runs do without.
        from .recovery.recover import Recovery

        return Recovery(recovery.part(number, count) if recovery.every_round else recovery, self.config)

    def prune_to_(self, model: PreTrainedModel, domains: list[Domain], widths: Widths, report: Report) -> Plan:
        """Prune a model in place to given widths, in `config.rounds` rounds, without any recovery.

        Args:
            model: The model that is changed.
            domains: Calibration text.
            widths: Number of units to keep, by space, in every layer or by layer; they have to be legal.
            report: Takes the time.
        """
        arch = describe(model, self.config.arch_file)
        training = model.training
        model.eval()
        batches = batches_of(domains, self.config.batch_size)
        mixed = mixture(self.config, domains)
        plan = prune_coarse_(model, arch, self.config, batches, mixed, widths, report)
        arch = describe(model, self.config.arch_file)
        rest = {name: width for name, width in widths.items() if name not in COARSE}
        if rest:
            biased = biased_spaces(self.config, arch, rest)
            rounds = Rounds(
                model,
                arch,
                self.config,
                domains,
                report,
                self.measure,
                biased,
                self.tokenizer,
                statistics=self.statistics,
            )
            plan = plan.then(rounds.run_(rest))
        model.train(training)
        return plan

    def _rounds_(
        self,
        model: PreTrainedModel,
        domains: list[Domain],
        widths: Widths,
        report: Report,
        teacher: PreTrainedModel | None,
    ) -> Plan:
        config, recovery = self.config, self.config.recovery
        pruner, steps = self, [dict(widths)]
        if recovery is not None and recovery.every_round:
            arch = describe(model, config.arch_file)
            pruner = type(self)(replace(config, rounds=1))
            pruner.tokenizer, pruner.measure = self.tokenizer, self.measure
            steps = [next_legal(model.config, arch, step) for step in round_widths(config, arch, widths)]
        plan = Plan(model.config.model_type, {})
        for number, step in enumerate(steps, start=1):
            plan = plan.then(pruner.prune_to_(model, domains, step, report))
            with report.timed("perplexity"):
                assert self.measure is not None
                self.measure.after(model, report)
            if recovery is not None:
                with report.timed("recovery"):
                    healer = self._healer(recovery, len(steps), number)
                    healer.recover_model(model, self.tokenizer, teacher)
                    report.recovery = healer.report.after(report.recovery)
        return plan


class AutoStructPruner:
    """Finds the pruner class for a config by its `method`."""

    @staticmethod
    def from_config(config: StructPruneConfig) -> StructPruner:
        """The pruner that `config.method` names.

        Raises:
            StructPruneError: If no pruner is registered under that name.
        """
        return PRUNERS.get(config.method)(config)


def prune_model(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """Prune a model in one call; see `StructPruner.prune_model`."""
    return AutoStructPruner.from_config(config).prune_model(model, tokenizer, inplace=inplace, inputs=inputs)


def _widths_of(plan: Plan, arch: ArchSpec) -> dict[str, dict[int, int]]:
    """Widths of the spaces that the plan names, in all layers that are left."""
    there = (MODEL, *plan.keep.get((MODEL, LAYER), range(arch.num_layers)))
    whole = {name: {at: width for at, width in arch.widths(name).items() if at in there} for name in plan.widths()}
    return {name: {**whole[name], **at} for name, at in plan.widths().items()}
