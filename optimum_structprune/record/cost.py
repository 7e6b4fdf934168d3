"""The estimated memory of a run and of a recovery, and the refusal of a run that cannot fit.

`pruning/cost.py` estimates a pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..arch.devices import free_bytes
from ..config.recovery import LORA, RecoveryConfig
from ..system.errors import StructPruneError
from ..system.stages import readable_size
from .table import aligned


# A run is refused only if this share of its estimated memory is not free.
REFUSED_SHARE = 0.7
# The values per token that a layer keeps for the backward pass, as multiples of the hidden size and of the FFN size.
STORED_HIDDEN = 12
STORED_FFN = 4
# The bytes of a trained weight: the gradient, both moments of Adam, and the initial value, in fp32.
TRAINED_BYTES = 16
# The bytes of a value in 16 bits, in which most machines train.
HALF_BYTES = 2
# The bytes of the logits of a few tokens in a training, with their gradients.
LOGIT_BYTES = 6 * 2**25


@dataclass(frozen=True)
class Cost:
    """The estimated memory of a run in one process.

    Attributes:
        memory: The peak bytes on the compute device, by purpose.
        host: The peak bytes in CPU memory of a model that is offloaded.
    """

    memory: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Return the peak bytes on the compute device."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        """Return the memory as a table."""
        rows = [("memory on the device", readable_size(self.total))]
        rows += [(f"  {purpose}", readable_size(size)) for purpose, size in self.memory.items()]
        rows.append(("in CPU memory", readable_size(self.host)))
        return aligned(rows)


def recovery_cost(
    config: RecoveryConfig,
    original: PreTrainedModel,
    student: PreTrainedModel,
    seq_length: int,
) -> Cost:
    """Estimate the memory of a recovery in samples of `seq_length` tokens, with the teacher in memory."""
    text = student.config.get_text_config()
    itemsize = student.dtype.itemsize
    parameters = student.num_parameters()
    table = student.get_input_embeddings().get_parameter("weight")
    trained = parameters
    if config.train != "full":
        # An adapter of a square matrix has 2 r weights for each row.
        trained = 2 * config.lora.get("r", LORA["r"]) * (parameters - table.numel()) // text.hidden_size
        if text.vocab_size < original.config.get_text_config().vocab_size:
            trained += table.numel()
    # The attribute is an error if layers differ. The dictionary has the largest width.
    ffn = text.to_dict().get("intermediate_size") or 4 * text.hidden_size
    stored = STORED_HIDDEN * text.hidden_size + STORED_FFN * ffn
    if config.training.get("gradient_checkpointing"):
        stored = text.hidden_size + stored // text.num_hidden_layers
    samples = int(config.training.get("per_device_train_batch_size") or 4)

    memory = {
        "weights": itemsize * parameters,
        "teacher": itemsize * original.num_parameters(),
        "optimizer": TRAINED_BYTES * trained,
        "activations": HALF_BYTES * samples * seq_length * text.num_hidden_layers * stored + LOGIT_BYTES,
    }
    return Cost(memory)


def check_recovery_memory(cost: Cost, device: torch.device, loaded: bool) -> None:
    """Raise `StructPruneError` if a recovery needs more memory than its device has free. Loaded models need none."""
    memory = dict(cost.memory)
    if loaded:
        del memory["weights"], memory["teacher"]
    advice = (
        "Set a smaller `seq_length`, `train`='lora' or gradient_checkpointing=True in `training`, train with "
        "--teacher-cache, or use several GPUs (docs/recovery_many_gpus.md)."
    )
    check_fits("The recovery", memory, device, advice)


def check_fits(name: str, memory: Mapping[str, int], device: torch.device, advice: str) -> None:
    """Raise `StructPruneError` if a run needs more memory than its device has free."""
    available = free_bytes(device)
    needed = int(REFUSED_SHARE * sum(memory.values()))
    if available is not None and needed > available:
        sizes = ", ".join(f"{purpose} {readable_size(size)}" for purpose, size in memory.items())
        raise StructPruneError(
            f"{name} takes at least {readable_size(needed)} on {device} (estimated: {sizes}), and "
            f"{readable_size(available)} are free. {advice}"
        )
