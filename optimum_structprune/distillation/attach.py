"""Train any `transformers.Trainer` towards a teacher's predictions: `attach_teacher`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..arch.hooks import replaced_forward
from ..arch.meta import predicts_next
from ..measure.batches import IGNORED, AlignedTargets, next_tokens
from ..measure.predictions import Predictions, StoredPredictions, accepted_inputs, bare_model, is_same
from ..system.errors import StructPruneError
from .aligned_batches import AlignedCollator, check_batch
from .chunked_loss import TokenLosses, chunk_tokens, chunked_losses
from .heads import attach_to_head, load_any_teacher
from .logged_loss import LoggedLoss
from .teacher import Teacher, check_weights, load_teacher
from .teacher_file import StoredTeacher, stored_teacher
from .teacher_file_format import is_teacher_file


# Inputs that a model's `forward` uses to compute a loss of its own. `skip_logits` is for Liger's kernels.
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch", "skip_logits")


def attach_teacher(
    trainer: Trainer,
    teacher: PreTrainedModel | str | Path,
    *,
    temperature: float = 1.0,
    task_weight: float = 0.0,
    teacher_device: str | torch.device | int | None = None,
    teacher_dtype: torch.dtype | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> LoggedLoss:
    """Make a Trainer minimise the divergence from a teacher instead of its own loss.

    The loss is `(1 - task_weight) * temperature**2 * KL(teacher || student) + task_weight * cross_entropy`, averaged
    over the tokens that `labels` count (Hinton et al., 2015, https://arxiv.org/abs/1503.02531, section 2). All other
    parts of the training are the Trainer's: data, packing, LoRA, gradient accumulation, mixed precision, schedulers,
    checkpoints and logs. The logs have `kl` and `eval_kl` in nats per token.

    The teacher runs in each step. Under DDP every process holds it. FSDP and stage 3 of DeepSpeed's ZeRO shard it like
    the student. If the student's vocabulary was trimmed, the batches are spelled in the teacher's tokens too, and the
    divergence is computed per token of the teacher.

    The student trains without dropout, in eval mode like the teacher: with dropout, a student that equals its teacher
    would be moved away from it. An adapter keeps its dropout, such as `lora_dropout`.

    Args:
        trainer: A Trainer before `train` that minimises the cross-entropy, such as TRL's `SFTTrainer`, or a Trainer of
            sentence-transformers. The batches of a causal language model need `input_ids` and `labels`.
        teacher: A model with the same head, or its id or folder; usually the original model. A model in memory is put
            in eval mode and moved to `teacher_device`. Or the folder of a teacher file, which `write_teacher` has
            written on the text of this training; no teacher is in memory then.
        temperature: The temperature of both distributions, above 0.
        task_weight: The weight of the cross-entropy with `labels`, from 0 to 1.
        teacher_device: The device of the teacher, such as `"cuda:1"`. `"offload"` keeps the weights in CPU memory and
            moves each layer to the Trainer's device while it runs. The default is the Trainer's device.
        teacher_dtype: The dtype of the teacher's weights, such as `torch.bfloat16` or `"bfloat16"`. By default, a
            teacher is loaded in bfloat16 if the Trainer trains in bf16, and in the dtype of the student otherwise. A
            model in memory keeps its dtype.
        tokenizer: The tokenizer of the student. The default is the Trainer's `processing_class`.
        teacher_tokenizer: The tokenizer of the teacher. By default it is read from the teacher's folder.
        trust_remote_code: Whether a teacher that is loaded may run code from its folder.

    Returns:
        The loss, which the Trainer calls.

    Raises:
        StructPruneError: If an argument is out of range, the Trainer has another objective, label smoothing,
            `nn.DataParallel`, or context or sequence parallelism, the student has an adapter of prompts, or the
            teacher does not fit (see `load_teacher`): it has another number of labels, channels or tokens.
    """
    check_weights(temperature, task_weight)
    student = bare_model(trainer.model)
    _check_trainer(trainer)

    dtype = _checked_dtype(teacher_dtype)
    if dtype is None and trainer.args.bf16 and isinstance(teacher, (str, Path)):
        dtype = torch.bfloat16
    if tokenizer is None and isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        tokenizer = trainer.processing_class
    is_pruned_later = any(getattr(callback, "prunes_model", False) for callback in trainer.callback_handler.callbacks)
    if not isinstance(student, PreTrainedModel) or not predicts_next(student):
        if is_teacher_file(teacher):
            raise StructPruneError(
                f"{teacher} is a teacher file, which stores predictions of next tokens, and the Trainer trains a "
                f"{type(student).__name__}. Pass a model, or its id or folder."
            )
        original = load_any_teacher(teacher, student, dtype, trust_remote_code, is_pruned_later)
        options = (tokenizer, teacher_tokenizer, teacher_device, trust_remote_code)
        return attach_to_head(trainer, original, temperature, task_weight, *options)

    if isinstance(teacher, (str, Path)) and is_teacher_file(teacher):
        if teacher_device is not None or teacher_dtype is not None:
            raise StructPruneError(
                f"{teacher} is a teacher file, which has no weights. Remove `teacher_device` and `teacher_dtype`."
            )
        stored = stored_teacher(teacher, student, tokenizer, teacher_tokenizer, temperature)
        return attach_loaded_teacher(trainer, stored, tokenizer, temperature, task_weight)

    loaded = load_teacher(
        teacher,
        student,
        tokenizer,
        teacher_tokenizer,
        trust_remote_code,
        dtype,
        teacher_device,
        is_pruned_later,
    )
    return attach_loaded_teacher(trainer, loaded, tokenizer, temperature, task_weight)


def attach_loaded_teacher(
    trainer: Trainer,
    teacher: Teacher | StoredTeacher,
    tokenizer: PreTrainedTokenizerBase | None = None,
    temperature: float = 1.0,
    task_weight: float = 0.0,
) -> TeacherLoss:
    """Attach a teacher that fits the Trainer's model; see `attach_teacher`."""
    loss = TeacherLoss(trainer, teacher, temperature, task_weight)

    collator = trainer.data_collator
    if teacher.alignment is not None and not getattr(collator, "aligns_tokens", False):
        trainer.data_collator = AlignedCollator(collator, teacher.alignment, teacher.tokenizer, tokenizer)

    loss.attach()

    # The Trainer counts the tokens of an accumulated batch only for losses that use the number.
    trainer.model_accepts_loss_kwargs = True
    trainer._loss_shifts_labels = True
    return loss


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype or the dtype with a name. Raise `StructPruneError` if it is not a floating-point dtype."""
    if dtype is None:
        return None

    value: object = dtype
    if isinstance(dtype, str):
        value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise StructPruneError(f'`teacher_dtype` must be a floating-point dtype, such as "bfloat16", got {dtype!r}.')
    return value


def _check_trainer(trainer: Trainer) -> None:
    adapter = getattr(trainer.model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        raise StructPruneError(
            f"The student has an adapter of type {kind}, whose prompts change the positions of the "
            "tokens. Use an adapter that changes weights, such as LoRA, or train all weights."
        )

    if isinstance(getattr(trainer.compute_loss, "__self__", None), LoggedLoss):
        raise StructPruneError("The Trainer has a teacher already. Attach one teacher to one Trainer.")

    if trainer.compute_loss_func is not None:
        raise StructPruneError(
            "The Trainer has a `compute_loss_func`, and `attach_teacher` replaces the loss. Remove it. "
            "`task_weight` mixes the cross-entropy with the divergence."
        )

    if not _minimises_cross_entropy(trainer):
        raise StructPruneError(
            f"{type(trainer).__name__} has an objective of its own in `compute_loss` or `training_step`, and "
            "`attach_teacher` would replace it. Use a Trainer that minimises the cross-entropy, such as "
            "`transformers.Trainer` or TRL's `SFTTrainer`, and train with the other objective afterwards."
        )

    if trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise StructPruneError(
            "The Trainer divides sequences over processes, and a teacher needs whole sequences. Set `cp_size` and "
            "`sp_size` of its `parallelism_config` to 1."
        )

    if trainer.args.label_smoothing_factor:
        raise StructPruneError(
            f"The Trainer has label_smoothing_factor={trainer.args.label_smoothing_factor}, and `attach_teacher` "
            "replaces the loss. Set it to 0."
        )

    if trainer.args.n_gpu > 1:
        raise StructPruneError(
            f"The Trainer would use `nn.DataParallel` on {trainer.args.n_gpu} GPUs, and a teacher needs one GPU per "
            "process. Start the script with `accelerate launch` or `torchrun`, or show one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def _minimises_cross_entropy(trainer: Trainer) -> bool:
    """Return whether the steps of a Trainer end in a cross-entropy with `labels`.

    Only such a loss can smooth labels, so `compute_loss` of a subclass with another objective has no `label_smoother`.
    """
    in_step = _names_in(trainer.training_step)
    calls_loss = "compute_loss" in in_step or "training_step" in in_step  # of the base class
    if calls_loss and hasattr(trainer, "collect_features"):
        return True  # a Trainer of sentence-transformers, whose loss is an argument
    return calls_loss and "label_smoother" in _names_in(trainer.compute_loss)


def _names_in(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the attributes that the code of a method uses."""
    code = getattr(unwrap(method), "__code__", None)
    return getattr(code, "co_names", ())


class TeacherLoss(LoggedLoss):
    """The KL divergence from a teacher as the loss of a Trainer; see `attach_teacher`.

    Attributes:
        trainer: The Trainer.
        teacher: The teacher.
        temperature: The temperature of both distributions.
        task_weight: The weight of the cross-entropy with `labels`.
    """

    def __init__(self, trainer: Trainer, teacher: Teacher | StoredTeacher, temperature: float, task_weight: float):
        super().__init__(trainer, "kl", teacher, temperature, task_weight)
        # Whether the output of the head is the output of the student, or None before the first forward pass.
        self._plain_head: bool | None = None
        if trainer.args.torch_compile:
            self._plain_head = False

    def batch_loss(
        self, mode: str, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """Compute the loss of a batch; see `LoggedLoss.compute_loss`. Tokens count if their `labels` are not -100."""
        check_batch(inputs)
        trainer = self.trainer
        accelerator = trainer.accelerator
        self.teacher.place(accelerator)

        targets = next_tokens(inputs).flatten()
        positions = (targets != IGNORED).nonzero()[:, 0]

        aligned = None
        teacher_inputs = _without(inputs, LOSS_INPUTS)
        teacher_positions = positions
        if self.teacher.alignment is not None:
            aligned = AlignedTargets.of(inputs, positions, self.teacher.alignment)
            teacher_inputs = aligned.teacher_inputs
            teacher_positions = aligned.teacher_positions

        with torch.no_grad(), accelerator.autocast():
            predictions = self.teacher.predict(teacher_inputs, teacher_positions)

        student_inputs = _without(inputs, LOSS_INPUTS + AlignedTargets.INPUTS)
        student_inputs = accepted_inputs(bare_model(model), student_inputs)
        batch = _Batch(positions, targets[positions], predictions, aligned)
        losses = self._losses(model, student_inputs, batch)
        # Logs have the divergence per token of the teacher, as reports do.
        kl = losses.kl.detach().to(targets.device)
        is_counted = torch.ones_like(teacher_positions)
        if mode == "eval":
            kl = kl * self._is_first(inputs, positions)
            is_counted = self._is_first(teacher_inputs, teacher_positions)
        sums = torch.stack([kl.sum(), is_counted.sum()])
        self._sums[mode] = self._sums.get(mode, 0) + sums

        loss = self._mean(losses.loss, num_items_in_batch)
        if not return_outputs:
            return loss

        outputs: dict[str, Any] = {"loss": loss, "logits": losses.kl}
        if self._returns_logits or trainer.compute_metrics is not None:
            with torch.no_grad():
                outputs["logits"] = model(**student_inputs).logits
        return loss, outputs

    def _is_first(self, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
        """Return which positions of a batch are not repeated.

        accelerate repeats samples to fill the last batch. `Accelerator.gather_for_metrics` drops them by their number.
        """
        state = self.trainer.accelerator.gradient_state
        if self._num_batches == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return torch.ones_like(positions, dtype=torch.bool)

        num_samples, length = inputs["input_ids"].shape
        samples = positions // length
        if num_samples == 1 and inputs.get("position_ids") is not None:
            # The samples of a process are in one row. They are not told apart if they have several documents each.
            num_samples = self.trainer.args.eval_batch_size
            documents = (inputs["position_ids"].flatten() == 0).cumsum(0)
            samples = (documents[positions] - 1) * num_samples // documents[-1]

        first_sample = self.trainer.accelerator.process_index // self.trainer.get_tp_size() * num_samples
        return first_sample + samples < state.remainder

    def _losses(self, model: Any, inputs: dict[str, Any], batch: _Batch) -> TokenLosses:
        student = bare_model(model)
        head = student.get_output_embeddings()
        if head is not None and self._plain_head is not False:
            losses = self._losses_in_head(model, inputs, batch, head)
            if losses is not None:
                return losses
            self._plain_head = False

        logits = model(**inputs).logits.flatten(0, 1)
        logits = logits[batch.positions.to(logits.device)]
        return self._in_chunks(logits, nn.Identity(), logits.shape[-1], batch, trains_head=False)

    def _losses_in_head(
        self, model: Any, inputs: dict[str, Any], batch: _Batch, head: nn.Module
    ) -> TokenLosses | None:
        """Compute the losses inside the student's head, where sharded weights are gathered.

        The model returns the losses instead of logits. The result is None if the model changes the output of the head,
        for example if it caps the logits. The logits are needed then.
        """
        project = head.forward
        computed: list[TokenLosses] = []
        returned: list[Tensor] = []

        def losses_for(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            device = _device_of(head, hidden.device)
            states = hidden.flatten(0, -2).to(device)
            places = batch.positions.to(device)
            losses = self._in_chunks(states[places], project, 0, batch, _is_trained(project, states[:1]))
            by_place = torch.zeros(len(states), device=device).index_put((places,), losses.loss)
            computed.append(losses)
            returned.append(by_place.view(*hidden.shape[:-1], 1))
            return returned[-1]

        with replaced_forward(head, losses_for):
            output = model(**inputs).logits
        if self._plain_head is None:
            is_plain = len(returned) == 1 and is_same(output, returned[0])
            # Losses of zero stay zero if a model scales or caps the output of its head, so they show nothing.
            if not is_plain or returned[0].any():
                self._plain_head = is_plain

        if self._plain_head is False:
            return None
        # The gradient must flow through the outputs of the wrappers around the model.
        places = batch.positions.to(output.device)
        return TokenLosses(output.flatten()[places], computed[0].kl)

    def _in_chunks(
        self, values: Tensor, project: Callable[[Tensor], Tensor], size: int, batch: _Batch, trains_head: bool
    ) -> TokenLosses:
        vocab_size = size or bare_model(self.trainer.model).config.get_text_config().vocab_size
        targets = batch.targets.to(values.device)
        chunk_size = chunk_tokens(vocab_size, values.device)

        if batch.aligned is not None:
            batch.aligned.split(chunk_size, values.device)

        def chunk_loss(chunk: Tensor, start: int, end: int) -> TokenLosses:
            logits = project(chunk).float()
            if batch.aligned is None:
                kl = batch.predictions.divergence(logits, start, end, self.temperature)
            else:
                kl = batch.aligned.divergence(logits, batch.predictions, start // chunk_size, self.temperature)

            loss = (1 - self.task_weight) * self.temperature**2 * kl
            if self.task_weight:
                loss = loss + self.task_weight * cross_entropy(logits, targets[start:end], reduction="none")
            return TokenLosses(loss, kl.detach())

        return chunked_losses(values, chunk_loss, chunk_size, trains_head)


@dataclass
class _Batch:
    """The counted positions of a batch, their targets, each of shape `(positions,)`, and the teacher's predictions."""

    positions: Tensor
    targets: Tensor
    predictions: Predictions | StoredPredictions
    aligned: AlignedTargets | None


def _is_trained(project: Callable[[Tensor], Tensor], hidden: Tensor) -> bool:
    """Return whether a head has trainable weights, also weights that an adapter keeps elsewhere."""
    if not torch.is_grad_enabled():
        return False
    return project(hidden.detach()).requires_grad


def _device_of(head: nn.Module, default: torch.device) -> torch.device:
    """Return the device of a head's weights. A model may be spread over devices, or its head be offloaded."""
    weight = next(head.parameters(), None)
    if weight is None or weight.is_meta:
        return default
    return weight.device


def _without(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}
