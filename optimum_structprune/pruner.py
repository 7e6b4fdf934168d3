"""The main path: a model in, a smaller model of the same class out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .allocation import next_legal, round_widths, target_widths
from .arch.load import describe
from .arch.shrink import shrunk_config
from .arch.spec import ArchSpec, Widths
from .calibration.blocks import Domain, given_domains, load_domains
from .calibration.gradients import saliencies
from .calibration.manifest import Manifest
from .calibration.passes import batches_of, guard_batches, passes_over
from .checks import biased_spaces, check_model, dequantized
from .config import StructPruneConfig
from .errors import InPlaceError, StructPruneError
from .hub import save_pruned
from .measure import Measure
from .plan import Plan
from .recovery_config import RecoveryConfig
from .registry import Registry
from .report import Report
from .rounds import Rounds, check_rounds, mixture
from .surgery import adopt_config_, skeleton
from .sweep import Sweep


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
            inputs: Calibration inputs by domain, in place of the text that the config names: pixels, or token blocks,
                shape `(samples, ...)`; a part of each is held out.
            inplace: Change and return `model` itself, block by block, which saves the memory of a copy. Otherwise
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
        widths = target_widths(self.config, arch, model.config)
        check_rounds(self.config, arch, widths)
        report = Report(arch.model_type)
        with report.timed("domains"):
            domains = self._domains(model, tokenizer, inputs)
        if self.config.allocation == "global":
            with report.timed("ranking"):
                widths = target_widths(self.config, arch, model.config, self._scores(model, arch, domains, widths))
        measure = Measure(domains, arch.causal)
        with report.timed("perplexity"):
            measure.before(model)
        report.parameters["before"], report.block_parameters["before"] = model.num_parameters(), sum(arch.block_params)

        distils = self.config.recovery is not None and self.config.recovery.kl_weight
        teacher = deepcopy(model) if inplace and distils else model
        work = model if inplace else deepcopy(model)
        try:
            plan = self._rounds_(work, domains, widths, report, measure, tokenizer, teacher)
        except Exception as error:
            if inplace:
                raise InPlaceError(
                    f"Pruning stopped ({error}), and the model had already begun to change: load it again."
                ) from error
            raise
        report.parameters["after"] = work.num_parameters()
        report.block_parameters["after"] = sum(describe(work, self.config.arch_file).block_params)
        whole = {name: {space.layer: space.width for space in arch.of(name)} for name in plan.widths()}
        report.widths = {name: {**whole[name], **at} for name, at in plan.widths().items()}
        report.dense_widths = {name: arch.of(name)[0].size for name in report.widths}
        report.calibration_tokens = {domain.name: domain.blocks.numel() for domain in domains}
        self.plan, self.report = plan, report
        self.manifest = Manifest.of(self.config, domains, tokenizer)
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
        tokenizer: PreTrainedTokenizerBase | None,
        inputs: Mapping[str, Tensor] | None,
    ) -> list[Domain]:
        if inputs is not None:
            domains = given_domains(inputs, float(self.config.holdout))
        else:
            domains = load_domains(self.config, tokenizer, model.config.get_text_config().vocab_size, model=model)
        if self.config.guard:
            guard_batches(domains, self.config.batch_size)  # refuses a domain that is too small
        return domains

    def _scores(
        self, model: PreTrainedModel, arch: ArchSpec, domains: list[Domain], names: Collection[str]
    ) -> dict[tuple[int, str], Tensor]:
        sweep = Sweep(model, arch, self.config, mixture(self.config, domains))
        batches = batches_of(domains, self.config.batch_size)
        training = model.training
        model.eval()
        if sweep.criterion.needs_gradient:
            sweep.saliency = saliencies(model, arch, batches)
        scores = sweep.scores(passes_over(model, arch, batches), names)
        model.train(training)
        return scores

    def prune_to_(
        self,
        model: PreTrainedModel,
        domains: list[Domain],
        widths: Widths,
        report: Report,
        measure: Measure | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Plan:
        """Prune a model in place to given widths, in `config.rounds` rounds, without any recovery.

        Args:
            model: The model that is changed.
            domains: Calibration text.
            widths: Number of units to keep, by space, in every block or by block; they have to be legal.
            report: Takes the time.
            measure: What the dense model gives on held-out text; measured now where a setting asks for it.
            tokenizer: Saved beside the models that `keep_rounds` leaves.
        """
        arch = describe(model, self.config.arch_file)
        training = model.training
        model.eval()
        batches = batches_of(domains, self.config.batch_size)
        experts = {name: width for name, width in widths.items() if arch.of(name)[0].whole}
        rest = {name: width for name, width in widths.items() if name not in experts}
        plan = Plan(arch.model_type, {})
        if experts:
            with report.timed("experts"):
                sweep = Sweep(model, arch, self.config, mixture(self.config, domains))
                new_config = shrunk_config(model.config, arch, experts)
                smaller = skeleton(model, new_config)
                sweep.remove_experts_(passes_over(model, arch, batches), experts, smaller)
                adopt_config_(model, new_config, smaller)
                plan, arch = sweep.plan, describe(model, self.config.arch_file)
        if rest:
            biased = biased_spaces(self.config, arch, rest)
            if measure is None:
                measure = Measure(domains, arch.causal)
                if self.config.measures:
                    measure.before(model)
            rounds = Rounds(model, arch, self.config, domains, report, measure, biased, tokenizer)
            plan = plan.then(rounds.run_(rest))
        model.train(training)
        return plan

    def _rounds_(
        self,
        model: PreTrainedModel,
        domains: list[Domain],
        widths: Widths,
        report: Report,
        measure: Measure,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel,
    ) -> Plan:
        config, recovery = self.config, self.config.recovery
        pruner, steps = self, [dict(widths)]
        if recovery is not None and recovery.every_round:
            arch = describe(model, config.arch_file)
            pruner = type(self)(replace(config, rounds=1))
            steps = [next_legal(model.config, arch, step) for step in round_widths(config, arch, widths)]
        plan = Plan(model.config.model_type, {})
        for number, step in enumerate(steps, start=1):
            plan = plan.then(pruner.prune_to_(model, domains, step, report, measure, tokenizer))
            with report.timed("perplexity"):
                measure.after(model, report)
            if recovery is not None:
                # Training libraries take seconds to import, and most runs do without.
                from .recovery import Recovery

                with report.timed("recovery"):
                    healer = Recovery(_part(recovery, number, len(steps)), config)
                    healer.recover_model(model, tokenizer, teacher)
                    assert healer.report is not None
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


def _part(recovery: RecoveryConfig, number: int, count: int) -> RecoveryConfig:
    """One of `count` equal parts of a recovery, each with its own folder for checkpoints."""
    if count == 1:
        return recovery
    training = dict(recovery.training)
    if "output_dir" in training:
        training["output_dir"] = f"{training['output_dir']}/round-{number}"
    return replace(recovery, tokens=recovery.tokens // count, training=training)
