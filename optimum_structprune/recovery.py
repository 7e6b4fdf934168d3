"""Training after pruning: LoRA on the recovery domains, with or without a teacher, merged at the end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .adapter import check_adapter
from .calibration.blocks import Domain, load_domains, num_heldout, split_samples
from .calibration.manifest import MANIFEST_NAME
from .calibration.presets import resolve
from .config import CONFIG_NAME, StructPruneConfig
from .distill_trainer import DistillTrainer, NotFiniteError
from .errors import StructPruneError
from .hub import PLAN_NAME, REPORT_NAME, check_reload, save_checked
from .metrics import perplexity
from .recovery_config import LORA, TRAINING, RecoveryConfig
from .registry import did_you_mean
from .report import RecoveryReport


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .schema import DomainConfig

RECOVERY_CONFIG_NAME = "recovery_config.json"
RECOVERY_REPORT_NAME = "recovery_report.json"
CARRIED = (CONFIG_NAME, PLAN_NAME, REPORT_NAME, MANIFEST_NAME)


class Recovery:
    """Trains a pruned causal language model.

    After `recover_model`, `report` holds the numbers of the run.

    Args:
        config: How to train.
        pruning: How the model was pruned; gives the domains, the block length and the seed that `config` leaves open,
            and says which documents were held out.
    """

    def __init__(self, config: RecoveryConfig, pruning: StructPruneConfig | None = None):
        self.config = config
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
        config = self.config
        text = self._text()
        teacher = _teacher(teacher, model) if config.kl_weight else None
        vocab_size = model.config.get_text_config().vocab_size
        # Text of its own is the dense model's where that is at hand: it is better, and the pruning has kept it.
        domains = load_domains(text, tokenizer, vocab_size, self._heldout_blocks(text.seq_length), teacher or model)
        report = RecoveryReport()
        ppl = {} if teacher is None else {"dense": _perplexities(teacher, domains)}
        ppl["pruned"] = _perplexities(model, domains)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = self._arguments(model, text.seed, scratch)
            checkpoint = _checkpoint(arguments.output_dir) if resume else None
            with _adapted(model, self._lora(), text.seed) as adapted:
                self._train(adapted, arguments, teacher, domains, checkpoint, report)
        recovered = adapted.merge_and_unload() if config.merge else adapted
        ppl["recovered"] = _perplexities(recovered, domains)
        report.perplexity = {domain.name: {when: ppl[when][domain.name] for when in ppl} for domain in domains}
        self.report = report
        return recovered

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
        blocks = config.tokens // (seq_length * len(domains))
        if blocks < 1:
            raise StructPruneError(
                f"tokens={config.tokens} does not give each of the {len(domains)} domains a block of {seq_length} "
                f"tokens; {seq_length * len(domains)} is the least."
            )
        return replace(
            pruning,
            domains=[replace(domain, weight=1.0) for domain in domains],
            num_samples=blocks * len(domains),
            seq_length=seq_length,
            select="random",
            seed=pruning.seed if config.seed is None else config.seed,
        )

    def _heldout_blocks(self, seq_length: int) -> int:
        # A domain's held-out documents come first in an order that the seed chooses. As much held-out text as the
        # pruning had, or more, therefore keeps all of its held-out documents out of the training text.
        pruning = self.pruning
        counts = split_samples(pruning.num_samples, [domain.weight for domain in pruning.domains])
        most = max(num_heldout(count, float(pruning.holdout)) for count in counts)
        return most if seq_length == pruning.seq_length else 1 + ceil(most * pruning.seq_length / seq_length)

    def _lora(self) -> LoraConfig:
        return _build(LoraConfig, {**LORA, **self.config.lora})

    def _arguments(self, model: PreTrainedModel, seed: int, scratch: str) -> TrainingArguments:
        given = self.config.training
        saving: dict[str, Any] = {"save_strategy": "no", "output_dir": scratch}
        if "output_dir" in given:
            saving = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1}
        fixed = {"seed": seed, "use_cpu": model.device.type == "cpu"}
        return _build(TrainingArguments, {**TRAINING, **saving, **fixed, **given})

    def _train(
        self,
        adapted: PeftModel,
        arguments: TrainingArguments,
        teacher: PreTrainedModel | None,
        domains: Sequence[Domain],
        checkpoint: str | None,
        report: RecoveryReport,
    ) -> None:
        rows = [{"input_ids": ids, "labels": ids} for domain in domains for ids in domain.blocks]
        trainer = DistillTrainer(adapted, arguments, rows, self.config, teacher)
        if checkpoint is not None:
            check_adapter(adapted, checkpoint)
        start = perf_counter()
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
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


@contextmanager
def _adapted(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Iterator[PeftModel]:
    """The model with a fresh adapter, which a failure takes off again."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    set_seed(seed)
    try:
        adapted = get_peft_model(model, lora)
    except (ValueError, TypeError) as error:
        raise StructPruneError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
    try:
        yield adapted
    except BaseException:  # Ctrl-C too
        adapted.unload()
        raise
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trainable.get(name.replace(".base_layer.", "."), parameter.requires_grad)


def _build(cls: type, values: dict[str, Any]) -> Any:
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    for key in values:
        if key not in known:
            raise StructPruneError(f"{cls.__name__} has no field {key!r}.{did_you_mean(key, known)}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise StructPruneError(f"{cls.__name__}: {' '.join(str(error).split())}") from error


def _teacher(teacher: PreTrainedModel | str | None, model: PreTrainedModel) -> PreTrainedModel | None:
    if teacher is None:
        return None
    if isinstance(teacher, (str, Path)):
        try:
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=model.dtype, device_map=model.device)
        except (OSError, ValueError) as error:
            raise StructPruneError(f"The teacher {str(teacher)!r} cannot be loaded: {error}") from error
    theirs, mine = (each.config.get_text_config().vocab_size for each in (teacher, model))
    if theirs != mine:
        raise StructPruneError(
            f"The teacher has a vocabulary of {theirs} tokens and the model one of {mine}, so their predictions "
            "cannot be compared; take the model that was pruned as the teacher, or leave the teacher out."
        )
    return teacher


def _checkpoint(folder: str | None) -> str:
    last = get_last_checkpoint(folder) if folder and Path(folder).is_dir() else None
    if last is None:
        raise StructPruneError(f"There is no checkpoint in {folder} to resume from; start without resuming.")
    return last


def _perplexities(model: PreTrainedModel | PeftModel, domains: Sequence[Domain]) -> dict[str, float]:
    heldout: dict[str, Tensor] = {domain.name: domain.heldout for domain in domains}
    return {name: perplexity(model, blocks) for name, blocks in heldout.items()}
