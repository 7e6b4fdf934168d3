"""Prune a model, and return a smaller model of the same class. `StructPruner.prune` is the main path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arch.load import ModelInfo, describe
from .arch.settings import own_settings
from .arch.spec import EXPERT, HIDDEN, LAYER, MODEL, VOCAB, WHOLE_MODEL, ArchSpec, Widths
from .config.pruning import AUTO, FILE, RunOptions, StructPruneConfig
from .domains.manifest import Manifest, remember_text
from .domains.packing import Domain
from .method.plan import Plan
from .pruning.comparison import Comparison
from .pruning.cost import check_memory
from .pruning.request import PruningRequest, check_arguments, check_config_kind, resolve_request
from .record.figures import FileResult
from .record.report import PruneRecords, Report
from .record.view import request_lines
from .saving.save import save_pruned
from .search.sensitivity import final_widths
from .search.tournament import choose_format, choose_widths
from .steps.base import RunState, Step, refusing_half_pruned
from .steps.data import CalibrationData
from .steps.experts import DropExperts
from .steps.hidden import NarrowHidden
from .steps.layers import DropLayers
from .steps.units import ShrinkLayers
from .steps.vocabulary import ChooseWidths, TrimVocabulary
from .system.errors import StructPruneError, warn
from .system.fingerprint import checksums, shapes_of
from .widths.budget import budget_of
from .widths.schedule import round_widths


@dataclass(frozen=True)
class PruneResult:
    """A pruned model with its tokenizer and its records.

    Attributes:
        model: The pruned model.
        tokenizer: Its tokenizer. It is a new tokenizer if the vocabulary has become smaller, and None if `prune` got
            no tokenizer.
        records: The config, the plan, the report and the manifest. `save` writes them into the folder of the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    records: PruneRecords

    @property
    def config(self) -> StructPruneConfig:
        """Return the config, with the general text that was read."""
        return self.records.config

    @property
    def plan(self) -> Plan:
        """Return the kept units of the original model."""
        return self.records.plan

    @property
    def report(self) -> Report:
        """Return the figures of the run."""
        return self.records.report

    @property
    def manifest(self) -> Manifest:
        """Return the record of the text of this run and of earlier runs of the model."""
        return self.records.manifest

    def save(
        self,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
        model: PreTrainedModel | None = None,
    ) -> None:
        """Save the model, its tokenizer and the records.

        The folder appears only after plain `from_pretrained` has loaded it and computed the same logits.

        Args:
            save_directory: The folder to write to. It is created if it does not exist.
            tokenizer: A tokenizer to save instead of the tokenizer of this result. It may have additional tokens if
                the model has rows for them. If it is the tokenizer of the original model and the vocabulary has become
                smaller, the new tokenizer is saved.
            overwrite: Whether an existing folder is replaced.
            model: The pruned model after further training, if it is another object.

        Raises:
            StructPruneError: If the model has other shapes, the tokenizer has other tokens than the tokenizer of the
                run, the folder exists, or the saved model does not load with the same outputs.
        """
        model = model or self.model
        self._check_shapes(model)
        save_pruned(model, save_directory, self.records, self._tokenizer_to_save(tokenizer), overwrite)

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Raise if a model does not have the shapes of the pruned model."""
        if shapes_of(model) != self.records.shapes:
            raise StructPruneError(
                f"This {type(model).__name__} does not have the shapes of the pruned model. Pass the model of this "
                "result, or a trained copy of it."
            )

    def _tokenizer_to_save(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer that fits the model."""
        if tokenizer is None:
            return self.tokenizer

        keep = self.plan.keep.get((MODEL, VOCAB))
        if keep is None or self.tokenizer is None:
            return tokenizer

        # The ids of the new tokenizer's tokens in the original model. Rows that only a config names have no tokens.
        tokens = self.tokenizer.get_vocab()
        original_ids = {token: keep[number] for token, number in tokens.items() if number < len(keep)}
        is_original_tokenizer = original_ids.items() <= tokenizer.get_vocab().items()
        if is_original_tokenizer:
            return self.tokenizer
        return tokenizer


