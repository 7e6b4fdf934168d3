"""Training after pruning on the recovery domains, with or without a teacher; an adapter is merged at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Literal, overload

from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..config.domains import DomainConfig
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.load import Domain
from ..errors import StructPruneError
from ..forward.metrics import own_settings, perplexity
from ..plain_json import replace_json
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME
from ..saving.hub import RECORDS, check_reload, save_checked
from ..system.disk import used_paths
from ..system.fingerprint import tensor_hash
from .adapter import adapter_config, check_adapter, fresh_adapter, merge_adapter_
from .checkpoints import last_checkpoint
from .checks import check_recovery
from .identity import Identity, settings_of, weights_hash
from .outcome import RecoveryOutcome
from .sharding import to_train
from .teacher import TeacherLogits, TrainingSamples, check_teacher, load_teacher, write_teacher_logits
from .text import part_rows, samples_of, training_text
from .trainer import DistillTrainer, train_, training_arguments
from .weights import every_weight


class Recovery:
    """Trains a pruned causal language model.

    After `recover_model`, `report` holds the numbers of the run, and `report.worse` says whether it made the model
    worse.

    Args:
        config: How the model is trained.
        pruning: How the model was pruned. It gives the domains, the sample length and the seed that `config` leaves
            open, and says which documents were held out.
        callbacks: Further callbacks for the Trainer.
        part: The part of the text, from 1, that is trained on where the training is divided over rounds of pruning.
        parts: The number of these parts; no sample is in two of them. With more than one, the checkpoints of each part
            go into a folder `round-PART` of their own.

    Raises:
        StructPruneError: If `config` is no `RecoveryConfig`.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        part: int = 1,
        parts: int = 1,
    ):
        if not isinstance(config, RecoveryConfig):
            raise StructPruneError(f"A recovery takes a RecoveryConfig, got {type(config).__name__}.")
        self.config = config
        self.callbacks = callbacks
        self.pruning = pruning or StructPruneConfig(sparsity=0.5)  # its amount is not used
        self.part, self.parts = part, parts
        self.report: RecoveryOutcome | None = None
        self._identity: Identity | None = None
        # The teacher whose predictions have been written or compared.
        self._known_teacher: str | Path | None = None

    @own_settings()
    def recover_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel | str | None = None,
        resume: bool = False,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel | PeftModel:
        """Train a model; see `recover`."""
        config = self.config
        check_recovery(config, self.pruning, model, self.parts)
        teacher, logits = self._teacher(teacher, model, tokenizer, trust_remote_code)
        # A domain that a model writes is written by the dense model where that is at hand: its text is better, and the
        # pruning has kept it.
        domains = training_text(config, self.pruning, tokenizer, teacher or model, self.parts)
        text = samples_of(domains)
        ppl = {}
        if logits is not None:
            logits.check(text, config, model.config.get_text_config().vocab_size)
            ppl["dense"] = logits.perplexity
        elif teacher is not None:
            ppl["dense"] = _perplexities(teacher, domains)
        ppl["pruned"] = _perplexities(model, domains)
        samples = Subset(TrainingSamples(text, logits), part_rows(domains, self.part, self.parts))
        recovered, outcome = self._train(model, samples, text[samples.indices], teacher, logits, resume)
        if config.merge and isinstance(recovered, PeftModel):
            recovered = merge_adapter_(recovered, domains[0].heldout)
        ppl["recovered"] = _perplexities(recovered, domains)
        outcome.perplexity = {domain.name: {when: ppl[when][domain.name] for when in ppl} for domain in domains}
        self.report = outcome
        outcome.judge()
        return recovered

    def _train(
        self,
        model: PreTrainedModel,
        samples: Subset,
        ids: Tensor,
        teacher: PreTrainedModel | None,
        logits: TeacherLogits | None,
        resume: bool,
    ) -> tuple[PreTrainedModel | PeftModel, RecoveryOutcome]:
        """The trained model, with its adapter if it has one, and what was done; `ids` are the tokens of `samples`."""
        config = self.config
        seed = self.pruning.seed if config.seed is None else config.seed
        with tempfile.TemporaryDirectory() as scratch:
            on_cpu = model.device.type == "cpu"
            arguments = training_arguments(config, seed, on_cpu, scratch, self.part, self.parts)
            if resume or "output_dir" in config.training or not config.merge:
                self._identity = self._identify(model, ids, teacher, logits, arguments)
            checkpoint = None
            if resume:
                assert self._identity is not None
                checkpoint = last_checkpoint(arguments.output_dir, self._identity, arguments.save_only_model)
            adapter = adapter_config(config, model, self.pruning.arch_file)
            way = every_weight(model, seed) if adapter is None else fresh_adapter(model, adapter, seed, config.merge)
            with way as trained:
                with to_train(trained, arguments) as own:
                    trainer = DistillTrainer(own, arguments, samples, config, teacher, self._identity)
                    outcome = train_(trainer, self.callbacks, checkpoint)
                return trained, outcome

    def _identify(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        teacher: PreTrainedModel | None,
        logits: TeacherLogits | None,
        arguments: TrainingArguments,
    ) -> Identity:
        return Identity(
            weights_hash(model),
            tensor_hash(ids),
            logits.teacher if logits is not None else None if teacher is None else weights_hash(teacher),
            settings_of(
                self.config, adapter_config(self.config, model, self.pruning.arch_file), arguments, model.dtype
            ),
        )

    def write_teacher_logits(
        self,
        teacher: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool = False,
    ) -> None:
        """Write the teacher's predictions of the whole training text into `teacher_logits` of the config. Where that
        folder exists, its predictions have to be those of this teacher.

        Where this comes before the pruned model is loaded, the two are never in memory together.

        Args:
            teacher: The model that the trained one should agree with, or its id or folder.
            tokenizer: The tokenizer of both models, which reads the domains.
            trust_remote_code: Whether a teacher that is loaded may run code from its folder.

        Raises:
            StructPruneError: If the config names no folder, the teacher cannot be loaded, there is no text, the models
                would write it themselves, the folder cannot be written, or it holds the predictions of another
                teacher.
        """
        config = self.config
        if config.teacher_logits is None or config.top_k is None:
            raise StructPruneError("RecoveryConfig(teacher_logits=…, top_k=…) says where the teacher's logits go.")
        name = teacher if isinstance(teacher, (str, Path)) else None
        if name is not None and name == self._known_teacher:
            return
        # Of several processes, one writes.
        with PartialState().main_process_first():
            self._known_teacher = name
            if Path(config.teacher_logits).exists():
                TeacherLogits(config.teacher_logits).check_teacher(teacher, trust_remote_code)
                return
            teacher = load_teacher(teacher, trust_remote_code=trust_remote_code)
            domains = training_text(config, self.pruning, tokenizer, teacher, self.parts)
            ppl = _perplexities(teacher, domains)
            write_teacher_logits(
                config.teacher_logits, teacher, samples_of(domains), config.top_k, float(config.temperature), ppl
            )

    def save(
        self,
        model: PreTrainedModel | PeftModel,
        save_directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
        pruned: str | Path | None = None,
    ) -> None:
        """Save what `recover_model` returned, with the config and the report of the run.

        Args:
            model: The recovered model, or the adapter on the pruned one.
            save_directory: The folder to write to; it appears only after the result has been read back.
            tokenizer: The tokenizer that is saved beside the model.
            overwrite: Whether a folder that exists is replaced, see `check_target`.
            pruned: The folder of the pruned model, whose pruning config, plan, report and manifest are copied where it
                has them.

        Raises:
            StructPruneError: If the folder exists, nothing was trained, or the result does not come back the same.
        """
        report = self.report
        if report is None:
            raise StructPruneError("There is nothing to save: call recover_model first.")
        carried = {
            name: Path(pruned, name).read_bytes() for name in RECORDS if pruned and Path(pruned, name).is_file()
        }

        from ..saving.page.card import leave_card  # with the page, only what saves pays for them
        from ..saving.page.page import leave_page

        def write(folder: Path) -> None:
            for name, record in carried.items():
                (folder / name).write_bytes(record)
            replace_json(folder / RECOVERY_CONFIG_NAME, self.config.to_dict())
            replace_json(folder / RECOVERY_REPORT_NAME, asdict(report))
            if REPORT_NAME in carried:
                leave_page(folder, save_directory)
            if identity is not None:
                identity.save(folder)
            if not isinstance(model, PeftModel):  # peft writes the card of an adapter
                leave_card(folder, save_directory, model.config, model.name_or_path, self.pruning.arch_file)

        identity = self._identity if isinstance(model, PeftModel) else None
        check = check_adapter if isinstance(model, PeftModel) else check_reload
        # An adapter is of no use without the model under it.
        base = str(model.get_base_model().name_or_path) if isinstance(model, PeftModel) else None
        used = [base, *used_paths(self.config, self.pruning)]
        save_checked(model, save_directory, tokenizer, overwrite, write, check, used)

    def _teacher(
        self,
        teacher: PreTrainedModel | str | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> tuple[PreTrainedModel | None, TeacherLogits | None]:
        """The teacher in memory, or its predictions on disk, or neither."""
        config = self.config
        if config.teacher_logits is not None:
            if teacher is not None:
                self.write_teacher_logits(teacher, tokenizer, trust_remote_code)
            return None, TeacherLogits(config.teacher_logits)
        if teacher is None or not config.distils:
            return None, None
        teacher = load_teacher(teacher, model.dtype, model.device, trust_remote_code)
        check_teacher(teacher, model)
        return teacher, None


@overload
def recover(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RecoveryConfig | None = ...,
    teacher: PreTrainedModel | str | None = ...,
    domains: Iterable[DomainConfig] | None = ...,
    resume: bool = ...,
    trust_remote_code: bool = ...,
    return_report: Literal[False] = ...,
) -> PreTrainedModel | PeftModel: ...


@overload
def recover(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RecoveryConfig | None = ...,
    teacher: PreTrainedModel | str | None = ...,
    domains: Iterable[DomainConfig] | None = ...,
    resume: bool = ...,
    trust_remote_code: bool = ...,
    *,
    return_report: Literal[True],
) -> tuple[PreTrainedModel | PeftModel, RecoveryOutcome]: ...


def recover(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RecoveryConfig | None = None,
    teacher: PreTrainedModel | str | None = None,
    domains: Iterable[DomainConfig] | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    return_report: bool = False,
) -> PreTrainedModel | PeftModel | tuple[PreTrainedModel | PeftModel, RecoveryOutcome]:
    """Train a pruned model in one call. `Recovery` does the same and keeps the numbers.

    Args:
        pruned: A causal language model. It is trained itself and comes back; after a failure it is as it was.
        tokenizer: The model's tokenizer, which reads the domains.
        config: How the model is trained.
        teacher: A model, or its id or folder, that the trained one should agree with; usually the dense model.
        domains: The training text where the config names none.
        resume: Whether training goes on from the last checkpoint in the `output_dir` of `config.training`. The model,
            the text, the teacher and the settings have to be those that it began with.
        trust_remote_code: Whether a teacher that is loaded may run code from its folder.
        return_report: Whether the report comes back beside the model.

    Returns:
        The model, with the adapter merged, or with `merge=False` the adapter on the pruned model, whose weights are
        frozen then. With `return_report`, a pair of it and the report.

    Raises:
        StructPruneError: If the config asks for what cannot be (see `check_recovery`), there is no text, the teacher
            has another vocabulary, peft cannot place the adapter, the loss was never finite, or there is nothing to
            resume.
        InPlaceError: If the merged model gives other outputs than the one that was trained; the model has changed.

    Warns:
        WorseModelWarning: If the model is worse on held-out text than before, in the mean log perplexity over the
            domains, or the training ended early.
    """
    config = config or RecoveryConfig()
    if domains is not None and config.domains is None:
        config = replace(config, domains=list(domains))
    recovery = Recovery(config)
    recovered = recovery.recover_model(pruned, tokenizer, teacher, resume, trust_remote_code)
    if not return_report:
        return recovered
    assert recovery.report is not None
    return recovered, recovery.report


def _perplexities(model: PreTrainedModel | PeftModel, domains: Sequence[Domain]) -> dict[str, float]:
    return {domain.name: _perplexity(model, domain.heldout) for domain in domains}


def _perplexity(model: PreTrainedModel | PeftModel, samples: Tensor) -> float:
    try:
        return perplexity(model, samples)
    except OverflowError:  # a model that is destroyed
        return inf
