"""Train a pruned model with the original model as its teacher, and save it: `Recovery` and `recover`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, wait_for_everyone
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from ..arch.devices import default_device
from ..arch.hooks import without_new_forward_hooks
from ..arch.inference import evaluating
from ..arch.meta import check_changeable, positions_of, predicts_next
from ..arch.settings import own_settings
from ..config.domains import DomainConfig
from ..config.fields import read_json
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..distillation.heads import load_any_teacher
from ..distillation.teacher import Teacher, load_teacher
from ..distillation.teacher_file import StoredTeacher, stored_teacher
from ..distillation.teacher_file_writer import write_teacher
from ..domains.manifest import (
    MANIFEST_NAME,
    Entry,
    Manifest,
    check_kinds,
    check_tokens,
    remember_text,
    tokenizer_of,
)
from ..domains.packing import check_reads_any_text
from ..measure.batches import SampleCollator
from ..measure.languages import cost_by_language
from ..record.cost import check_recovery_memory, recovery_cost
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME, RecoveryReport, Report
from ..saving.save import RECORD_NAMES, save_checked
from ..system.disk import Output, used_paths
from ..system.errors import StructPruneError, warn
from ..system.processes import across_processes
from ..system.stages import stage
from ..system.written import replace_json
from .adapter import lora_config, trainable
from .arguments import TrainingSize, training_arguments
from .checks import check_recovery, trains_on_cpu
from .encoders import ENCODER_TRAINING, Passages, check_has_teacher, train_encoder
from .learning_rate import NUM_TRIAL_SAMPLES, lower_learning_rate_
from .measure import check_loss, enter_curve, enter_measurements, measure_all, validation_loss
from .resume import TrainingInputs
from .teacher_cache import CachedData, TeacherCache, check_other_files, sample_settings, teacher_hash
from .text import sample_length, text_config
from .training import NothingGainedWarning, ShowProgress, StopAtNaN, recovery_trainer, train
from .training_data import ANSWERS, VALIDATION, RecoveryData


__all__ = ["NothingGainedWarning", "Recovery", "check_recovery", "recover"]


class Recovery:
    """A recovery of a pruned causal language model by training.

    After `recover_model`, `report` has the figures of the run, and `entries` the text that it used. `pruning_report`
    is the report in `pruned`, with the languages of the recovered model, or None.

    Args:
        config: How the model is trained.
        pruning: How the model was pruned. Its domains and its seed are the defaults for `config`, and its seed
            determines the documents that are held out.
        callbacks: Further callbacks for the Trainer.
        pruned: The folder of the pruned model. `save` copies its pruning config, plan, report and manifest, which the
            constructor reads.

    Raises:
        StructPruneError: If `config` is not a `RecoveryConfig`.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        pruned: str | Path | None = None,
    ):
        if not isinstance(config, RecoveryConfig):
            raise StructPruneError(f"`config` must be a RecoveryConfig, got {type(config).__name__}.")
        self.config = config
        self.callbacks = list(callbacks)
        self.pruning = pruning or StructPruneConfig(sparsity=0.5)  # the amount is not used

        self.entries: list[Entry] = []
        self.report: RecoveryReport | None = None
        self._manifest: Manifest | None = None

        self._pruned = pruned
        self._records: dict[str, bytes] = {}
        self.pruning_report: Report | None = None
        self._earlier: list[dict[str, Any]] = []
        if pruned is not None:
            self._read_records(Path(pruned))

    def _read_records(self, folder: Path) -> None:
        """Read the records of a pruned model, and the configs of earlier recoveries."""
        for name in RECORD_NAMES:
            if (folder / name).is_file():
                self._records[name] = (folder / name).read_bytes()

        # The report is copied even if it cannot be read.
        with suppress(StructPruneError):
            self.pruning_report = Report.load(folder / REPORT_NAME)

        path = folder / RECOVERY_REPORT_NAME
        if path.is_file():
            report = RecoveryReport.load(path)
            if report is not None:
                self._earlier += report.earlier
            self._earlier.append(dict(read_json(folder / RECOVERY_CONFIG_NAME)))

    @own_settings()
    def recover_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel | str | None = None,
        resume: bool = False,
        trust_remote_code: bool = False,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_cache: str | Path | None = None,
    ) -> PreTrainedModel:
        """Train a model; see `recover`."""
        config = self.config
        cached = None
        if teacher_cache is None:
            self._check(model, tokenizer, teacher)
        else:
            cached = self.cache_teacher(model, tokenizer, teacher, teacher_cache, trust_remote_code, teacher_tokenizer)

        if not predicts_next(model):
            assert tokenizer is not None  # `_check` needs one
            return self._recover_encoder(model, tokenizer, teacher, resume, trust_remote_code, teacher_tokenizer)

        seq_length = sample_length(config, model)
        size = TrainingSize(config.tokens // seq_length, seq_length)
        seed = self.pruning.seed
        if config.seed is not None:
            seed = config.seed

        earlier = self._seen_by(model)
        with ExitStack() as stack:
            # The Trainer moves the model to its own device.
            stack.callback(_return_to, model.device, model)
            scratch = ""
            if "output_dir" not in config.training:
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
            # The arguments start the communication of several processes, which write answers together.
            arguments = training_arguments(config, size, seed, trains_on_cpu(model), scratch)

            used_teacher: Teacher | StoredTeacher | None = None
            loaded = None
            name = None
            if cached is not None:
                used_teacher = stored_teacher(cached.folder, model, tokenizer, teacher_tokenizer)
                name = used_teacher.file.manifest.teacher
            elif teacher is not None:
                dtype = None  # a teacher in memory keeps its dtype
                if arguments.bf16 and isinstance(teacher, (str, Path)):
                    dtype = torch.bfloat16
                loaded = load_teacher(teacher, model, tokenizer, teacher_tokenizer, trust_remote_code, dtype)
                name = loaded.model.name_or_path or ""
                used_teacher = loaded
                stack.enter_context(evaluating(loaded.model))

            text = text_config(config, self.pruning, seq_length)
            inputs = TrainingInputs.of(replace(config, seed=seed, seq_length=seq_length), text, model, name)
            folder = str(broadcast_object_list([arguments.output_dir])[0])  # the folder of the first process
            checkpoint = None
            if resume:
                checkpoint = inputs.last_checkpoint(folder)

            data: RecoveryData | CachedData
            with stage("domains", {}):
                if cached is not None:
                    data = cached.data
                else:
                    data = RecoveryData(config, self.pruning, seq_length, model, tokenizer, loaded, earlier)

            # The number of evaluations depends on the number of validation samples.
            size = replace(size, num_validation=len(data.validation))
            arguments = training_arguments(config, size, seed, trains_on_cpu(model), folder)
            arguments.output_dir = folder
            recovered, report = self._trained(model, seed, data, used_teacher, arguments, inputs, checkpoint)
            wait_for_everyone()

        if report.kept_step:
            self._measure_languages(recovered, tokenizer)
        report = replace(report, teacher=name or "", earlier=self._earlier)
        self._record(recovered, tokenizer, data, report, earlier)
        if report.stopped or not report.kept_step:
            warn(report.stopped or report.checkpoint_phrase, NothingGainedWarning)
        return recovered

    def cache_teacher(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel | str | None,
        folder: str | Path,
        trust_remote_code: bool = False,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> TeacherCache:
        """Write the text of the training and the teacher's predictions on it, unless a folder has them already.

        The model may be on the meta device, so that only the teacher is in memory. See `recover` for the arguments.

        Raises:
            StructPruneError: If the folder holds something else, or has no predictions and there is no teacher.
        """
        config = self.config
        if not predicts_next(model):
            raise StructPruneError(
                f"A teacher cache holds predictions of next tokens, and {type(model).__name__} has none. Remove "
                "`teacher_cache`."
            )
        self._check(model, tokenizer, teacher)
        seq_length = sample_length(config, model)
        earlier = self._seen_by(model)
        cache = TeacherCache(folder, sample_settings(config, self.pruning, seq_length, earlier))
        cache.check_teacher(teacher)
        if cache.is_complete:
            return cache
        if teacher is None:
            raise StructPruneError(f"{folder} holds no complete teacher cache. Pass the `teacher`, which writes it.")

        size = TrainingSize(config.tokens // seq_length, seq_length)
        with Output(folder).locked(), tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(config, size, self.pruning.seed, trains_on_cpu(model), scratch)
            dtype = None
            if arguments.bf16 and isinstance(teacher, (str, Path)):
                dtype = torch.bfloat16
            loaded = load_teacher(teacher, model, tokenizer, teacher_tokenizer, trust_remote_code, dtype)
            loaded.place(PartialState())

            if cache.record is None:
                with stage("domains", {}), evaluating(loaded.model):
                    data = RecoveryData(config, self.pruning, seq_length, model, tokenizer, loaded, earlier)
                    cache.save(data, teacher_hash(teacher))
            with across_processes():
                write_teacher(loaded.model, cache.data.documents(), folder, loaded.tokenizer)
        return cache

    def _recover_encoder(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Any,
        resume: bool,
        trust_remote_code: bool,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
    ) -> PreTrainedModel:
        """Train a model that does not predict the next token towards the outputs of its teacher."""
        seq_length = sample_length(self.config, model)
        seed = self.pruning.seed if self.config.seed is None else self.config.seed
        training = ENCODER_TRAINING | self.config.training
        if trains_on_cpu(model):
            training.setdefault("bf16", False)  # not faster on a CPU without AMX
        config = replace(self.config, seed=seed, seq_length=seq_length, training=training)
        original = load_any_teacher(teacher, model, None, trust_remote_code)
        reader = teacher_tokenizer or tokenizer_of(original, trust_remote_code) or tokenizer
        earlier = self._seen_by(model)

        with ExitStack() as stack:
            stack.callback(_return_to, model.device, model)
            stack.enter_context(evaluating(original))
            folder = config.training.get("output_dir") or stack.enter_context(tempfile.TemporaryDirectory())
            text = text_config(config, self.pruning, seq_length)
            inputs = TrainingInputs.of(config, text, model, original.name_or_path or "")
            checkpoint = inputs.last_checkpoint(folder) if resume else None
            with stage("domains", {}):
                data = Passages(config, self.pruning, seq_length, original, reader, earlier)

            size = TrainingSize(len(data.training), seq_length, len(data.validation))
            arguments = training_arguments(config, size, seed, trains_on_cpu(model), folder)
            arguments.output_dir = folder
            callbacks = [*self.callbacks, inputs]
            report = train_encoder(model, tokenizer, original, reader, data, arguments, callbacks, checkpoint)

        self._measure_languages(model, tokenizer)
        self.report = replace(report, teacher=original.name_or_path or "", earlier=self._earlier)
        self.entries = data.entries
        self._manifest = (earlier or Manifest.of(self.pruning, [], tokenizer)).with_entries(self.entries)
        remember_text(model, tokenizer, self._manifest)
        if report.stopped or not report.kept_step:
            warn(report.stopped or report.checkpoint_phrase, NothingGainedWarning)
        return model

    def _check(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel | str | None,
    ) -> None:
        """Raise `StructPruneError` if the model cannot be trained, before the teacher is loaded."""
        check_kinds(model, tokenizer)
        check_changeable(model)
        check_recovery(self.config, self.pruning, model)
        check_has_teacher(model, teacher)
        check_other_files(self._pruned, teacher)
        check_tokens(model, tokenizer)
        check_reads_any_text(tokenizer)
        if not predicts_next(model):
            return
        # A teacher in a folder is assumed to be as large as the model.
        original = model
        if isinstance(teacher, PreTrainedModel):
            original = teacher
        cost = recovery_cost(self.config, original, model, sample_length(self.config, model))
        check_recovery_memory(cost, default_device(), loaded=True)

    def _seen_by(self, model: PreTrainedModel) -> Manifest | None:
        """Return the text that the model has seen, from memory or from the folder of the pruned model."""
        manifest = Manifest.seen_by(model)
        if manifest is None and MANIFEST_NAME in self._records:
            return Manifest.load(str(self._pruned))
        return manifest

    def _measure_languages(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Enter the costs of languages for the recovered model into the report of the pruning."""
        report = self.pruning_report
        if report is None or not report.languages or tokenizer is None:
            return

        codes = [code for code, language in report.languages.items() if language.cost.ratio is not None]
        with stage("languages", {}):
            wanted_codes = [code for code in codes if report.languages[code].wanted]
            costs = cost_by_language(model, tokenizer, codes, wanted_codes)
        for code in codes:
            language = report.languages[code]
            language.cost = replace(language.cost, pruned=costs.get(code))

    def _trained(
        self,
        model: PreTrainedModel,
        seed: int,
        data: RecoveryData | CachedData,
        teacher: Teacher | StoredTeacher | None,
        arguments: TrainingArguments,
        inputs: TrainingInputs,
        checkpoint: str | None,
    ) -> tuple[PreTrainedModel, RecoveryReport]:
        """Train a model, and return it with the weights of the best checkpoint, or unchanged if none is better."""
        config = self.config
        alignment = None
        value = "loss"
        if teacher is not None:
            alignment = teacher.alignment
            value = "kl"
        collator = SampleCollator(alignment, positions_of(model))
        adapter = None
        if config.train != "full":
            adapter = lora_config(config, model)

        seq_length = data.seq_length

        def tokens_after(steps: int) -> int:
            return _samples_read(steps, config.tokens // seq_length, arguments) * seq_length

        stopper = StopAtNaN()
        shown = ShowProgress(value, tokens_after)
        callbacks = self.callbacks + [inputs, stopper, shown]
        set_seed(seed)  # for the values of the adapter
        # peft puts a hook on the embedding of a model with activation checkpointing.
        own_hooks = without_new_forward_hooks(model.get_input_embeddings())
        with own_hooks, trainable(model, adapter) as (trained, take_back):
            trainer = recovery_trainer(trained, arguments, data, collator, teacher, callbacks)
            with stage("perplexity", {}):
                pruned = measure_all(trained, data.measured, teacher, trainer.accelerator)
            kinds = [kind for kind, samples in data.measured.items() if samples and samples[0] in data.validation]
            pruned_loss = validation_loss(pruned, kinds, value)
            check_loss(pruned_loss)

            # Trial steps store all activations, which do not fit if the training needs activation checkpointing.
            if "learning_rate" not in config.training and not arguments.gradient_checkpointing:
                batches = [collator([sample]) for sample in islice(data.stream, NUM_TRIAL_SAMPLES)]
                lower_learning_rate_(trainer, batches, take_back)
            with closing(shown):
                seconds = train(trainer, checkpoint)

            with stage("perplexity", {}):
                recovered = measure_all(trained, data.measured, teacher, trainer.accelerator)
            is_better = validation_loss(recovered, kinds, value) < pruned_loss
            if not is_better:  # also if a loss is NaN
                take_back()
                recovered = pruned

        if adapter is not None:
            trained = trained.merge_and_unload()

        steps = trainer.state.global_step
        kept_step = 0
        if is_better:
            kept_step = trainer.state.best_global_step or steps
        report = RecoveryReport(
            tokens=tokens_after(steps),
            steps=steps,
            seconds=seconds,
            kept_step=kept_step,
            stopped=stopper.message,
            learning_rate=arguments.learning_rate,
        )
        enter_measurements(report, pruned, recovered, {VALIDATION, ANSWERS})
        enter_curve(report, trainer.state.log_history)
        return trained, report

    def _record(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        data: RecoveryData | CachedData,
        report: RecoveryReport,
        earlier: Manifest | None,
    ) -> None:
        """Store the report and the text of the run, and attach the manifest to the model."""
        self.report = report
        if self.report.unseen is not None:
            self.report.unseen.source = data.unseen.source
        self.entries = data.entries
        manifest = earlier or Manifest.of(self.pruning, [], tokenizer)
        self._manifest = manifest.with_entries(self.entries)
        remember_text(model, tokenizer, self._manifest)

    def save(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save the model that `recover_model` returned, with the config and the report of the run.

        Args:
            model: The recovered model.
            save_directory: The folder to write to. It appears only after the result has been read back.
            tokenizer: The tokenizer to save with the model.
            overwrite: Whether an existing folder is replaced.

        Raises:
            StructPruneError: If the folder exists, this `Recovery` has not trained the model, the tokenizer has other
                tokens than the tokenizer that read the text, or the saved model differs from the model in memory.
        """
        report = self.report
        if report is None or Manifest.seen_by(model) is not self._manifest:
            raise StructPruneError(
                "`save` takes the model that `recover_model` returned. Call `recover_model`, and pass its result."
            )

        from ..saving.card import write_card  # imported here because its libraries take long to import

        def write(folder: Path) -> None:
            for name, record in self._records.items():
                (folder / name).write_bytes(record)
            if self.pruning_report is not None and self.pruning_report.languages:
                self.pruning_report.save(folder / REPORT_NAME)
            if self._manifest is not None:
                self._manifest.save(folder / MANIFEST_NAME)
            replace_json(folder / RECOVERY_CONFIG_NAME, self.config.without_output_dir().to_dict())
            report.save(folder / RECOVERY_REPORT_NAME)
            write_card(folder, save_directory, model, self.pruning.arch_file)

        save_checked(model, save_directory, tokenizer, overwrite, write, used_paths(self.config, self.pruning))


def _return_to(device: torch.device, model: PreTrainedModel) -> None:
    """Move a model back to its device."""
    if model.device != device:
        model.to(device)  # type: ignore[arg-type]


def _samples_read(steps: int, num_samples: int, arguments: TrainingArguments) -> int:
    """Return the number of samples that a training has read. The last batch of an epoch may not be full."""
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    per_step = per_process * arguments.world_size
    epochs, further_steps = divmod(steps, ceil(num_samples / per_step))
    return epochs * num_samples + further_steps * per_step


def recover(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RecoveryConfig | None = None,
    teacher: PreTrainedModel | str | None = None,
    domains: Iterable[DomainConfig] | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_cache: str | Path | None = None,
) -> PreTrainedModel:
    """Train a pruned model in one call. Use `Recovery` for the figures of the run, and to save the result.

    Args:
        pruned: A causal language model. It is changed in place and returned. If the training fails, it is unchanged.
        tokenizer: The model's tokenizer, which reads the domains.
        config: How the model is trained.
        teacher: A model, or its id or folder, whose predictions the model learns; usually the original model.
        domains: The training text if the config has no domains.
        resume: Whether to resume from the last checkpoint in the `output_dir` of `config.training`. The model, the
            text, the teacher and the settings must be those that the training began with.
        trust_remote_code: Whether a teacher that is loaded may run code from its folder.
        teacher_tokenizer: The tokenizer of the teacher. By default it is the tokenizer that the teacher was pruned
            with, or the tokenizer in its folder. Without any, a teacher with as many tokens has the same tokens.
        teacher_cache: A folder for the text of the training and the teacher's predictions on it. It is written if it
            does not exist, and the training then needs no teacher in memory. Later calls with other widths, learning
            rates or seeds read it, and need no `teacher`. The divergences of the report are unbiased estimates.

    Returns:
        The model, with the adapter merged.

    Raises:
        StructPruneError: If the config cannot be used (see `check_recovery`), there is too little text, the teacher
            has other tokens or is the model itself, peft cannot place the adapter, or no checkpoint to resume from
            exists.

    Warns:
        NothingGainedWarning: If no checkpoint is nearer to the teacher than the pruned model, which is then returned
            unchanged, or if the training ended early.
    """
    config = config or RecoveryConfig()
    if domains is not None and config.domains is None:
        config = replace(config, domains=list(domains))
    return Recovery(config).recover_model(
        pruned, tokenizer, teacher, resume, trust_remote_code, teacher_tokenizer, teacher_cache
    )
