"""The main path: a model in, a smaller model of the same class out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arch.load import ModelInfo, describe
from .arch.spec import EXPERT, HIDDEN, LAYER, MODEL, VOCAB, WHOLE_MODEL, ArchSpec, Widths
from .config.pruning import LOSS, RunOptions, StructPruneConfig
from .domains.manifest import Manifest, remember_text
from .domains.packing import Domain
from .errors import StructPruneError, warn
from .forward.metrics import evaluating, own_settings
from .pruning.measure import Comparison
from .pruning.memory import check_memory
from .pruning.request import ask, check_arguments, check_config_kind
from .pruning.run import UNITS, Run, Step, prune_units_
from .record.plan import Plan
from .record.report import PruneResult, Report
from .sources.data import CalibrationData
from .system.fingerprint import checksums


class StructPruner:
    """Prunes a model by calibration, scoring, removal and refit, in one step or several.

    Args:
        config: What to remove and how.
        options: How the machine does it; None stands for the defaults.

    Attributes:
        used_config: The config, which says after a run what general text has been read.
        report: The numbers of the last run; None before there was one.
        plan: The units of the dense model that the last run kept.
        manifest: The text that the last run used, and what its dense model comes from.
        tokenizer: The tokenizer of what the last run returned: a new one where the vocabulary has become smaller.
        result: All of these, as the model that the last run returned carries them.

    Raises:
        StructPruneError: If `config` is no `StructPruneConfig`, or `options` are no `RunOptions`.
    """

    def __init__(self, config: StructPruneConfig, options: RunOptions | None = None):
        check_config_kind(config, options)
        self.config = self.used_config = config
        self.on_trial = False  # set by a search for a size: languages that are not to keep are not measured
        self.options = options or RunOptions()
        self.report: Report | None = None
        self.plan: Plan | None = None
        self.manifest: Manifest | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.result: PruneResult | None = None

    @own_settings()
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
                model is unpacked first, where transformers can, unless nothing but tokens goes.
            tokenizer: The tokenizer of the model, which reads the calibration domains.
            inplace: Whether `model` itself is changed and returned, layer by layer, which saves the memory of a copy.
                Otherwise `model` is left as it is and a new one is returned.
            inputs: Calibration inputs by domain, in place of the text that the config names: pixels, or samples of
                token ids, shape `(samples, ...)`; a part of each is held out.

        Raises:
            StructPruneError: If the model, the config or a domain cannot be used, or the device has too little memory
                free; nothing has changed then.
            InPlaceError: If pruning failed after a model that was to be changed in place had begun to change.
        """
        check_arguments(model, tokenizer, inputs, inplace)
        model_info = ModelInfo.of(model, self.config.arch_file)
        request = ask(self.config, model_info, tokenizer, inputs, options=self.options)
        if LOSS in (self.config.budget or {}) and tokenizer is not None:
            from .search.loss import prune_within_loss

            return prune_within_loss(self, request, model, tokenizer, inplace)
        check_memory(request, inplace)
        config, arch, widths, tokens = request.config, model_info.arch, request.widths, request.tokens
        report = Report(arch.model_type, config.scored_by)
        with report.timed("domains"):
            data = CalibrationData.read(config, model, tokenizer, inputs, self.options)
        with Run(model, arch, data, tokenizer, inplace, report) as run:
            run.start()
            comparison = Comparison(run, tokens is not None, self.on_trial)
            teacher = run.dense_model or deepcopy(run.model) if run.config.recovery is not None else None
            if tokens is not None:
                from .steps.vocabulary import prune_vocabulary_

                widths = prune_vocabulary_(run, tokens, comparison)
            if widths and run.config.allocation != "uniform":
                from .search.search import choose_shape

                widths = choose_shape(run)
            for step in self.steps(run.arch, run.model, widths) if widths else ():  # or only tokens go
                self.apply_step_(run, step)
            comparison.finish()
            if run.config.recovery is not None:
                run.recover(teacher)
            if report.languages:
                comparison.finish_languages()
            # It says what general text was read, and names tokens only where the caller did.
            self.used_config = data.config if tokens is None else replace(data.config, targets=self.config.targets)
            self._remember(run)
        return run.model

    def _remember(self, run: Run) -> None:
        """Complete the records of a run, keep them here and with its model, and warn of a target that was missed."""
        from .record.summary import request_line

        run.report.finish(run.model, run.arch, run.dense_arch, run.plan)
        run.report.target = run.config.sparsity
        if run.dense_model is not None:
            remember_text(run.dense_model, run.dense_tokenizer)
        self.plan, self.report, self.manifest, self.tokenizer = run.plan, run.report, run.manifest(), run.tokenizer
        remember_text(run.model, run.tokenizer, self.manifest)  # for evaluations and further runs
        tokenizer = None if run.tokenizer is run.dense_tokenizer else run.tokenizer
        records = self.used_config, self.plan, self.report, self.manifest
        vars(run.model)["prune_result"] = self.result = PruneResult(*records, tokenizer, checksums(run.model))
        request = request_line(self.report)
        if request.startswith("warning: "):
            warn(request.removeprefix("warning: "))

    def steps(self, arch: ArchSpec, model: PreTrainedModel, widths: Widths) -> Sequence[Step]:
        """The steps that bring a model to its final widths: layers go first, then experts, then channels of the
        residual stream, then units inside the layers.

        Args:
            arch: The description of the dense model, or once tokens have gone, of the model without them.
            model: The model that `arch` describes; only steps of subclasses may depend on it.
            widths: The final widths.
        """
        steps: list[Step] = []
        if LAYER in widths:
            from .widths.schedule import round_widths

            steps += [Step(LAYER, each) for each in round_widths(self.config, arch, {LAYER: widths[LAYER]})]
        steps += [Step(kind, {kind: widths[kind]}) for kind in (EXPERT, HIDDEN) if kind in widths]
        inside = {name: width for name, width in widths.items() if name not in WHOLE_MODEL}
        if inside:
            steps.append(Step(UNITS, inside))
        return steps

    def apply_step_(self, run: Run, step: Step) -> None:
        """Prune the model of a run by one step, and add to its plan what is kept."""
        step = step._replace(widths={name: width for name, width in step.widths.items() if run.arch.of(name)})
        if not step.widths:  # all that it names went with whole layers
            return
        if step.kind == UNITS and run.config.languages:
            run.data = run.data.with_languages(run.tokenizer)
        with evaluating(run.model):
            if step.kind == UNITS:
                kept = prune_units_(run, step)
            elif step.kind == LAYER:
                from .steps.layers import remove_layers_

                kept = remove_layers_(run, step)
            elif step.kind == EXPERT:
                from .steps.experts import remove_experts_

                kept = remove_experts_(run, step)
            else:
                from .steps.hidden import remove_channels_

                kept = remove_channels_(run, step)
            run.plan = run.plan.then(kept)
        run.arch = describe(run.model, run.config.arch_file)

    @own_settings()
    def prune_to_(self, model: PreTrainedModel, domains: Sequence[Domain], widths: Widths) -> Plan:
        """Prune a model in place to legal widths, unmeasured and without recovery; it returns the plan."""
        if VOCAB in widths:
            raise StructPruneError(f"{VOCAB!r} takes text and its tokenizer, not samples; use prune_model.")
        arch = describe(model, self.config.arch_file)
        with Run(model, arch, CalibrationData(self.config, domains, self.options)) as run:
            for step in self.steps(arch, model, widths):
                self.apply_step_(run, step)
        return run.plan

    def save(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save the pruned model with the config, the plan, the report and the manifest of the run that returned it.

        The folder appears only after plain `from_pretrained` has loaded it and given the same logits.

        Args:
            model: What `prune_model` returned.
            save_directory: The folder to write to; it is made if need be.
            tokenizer: The tokenizer that is saved beside the model; where the vocabulary has become smaller, that of
                the dense model and None stand for the new one. It may have tokens that the run's own has not, as long
                as the model has rows for them.
            overwrite: Whether a folder that exists is replaced.

        Raises:
            StructPruneError: If no pruning returned the model, the tokenizer has other tokens than the one of the run,
                the folder exists, or what is saved does not come back the same.
        """
        from .saving.save import save_pruned

        result: PruneResult | None = vars(model).get("prune_result")
        if result is None:
            raise StructPruneError(
                f"This {type(model).__name__} is not what prune_model returned, so there is nothing to save with it; "
                "pass the model that it returned, or the model itself after inplace=True."
            )
        if result.tokenizer is not None:
            # Rows that only a config names have no tokens.
            kept, tokens = result.plan.keep[MODEL, VOCAB], result.tokenizer.get_vocab().items()
            dense = {token: kept[number] for token, number in tokens if number < len(kept)}
            if tokenizer is None or dense.items() <= tokenizer.get_vocab().items():
                tokenizer = result.tokenizer
        save_pruned(model, save_directory, result, tokenizer, overwrite)


def prune_model(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    options: RunOptions | None = None,
) -> PreTrainedModel:
    """Prune a model in one call; see `StructPruner.prune_model`."""
    pruned = StructPruner(config, options).prune_model(model, tokenizer, inplace=inplace, inputs=inputs)
    if vars(pruned)["prune_result"].tokenizer is not None:
        warn("The model has a smaller vocabulary, and so another tokenizer: `model.prune_result.tokenizer`.")
    return pruned
