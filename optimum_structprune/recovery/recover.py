"""Training after pruning: LoRA on the recovery domains, with or without a teacher, merged at the end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from ..config.domains import SELF
from ..config.fields import build
from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import LORA, TRAINING, RecoveryConfig
from ..domains.load import Domain, load_domains, num_heldout, split_samples
from ..domains.manifest import MANIFEST_NAME
from ..domains.presets import resolve
from ..errors import StructPruneError
from ..forward.metrics import perplexity
from ..saving.hub import PLAN_NAME, REPORT_NAME, check_reload, save_checked
from ..saving.report import RecoveryReport
from .adapter import check_adapter, fresh_adapter
from .teacher import TeacherLogits, TrainingSamples, check_teacher, load_teacher, write_teacher_logits
from .trainer import DistillTrainer, NotFiniteError, last_checkpoint


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.domains import DomainConfig

RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"
CARRIED = (CONFIG_NAME, PLAN_NAME, REPORT_NAME, MANIFEST_NAME)


class Recovery:
    """Trains a pruned causal language model.

    After `recover_model`, `report` holds the numbers of the run.

    Args:
        config: How to train.
        pruning: How the model was pruned; gives the domains, the sample length and the seed that `config` leaves open,
            and says which documents were held out.
        callbacks: Further callbacks for the Trainer.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.config = config
        self.callbacks = callbacks
        self.pruning = pruning or StructPruneConfig(sparsity=0.5)  # its amount is not used
        self.report: RecoveryReport | None = None

    def recover_model(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: PreTrainedModel | str | None = None,
        resume: bool = False,
    ) -> PreTrainedModel | PeftModel:
        """Train a model; see `recover`."""
        config, text = self.config, self._text()
        teacher, stored = self._teacher(teacher, model, tokenizer)
        # Text of its own is the dense model's where that is at hand: it is better, and the pruning has kept it.
        domains = self._domains(text, tokenizer, teacher or model)
        report, ppl = RecoveryReport(), {}
        if stored is not None:
            stored.check(_samples(domains), config, model.config.get_text_config().vocab_size)
            ppl["dense"] = stored.index["perplexity"]
        elif teacher is not None:
            ppl["dense"] = _perplexities(teacher, domains)
        ppl["pruned"] = _perplexities(model, domains)
        samples = TrainingSamples(_samples(domains), stored)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = self._arguments(model, text.seed, scratch)
            checkpoint = last_checkpoint(arguments.output_dir) if resume else None
            with fresh_adapter(model, self._lora(), text.seed) as adapted:
                self._train(DistillTrainer(adapted, arguments, samples, config, teacher), checkpoint, report)
        recovered = adapted.merge_and_unload() if config.merge else adapted
        ppl["recovered"] = _perplexities(recovered, domains)
        report.perplexity = {domain.name: {when: ppl[when][domain.name] for when in ppl} for domain in domains}
        self.report = report
        return recovered

    def write_teacher_logits(self, teacher: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the teacher's predictions of the training text into `teacher_logits` of the config, unless that folder
        exists. Where this comes before the pruned model is loaded, the two are never in memory together.

        Args:
            teacher: The model to agree with, or its id or folder.
            tokenizer: Reads the domains.

        Raises:
            StructPruneError: If the config names no folder, the teacher cannot be loaded, or there is no text.
        """
        config = self.config
        if config.teacher_logits is None or config.top_k is None:
            raise StructPruneError("RecoveryConfig(teacher_logits=…, top_k=…) says where the teacher's logits go.")
        # Of several processes, one writes.
        with PartialState().main_process_first():
            if Path(config.teacher_logits).exists():
                return
            teacher = load_teacher(teacher)
            text = self._text()
            for domain in text.domains:
                if isinstance(domain.source, str) and domain.source.startswith(SELF):
                    raise StructPruneError(
                        f"The domain {domain.name!r} is written by the model itself, so it is other text for the "
                        "teacher than for the pruned model; use another domain, or leave teacher_logits out."
                    )
            domains = self._domains(text, tokenizer, teacher)
            ppl = _perplexities(teacher, domains)
            write_teacher_logits(
                config.teacher_logits, teacher, _samples(domains), config.top_k, float(config.temperature), ppl
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
            save_directory: Where to; it appears only after the result has been read back.
            tokenizer: Saved beside the model.
            overwrite: Replace a folder that exists.
            pruned: Folder of the pruned model, whose pruning config, plan and report are copied where it has them.

        Raises:
            StructPruneError: If the folder exists, nothing was trained, or the result does not come back the same.
        """
        report = self.report
        if report is None:
            raise StructPruneError("There is nothing to save: call recover_model first.")
        kept = {name: Path(pruned, name).read_text() for name in CARRIED if pruned and Path(pruned, name).is_file()}

        def write(folder: Path) -> None:
            for name, text in kept.items():
                (folder / name).write_text(text)
            (folder / RECOVERY_CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            (folder / RECOVERY_REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n")

        check = check_adapter if isinstance(model, PeftModel) else check_reload
        save_checked(model, save_directory, tokenizer, overwrite, write, check)

    def _text(self) -> StructPruneConfig:
        config, pruning = self.config, self.pruning
        domains = resolve(config.domains or pruning.domains, pruning.presets_file)
        seq_length = config.seq_length or pruning.seq_length
        samples = config.tokens // (seq_length * len(domains))
        if samples < 1:
            raise StructPruneError(
                f"tokens={config.tokens} does not give each of the {len(domains)} domains a sample of {seq_length} "
                f"tokens; {seq_length * len(domains)} is the least."
            )
        return replace(
            pruning,
            domains=[replace(domain, weight=1.0) for domain in domains],
            num_samples=samples * len(domains),
            seq_length=seq_length,
            select="random",
            adaptive_rate=0.0,
            objective="mean",
            seed=pruning.seed if config.seed is None else config.seed,
        )

    def _num_heldout(self, seq_length: int) -> int:
        # A domain's held-out documents come first in an order that the seed chooses. As much held-out text as the
        # pruning had, or more, therefore keeps all of its held-out documents out of the training text.
        pruning = self.pruning
        counts = split_samples(pruning.num_samples, [domain.weight for domain in pruning.domains])
        most = max(num_heldout(count, float(pruning.holdout)) for count in counts)
        return most if seq_length == pruning.seq_length else 1 + ceil(most * pruning.seq_length / seq_length)

    def _lora(self) -> LoraConfig:
        return build(LoraConfig, {**LORA, **self.config.lora})

    def _arguments(self, model: PreTrainedModel, seed: int, scratch: str) -> TrainingArguments:
        given = self.config.training
        saving: dict[str, Any] = {"save_strategy": "no", "output_dir": scratch}
        if "output_dir" in given:
            saving = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1}
        # Our own samples carry what the loss reads, which is more than the model's arguments.
        fixed = {"seed": seed, "use_cpu": model.device.type == "cpu", "remove_unused_columns": False}
        return build(TrainingArguments, {**TRAINING, **saving, **fixed, **given})

    def _teacher(
        self,
        teacher: PreTrainedModel | str | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> tuple[PreTrainedModel | None, TeacherLogits | None]:
        """The teacher in memory, or what is kept of it on disk, or neither."""
        config = self.config
        if config.teacher_logits is not None:
            if teacher is not None:
                self.write_teacher_logits(teacher, tokenizer)
            return None, TeacherLogits(config.teacher_logits)
        if teacher is None or not config.distils:
            return None, None
        teacher = load_teacher(teacher, model.dtype, model.device)
        check_teacher(teacher, model, bool(config.hidden_weight))
        return teacher, None

    def _domains(
        self, text: StructPruneConfig, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
    ) -> list[Domain]:
        vocab_size = model.config.get_text_config().vocab_size
        return load_domains(text, tokenizer, vocab_size, self._num_heldout(text.seq_length), model)

    def _train(self, trainer: DistillTrainer, checkpoint: str | None, report: RecoveryReport) -> None:
        for callback in self.callbacks:
            trainer.add_callback(callback)
        if checkpoint is not None:
            check_adapter(cast("PeftModel", trainer.model), checkpoint)
        start = perf_counter()
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.check_weights()
        except (OSError, SafetensorError) as error:
            raise StructPruneError(
                f"Training stopped at step {trainer.state.global_step} because a checkpoint could not be written: "
                f"{error}. The model is as it was; resuming goes on from the last whole checkpoint."
            ) from error
        except NotFiniteError as error:
            if not trainer.restore_good_():
                raise
            report.stopped = f"{error} Training stopped there, and the last good weights were kept."
        report.seconds = perf_counter() - start
        report.steps = trainer.state.global_step
        report.tokens = int(trainer.state.num_input_tokens_seen)


def recover(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RecoveryConfig | None = None,
    teacher: PreTrainedModel | str | None = None,
    domains: Iterable[DomainConfig] | None = None,
    resume: bool = False,
) -> PreTrainedModel | PeftModel:
    """Train a pruned model in one call. `Recovery` does the same and keeps the numbers.

    Args:
        pruned: A causal language model. It is trained itself and comes back; after a failure it is as it was.
        tokenizer: Its tokenizer; reads the domains.
        config: How to train.
        teacher: A model, or its id or folder, that the trained one should agree with; usually the dense model.
        domains: Training text where the config names none.
        resume: Go on from the last checkpoint in the `output_dir` of `config.training`.

    Returns:
        The model with the adapter merged, or with `merge=False` the adapter on the pruned model.

    Raises:
        StructPruneError: If there is no text, the teacher has another vocabulary, a field is not known to peft or
            transformers, the loss was never finite, or there is nothing to resume.
    """
    config = config or RecoveryConfig()
    if domains is not None and config.domains is None:
        config = replace(config, domains=list(domains))
    return Recovery(config).recover_model(pruned, tokenizer, teacher, resume)


def _perplexities(model: PreTrainedModel | PeftModel, domains: Sequence[Domain]) -> dict[str, float]:
    heldout: dict[str, Tensor] = {domain.name: domain.heldout for domain in domains}
    return {name: perplexity(model, samples) for name, samples in heldout.items()}


def _samples(domains: Sequence[Domain]) -> Tensor:
    return torch.cat([domain.samples for domain in domains])
