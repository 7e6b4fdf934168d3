"""Trains a pruned model on the recovery domains, with or without a teacher, and saves it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, wait_for_everyone
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from ..arch.meta import check_changeable, check_positions, is_offloaded, predicts_next
from ..config.domains import DomainConfig
from ..config.fields import read_json
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.load import texts_of
from ..domains.manifest import MANIFEST_NAME, TRAINED, Entry, Manifest, check_kinds, check_tokens, remember_text
from ..domains.packing import Domain
from ..domains.sources import documents
from ..errors import StructPruneError, warn
from ..forward.metrics import own_settings
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, RecoveryReport
from ..saving.save import RECORD_NAMES, save_checked
from ..sources.other import OtherText, other_text
from ..system.disk import check_folder, used_paths
from ..system.processes import check_launch
from ..system.stages import stage
from ..written import replace_json
from .adapter import check_fits, lora_config, trainable
from .answers import read_prompts
from .resume import TrainingInputs
from .teacher import Teacher, load_teacher
from .text import VALIDATION, text_config, training_text, validation_text
from .trainer import DistillTrainer, NothingGainedWarning, enter_measurements, training_arguments
from .training_data import TrainingData


class Recovery:
    """Trains a pruned causal language model.

    After `recover_model`, `report` holds the numbers of the run, and `entries` the text that it used.

    Args:
        config: How the model is trained.
        pruning: How the model was pruned. It gives the domains, the sample length and the seed that `config` leaves
            open, and says which documents were held out.
        callbacks: Further callbacks for the Trainer.
        pruned: The folder of the pruned model, whose pruning config, plan, report and manifest `save` copies where it
            has them, as they are when the recovery is made.

    Raises:
        StructPruneError: If `config` is no `RecoveryConfig`.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        pruned: str | Path | None = None,
    ):
        if not isinstance(config, RecoveryConfig):
            raise StructPruneError(f"A recovery takes a RecoveryConfig, got {type(config).__name__}.")
        self.config, self.callbacks = config, callbacks
        self.pruning = pruning or StructPruneConfig(sparsity=0.5)  # its amount is not used
        self.entries: list[Entry] = []
        self._manifest: Manifest | None = None
        names = [name for name in RECORD_NAMES if pruned and Path(pruned, name).is_file()]
        self._records = {name: Path(str(pruned), name).read_bytes() for name in names}
        self._pruned = pruned
        self._earlier: list[dict[str, Any]] = []
        if pruned and Path(pruned, RECOVERY_REPORT_NAME).is_file():
            earlier = RecoveryReport.load(Path(pruned, RECOVERY_REPORT_NAME))
            self._earlier = [] if earlier is None else list(earlier.earlier)
            self._earlier.append(dict(read_json(Path(pruned, RECOVERY_CONFIG_NAME))))
        self.report: RecoveryReport | None = None

    @own_settings()
    def recover_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel | str | None = None,
        resume: bool = False,
        trust_remote_code: bool = False,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> PreTrainedModel:
        """Train a model; see `recover`."""
        config = self.config
        check_kinds(model, tokenizer)
        check_changeable(model)
        check_recovery(config, self.pruning, model)
        check_tokens(model, tokenizer)
        taught_by = None
        if teacher is not None:
            taught_by = load_teacher(teacher, model, tokenizer, teacher_tokenizer, trust_remote_code)
        name = None if taught_by is None or taught_by.model is None else taught_by.model.name_or_path or ""
        seen = Manifest.seen_by(model)
        if seen is None and MANIFEST_NAME in self._records:
            seen = Manifest.load(str(self._pruned))
        seed = self.pruning.seed if config.seed is None else config.seed
        inputs = TrainingInputs.of(replace(config, seed=seed), model, name)
        with nullcontext("") if "output_dir" in config.training else tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(config, seed, model.device.type == "cpu", scratch)
            arguments.output_dir = broadcast_object_list([arguments.output_dir])[0]  # all read what the first writes
            checkpoint = inputs.last_checkpoint(str(arguments.output_dir)) if resume else None
            with stage("domains", {}):
                domains, validation, other = self._texts(model, tokenizer, taught_by, seen)
                seeds = seed, self.pruning.seed
                data = TrainingData(config, domains, validation, other.rows, model, taught_by, seeds, arguments)
            recovered, outcome = self._trained(model, seed, data, arguments, inputs, checkpoint)
            wait_for_everyone()
        self.report = replace(outcome, teacher=name or "", earlier=self._earlier)
        if self.report.unseen is not None:
            self.report.unseen.source = other.source
        self.entries = [*(Entry.of(domain, TRAINED) for domain in domains), *other.entries]
        self._manifest = (seen or Manifest.of(self.pruning, [], tokenizer)).with_entries(self.entries)
        remember_text(recovered, tokenizer, self._manifest)
        if outcome.stopped or not outcome.kept_step:
            warn(outcome.stopped or outcome.kept, NothingGainedWarning)
        return recovered

    def _texts(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: Teacher | None,
        seen: Manifest | None,
    ) -> tuple[list[Domain], Tensor | None, OtherText]:
        # A teacher reads in its own tokens, also where the model has lost some. It writes the text of a domain that is
        # written, which is better then, and which the pruning has kept.
        config, pruning = self.config, self.pruning
        if teacher is None or teacher.model is None or teacher.tokenizer is None:
            return training_text(config, pruning, tokenizer, model, seen), None, OtherText("")
        domains = training_text(config, pruning, teacher.tokenizer, teacher.model, seen)
        other = other_text(text_config(config, pruning), teacher.model, teacher.tokenizer, domains)
        trained = {name for domain in domains for name in domain.documents}
        return domains, validation_text(config, pruning, teacher.tokenizer, trained), other

    def _trained(
        self,
        model: PreTrainedModel,
        seed: int,
        data: TrainingData,
        arguments: TrainingArguments,
        inputs: TrainingInputs,
        checkpoint: str | None,
    ) -> tuple[PreTrainedModel, RecoveryReport]:
        # The model has the values of the best checkpoint in the end, or those of before if these are better.
        config = self.config
        before = data.measure(model)
        fewer_tokens = data.teacher is not None and data.teacher.parts is not None
        adapter = None if config.train == "full" else lora_config(config, model, fewer_tokens)
        set_seed(seed)  # of the adapter's values
        with trainable(model, adapter) as (trained, take_back):
            trainer = DistillTrainer(trained, arguments, data, [*self.callbacks, inputs])
            # Trials keep all activations, for which there may be no room where some are computed anew.
            tries = "learning_rate" not in config.training and not arguments.gradient_checkpointing
            done = trainer.train(resume_from_checkpoint=checkpoint, take_back=take_back if tries else None)
            outcome = trainer.outcome(done.metrics["train_runtime"])
            if data.validation_loss(trained) >= data.loss_in(before):
                take_back()
                outcome.kept_step = 0
        if adapter is not None:
            trained = trained.merge_and_unload()
        enter_measurements(outcome, before, data.measure(trained) if outcome.kept_step else before)
        return trained, outcome

    def save(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save what `recover_model` returned, with the config and the report of the run.

        Args:
            model: The recovered model.
            save_directory: The folder to write to; it appears only after the result has been read back.
            tokenizer: The tokenizer that is saved beside the model.
            overwrite: Whether a folder that exists is replaced.

        Raises:
            StructPruneError: If the folder exists, this has not trained the model, the tokenizer has other tokens than
                the one that read the text, or the result does not come back the same.
        """
        report = self.report
        if report is None or Manifest.seen_by(model) is not self._manifest:
            raise StructPruneError("Only what recover_model returned can be saved; call it, and pass that.")

        from ..saving.card import leave_card  # only what saves pays for it

        def write(folder: Path) -> None:
            for name, record in self._records.items():
                (folder / name).write_bytes(record)
            if self._manifest is not None:
                self._manifest.save(folder / MANIFEST_NAME)
            replace_json(folder / RECOVERY_CONFIG_NAME, self.config.without_output_dir().to_dict())
            report.save(folder / RECOVERY_REPORT_NAME)
            leave_card(folder, save_directory, model, self.pruning.arch_file)

        save_checked(model, save_directory, tokenizer, overwrite, write, used_paths(self.config, self.pruning))


def recover(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RecoveryConfig | None = None,
    teacher: PreTrainedModel | str | None = None,
    domains: Iterable[DomainConfig] | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Train a pruned model in one call. `Recovery` does the same, keeps the numbers and saves.

    Args:
        pruned: A causal language model. It is trained itself and comes back; after a failure it is as it was.
        tokenizer: The model's tokenizer, which reads the domains.
        config: How the model is trained.
        teacher: A model, or its id or folder, that the trained one should agree with; usually the dense model.
        domains: The training text where the config names none.
        resume: Whether training goes on from the last checkpoint in the `output_dir` of `config.training`. The model,
            the text, the teacher and the settings have to be those that it began with.
        trust_remote_code: Whether a teacher that is loaded may run code from its folder.
        teacher_tokenizer: The tokenizer of the teacher, by default the one that it was pruned with or that lies where
            it was loaded from. Where there is none, a teacher of as many tokens is taken to have the same ones.

    Returns:
        The model, with the adapter merged.

    Raises:
        StructPruneError: If the config asks for what cannot be (see `check_recovery`), there is no text, the teacher
            has other tokens or is the model itself, peft cannot place the adapter, the loss was never finite, or there
            is nothing to resume.

    Warns:
        NothingGainedWarning: If no checkpoint was nearer to the teacher than the model was before, so that the model
            comes back as it was, or if the training ended early.
    """
    config = config or RecoveryConfig()
    if domains is not None and config.domains is None:
        config = replace(config, domains=list(domains))
    return Recovery(config).recover_model(pruned, tokenizer, teacher, resume, trust_remote_code, teacher_tokenizer)


def check_recovery(config: RecoveryConfig, pruning: StructPruneConfig, model: PreTrainedModel) -> None:
    """Refuse a recovery that would fail later."""
    check_launch()
    for name in ("fsdp", "deepspeed"):  # before transformers sets up anything for them
        if config.training.get(name):
            raise StructPruneError(
                f"training's {name} is not supported: every process holds the whole model; leave it out."
            )
    text = text_config(config, pruning)
    _check_model(model, config, text.seq_length)
    if config.prompts is not None:
        read_prompts(config.prompts)
    validation = [] if config.validation is None else [DomainConfig(name=VALIDATION, source=config.validation)]
    for domain in [*texts_of(text), *validation]:
        # Opening a source refuses a name that leads nowhere; nothing is read before the first document.
        documents(domain, text.seed, None, lambda name, seed: iter(()))
    if config.train == "lora":
        check_fits(model, lora_config(config, model))
    # A model without weights will be on the GPU, if there is one.
    on_cpu = model.device.type == "cpu" or not torch.cuda.is_available()
    training_arguments(config, text.seed, on_cpu, tempfile.gettempdir())
    if "output_dir" in config.training:
        check_folder(config.training["output_dir"])


def _check_model(model: PreTrainedModel, config: RecoveryConfig, seq_length: int) -> None:
    name = type(model).__name__
    if not predicts_next(model):
        raise StructPruneError(
            f"Recovery trains causal language models, and {name} is none; train it with a Trainer and its own loss, "
            "as docs/recovery.md does with a classifier."
        )
    if is_offloaded(model):
        raise StructPruneError(
            f"Recovery trains weights in memory, and {name} is offloaded; leave recovery out, save, and recover the "
            "smaller model."
        )
    check_positions(model, seq_length, f"The recovery's seq_length={seq_length}")
    if config.train == "full" and model.dtype == torch.float16:
        raise StructPruneError(
            f"train='full' moves the weights of {name} in their own float16, which is too coarse for an optimizer; "
            "load the model in float32, or train='lora'."
        )