class StructPruner:
    """A pruner that calibrates, scores, removes and refits units of a model.

    Args:
        config: The settings of the pruning.
        options: Runtime options. The default is `RunOptions()`.

    Attributes:
        result: The result of the last run, or None before the first run.

    Raises:
        StructPruneError: If `config` is not a `StructPruneConfig`, or `options` are not `RunOptions`.
    """

    def __init__(self, config: StructPruneConfig, options: RunOptions | None = None):
        check_config_kind(config, options)
        self.config = config
        self.options = options or RunOptions()
        self.result: PruneResult | None = None

    @own_settings()
    def prune(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inplace: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> PruneResult:
        """Prune a model.

        Args:
            model: A causal language model, an encoder or an encoder-decoder, in any floating-point dtype. A quantized
                model is unpacked first if transformers supports it, unless only tokens are removed.
            tokenizer: The tokenizer of the model, which reads the calibration domains.
            inplace: Whether `model` itself is changed, layer by layer, which saves the memory of a copy.
            inputs: Calibration inputs by domain instead of the text of the config: pixels, or samples of token ids,
                shape `(samples, ...)`. A part of them is held out.

        Returns:
            The pruned model with its tokenizer and its records.

        Raises:
            StructPruneError: If the model, the config or a domain cannot be used, or if the device has too little
                free memory. Nothing has changed then.
            InPlaceError: If pruning in place failed after the model had begun to change.
        """
        check_arguments(model, tokenizer, inputs, inplace)
        info = ModelInfo.of(model, self.config.arch_file)
        request = resolve_request(self.config, info, tokenizer, inputs, options=self.options)
        check_memory(request, inplace)

        earlier = Manifest.seen_by(model)
        report = Report(model_type=info.arch.model_type, criterion=request.config.scored_by)
        with report.timed("domains"):
            data = CalibrationData.read(request.config, model, tokenizer, inputs, self.options, earlier)
        if data.config.recovery is not None:
            from .recovery.text import check_training_text  # training libraries take seconds to import

            manifest = Manifest.of(data.config, data.domains, tokenizer).after(earlier)
            check_training_text(data.config.recovery, data.config, model, tokenizer, manifest)
        state = RunState.start(model, info.arch, data, tokenizer, inplace, report, earlier)

        with refusing_half_pruned(state):
            state.plan = Plan.of(state.model, state.arch)
            report.start(state.model, state.arch)
            if FILE in request.budget.limits:
                report.file = FileResult(asked=int(request.budget.limits[FILE]), predicted=0)
            comparison = None
            if self.options.measure:
                comparison = Comparison(state, request.tokens is not None)
            teacher = self._teacher(state)

            if request.tokens is not None:
                tokens = request.tokens
                choose: ChooseWidths = partial(choose_widths, any_kind=self.config.targets is None)
                if self.config.gguf == AUTO:
                    tokens = replace(tokens, number=None)
                    choose = choose_format
                TrimVocabulary(tokens, choose).apply(state)
            elif self.config.gguf == AUTO:
                state.chosen = choose_format(state)
            widths = final_widths(request, state)
            for step in self.steps(state.arch, state.model, widths):
                self.apply_step_(state, step)
            if comparison is not None:
                comparison.finish()

            if teacher is not None and (state.plan.keep or self.config.gguf != AUTO):
                recover_(state, teacher)
            if comparison is not None:
                comparison.finish_languages()
            self.result = self._finish(state, request)
        return self.result

    def prune_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inplace: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> PreTrainedModel:
        """Prune a model and return the pruned model. `result` has its tokenizer and its records; see `prune`."""
        return self.prune(model, tokenizer, inplace, inputs).model

    def _teacher(self, state: RunState) -> PreTrainedModel | None:
        """Return the original model if the pruned model will be trained, or else None."""
        if state.config.recovery is None:
            return None
        if state.original_model is not None:
            return state.original_model
        return deepcopy(state.model)

    def _finish(self, state: RunState, request: PruningRequest) -> PruneResult:
        """Complete the records of a run, and warn if the target was missed."""
        report = state.report
        report.measured = self.options.measure
        report.finish(state.model, state.arch, state.original_arch, state.plan)
        report.target = state.config.sparsity
        if report.file is not None:
            config = replace(state.config, budget={FILE: report.file.asked})
            report.file.type = config.gguf or ""
            report.file.predicted = int(budget_of(config, state.arch, state.model, ()).original)
        report.speed = request.speed_of(report.final_widths)

        manifest = state.manifest()
        # Evaluations and later runs read the text from the models.
        if state.original_model is not None:
            remember_text(state.original_model, state.original_tokenizer)
        remember_text(state.model, state.tokenizer, manifest)

        for line in request_lines(report):
            if line.startswith("warning: "):
                warn(line.removeprefix("warning: "))

        # The record names tokens as a target only if the user's config does.
        config = state.config
        if config.targets != self.config.targets:
            config = replace(config, targets=self.config.targets)
        measured_weights = None
        if report.measured:
            measured_weights = checksums(state.model)
        records = PruneRecords(config, state.plan, report, manifest, shapes_of(state.model), measured_weights)
        return PruneResult(state.model, state.tokenizer, records)

    def steps(self, arch: ArchSpec, model: PreTrainedModel, widths: Widths) -> Sequence[Step]:
        """Return the steps to the final widths: layers first, then experts, hidden channels, and units in the layers.

        Args:
            arch: The description of the original model. If tokens were removed, it describes the smaller model.
            model: The model that `arch` describes. Only steps of subclasses may depend on it.
            widths: The final widths.
        """
        steps: list[Step] = []

        if LAYER in widths:
            goals = round_widths(self.config, arch, {LAYER: widths[LAYER]})
            steps += [DropLayers(goal) for goal in goals]
        if EXPERT in widths:
            steps.append(DropExperts({EXPERT: widths[EXPERT]}))
        if HIDDEN in widths:
            steps.append(NarrowHidden({HIDDEN: widths[HIDDEN]}))

        inside = {name: width for name, width in widths.items() if name not in WHOLE_MODEL}
        if inside:
            steps.append(ShrinkLayers(inside))
        return steps

    def apply_step_(self, state: RunState, step: Step) -> None:
        """Prune the model of a run by one step. A subclass may measure before or after it, or skip it."""
        step.apply(state)

    @own_settings()
    def prune_to_(self, model: PreTrainedModel, domains: Sequence[Domain], widths: Widths) -> Plan:
        """Prune a model in place to legal widths, without measurements and recovery, and return the plan."""
        if VOCAB in widths:
            raise StructPruneError(f"{VOCAB!r} needs text and its tokenizer, not samples. Use prune_model.")

        arch = describe(model, self.config.arch_file)
        state = RunState.start(model, arch, CalibrationData(self.config, domains, self.options))
        with refusing_half_pruned(state):
            for step in self.steps(arch, model, widths):
                self.apply_step_(state, step)
        return state.plan

    def save(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save the model that the last run returned; see `PruneResult.save`.

        Args:
            model: The model that the last run returned. It may have been trained since.
            save_directory: The folder to write to.
            tokenizer: The tokenizer to save. The default is the tokenizer of the result.
            overwrite: Whether an existing folder is replaced.

        Raises:
            StructPruneError: If the last run did not return the model, or `PruneResult.save` raises.
        """
        if self.result is None or model is not self.result.model:
            raise StructPruneError(
                f"This {type(model).__name__} is not the model that prune_model returned last. Pass that model, or "
                "save a copy of it by `result.save(folder, model=copy)`, with the `result` of `prune`."
            )
        self.result.save(save_directory, tokenizer, overwrite)


def prune(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    options: RunOptions | None = None,
) -> PruneResult:
    """Prune a model in one call, and return it with its tokenizer and its records; see `StructPruner.prune`."""
    return StructPruner(config, options).prune(model, tokenizer, inplace, inputs)


def prune_model(
    model: PreTrainedModel,
    config: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inplace: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    options: RunOptions | None = None,
) -> PreTrainedModel:
    """Prune a model in one call, and return only the model. `prune` also returns its tokenizer and its records."""
    result = prune(model, config, tokenizer, inplace, inputs, options)
    if result.tokenizer is not tokenizer:
        warn("The pruned model has a smaller vocabulary and needs a new tokenizer. Call `prune`, which returns both.")
    return result.model


def recover_(state: RunState, teacher: PreTrainedModel) -> None:
    """Train the pruned model with the original model as its teacher, by the `recovery` of the config."""
    # Training libraries take seconds to import, and most runs have no recovery.
    from .recovery.recover import Recovery
    from .system.processes import unshared

    assert state.config.recovery is not None
    with state.report.timed("recovery"), unshared():
        remember_text(state.model, manifest=state.manifest())
        recovery = Recovery(state.config.recovery, state.config)
        recovery.recover_model(state.model, state.tokenizer, teacher, teacher_tokenizer=state.original_tokenizer)

        assert recovery.report is not None
        state.report.recovery = recovery.report
        state.entries += recovery.entries
