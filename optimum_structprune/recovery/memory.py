"""Estimate the memory and the time of a recovery from shapes alone."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..arch.meta import skeleton
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..method.devices import default_device, free_bytes, measured_throughput
from ..system.stages import readable_size, readable_time
from .adapter import adapted, lora_config
from .arguments import TrainingSize, batch_samples, computes_in_bf16
from .chunked_loss import chunk_tokens
from .text import sample_length


FP32_BYTES = 4
# Copies of the trained weights in fp32: the gradient, both moments of Adam, and the initial values.
OPTIMIZER_COPIES = 4
# The activations per token that a layer stores for the backward pass, as multiples of the hidden size and of the FFN
# size: the inputs of norms, projections and attention, and the factors and the product of a gated FFN.
STORED_HIDDEN = 12
STORED_FFN = 4
# Copies of a chunk of logits in fp32: logits, log-probabilities, both again of the teacher, and gradients.
LOGIT_COPIES = 6
# Multiply-adds per weight and token: a forward pass of the teacher and of the student, and the backward pass through
# the student's activations, and for trained weights through the weights too.
FORWARD = 1
BACKWARD = 1
# The share of the measured throughput of one matrix product that a training step reaches.
EFFICIENCY = 0.7
# The relative error of the estimate. A recovery that may fit is not refused.
MEMORY_ERROR = 0.3


@dataclass(frozen=True)
class RecoveryEstimate:
    """The peak memory of one process of a recovery, in bytes, and its time.

    Attributes:
        weights: The student's weights.
        teacher: The teacher's weights.
        trained: Gradients, optimizer state and the initial values of the trained weights.
        activations: Activations of one batch, and the logits of one chunk.
        seconds: The estimated time of the training steps, without writing answers and evaluations.
        seq_length: The number of tokens in a sample.
        batch: The number of samples in a step.
    """

    weights: int
    teacher: int
    trained: int
    activations: int
    seconds: float
    seq_length: int
    batch: int

    @property
    def total(self) -> int:
        """Return the total memory."""
        return self.weights + self.teacher + self.trained + self.activations

    def __str__(self) -> str:
        """Return the sizes and the time as lines."""
        lines = [
            f"the recovery takes {readable_size(self.total)} on each device at its peak: weights "
            f"{readable_size(self.weights)}, teacher {readable_size(self.teacher)}, optimizer "
            f"{readable_size(self.trained)}, activations {readable_size(self.activations)}",
            f"its steps of {self.batch} samples of {self.seq_length} tokens take about "
            f"{readable_time(self.seconds)} on this machine, without writing answers",
        ]
        return "\n".join(lines)


def estimate_recovery(
    config: RecoveryConfig, dense: PreTrainedModel, student: PreTrainedModel, flops: float | None = None
) -> RecoveryEstimate:
    """Estimate the memory and the time of a recovery.

    Args:
        config: How the model is trained.
        dense: The teacher, without weights.
        student: The trained model, without weights.
        flops: Multiply-adds per second. By default they are measured for a tenth of a second.
    """
    device = default_device()
    seq_length = sample_length(config, student)
    size = TrainingSize(config.tokens // seq_length, seq_length)
    at_once = int(config.training.get("per_device_train_batch_size") or min(batch_samples(size), 4))

    itemsize = student.dtype.itemsize
    dtype = torch.float32
    if computes_in_bf16(device.type) and config.training.get("bf16", True):
        dtype = torch.bfloat16
        itemsize = dtype.itemsize

    text = student.config.get_text_config()
    hidden = text.hidden_size
    # The attribute is an error if layers differ. The dictionary has the largest width.
    ffn = text.to_dict().get("intermediate_size") or 4 * hidden

    per_layer = STORED_HIDDEN * hidden + STORED_FFN * ffn
    per_token = text.num_hidden_layers * per_layer
    if config.training.get("gradient_checkpointing"):
        per_token = text.num_hidden_layers * hidden + per_layer
    activations = itemsize * at_once * seq_length * per_token
    logits = LOGIT_COPIES * FP32_BYTES * text.vocab_size * chunk_tokens(text.vocab_size, device)

    backward = BACKWARD
    if config.train == "full":
        backward = 2 * BACKWARD
    teacher_size = dense.num_parameters()
    work = config.tokens * (FORWARD * teacher_size + (FORWARD + backward) * student.num_parameters())
    if flops is None:
        flops = measured_throughput(device, dtype, hidden, ffn)

    return RecoveryEstimate(
        weights=student.num_parameters() * student.dtype.itemsize,
        teacher=teacher_size * itemsize,
        trained=_trained_weights(config, student) * FP32_BYTES * OPTIMIZER_COPIES,
        activations=activations + logits,
        seconds=work / (EFFICIENCY * flops),
        seq_length=seq_length,
        batch=batch_samples(size),
    )


def _trained_weights(config: RecoveryConfig, student: PreTrainedModel) -> int:
    """Count the trained weights: the weights of the adapter, on a copy of the model without weights, or all."""
    if config.train == "full":
        return student.num_parameters()
    try:
        empty = skeleton(student, deepcopy(student.config))
    except Exception:
        return 0  # the constructor of this class needs more than a config
    with torch.device("meta"):
        adapter = adapted(empty, lora_config(config, empty))
    return sum(weight.numel() for weight in adapter.parameters() if weight.requires_grad)


def check_recovery_memory(
    config: RecoveryConfig, dense: PreTrainedModel, student: PreTrainedModel, loaded: bool
) -> None:
    """Raise `StructPruneError` if a recovery needs more memory than the device has free.

    Args:
        config: How the model is trained.
        dense: The teacher, or a model of its size.
        student: The trained model.
        loaded: Whether both models are already in memory, so that they need no free memory.
    """
    device = default_device()
    available = free_bytes(device)
    if available is None:
        return

    estimate = estimate_recovery(config, dense, student, flops=1.0)
    needed = estimate.trained + estimate.activations
    if not loaded:
        needed += estimate.weights + estimate.teacher
    needed = int((1 - MEMORY_ERROR) * needed)
    if needed <= available:
        return

    suggestions = [f"`seq_length` below {estimate.seq_length}"]
    if config.train == "full":
        suggestions.append("`train`='lora'")
    if not config.training.get("gradient_checkpointing"):
        suggestions.append("gradient_checkpointing=True in `training`")
    suggestions.append("several GPUs (docs/recovery_many_gpus.md)")

    raise StructPruneError(
        f"The recovery takes at least {readable_size(needed)} on {device.type} (optimizer "
        f"{readable_size(estimate.trained)}, activations {readable_size(estimate.activations)}), and "
        f"{readable_size(available)} are free. Set {', or '.join(suggestions[:-1])}, or use {suggestions[-1]}."
    )
