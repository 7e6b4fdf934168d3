"""The model that a pruned one learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM

from .errors import StructPruneError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_teacher(
    teacher: PreTrainedModel | str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
) -> PreTrainedModel:
    """A teacher from its id or folder; one that is loaded already comes back as it is.

    Args:
        teacher: A causal language model, or where it is.
        dtype: Of its weights; `auto` is as saved.
        device: Where it goes; with `auto`, accelerate puts what does not fit on the CPU and on disk.

    Raises:
        StructPruneError: If it cannot be loaded.
    """
    if not isinstance(teacher, (str, Path)):
        return teacher
    try:
        return AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype, device_map=device)
    except (OSError, ValueError) as error:
        raise StructPruneError(f"The teacher {str(teacher)!r} cannot be loaded: {error}") from error


def check_teacher(teacher: PreTrainedModel, model: PreTrainedModel, hidden: bool) -> None:
    """Refuse a teacher that the model cannot be compared with.

    Args:
        teacher: The teacher.
        model: The model that learns from it.
        hidden: Whether their hidden states are compared too.

    Raises:
        StructPruneError: If their vocabularies differ, or their hidden states do and are to be compared.
    """
    theirs, mine = (each.config.get_text_config() for each in (teacher, model))
    if theirs.vocab_size != mine.vocab_size:
        raise StructPruneError(
            f"The teacher has a vocabulary of {theirs.vocab_size} tokens and the model one of {mine.vocab_size}, so "
            "their predictions cannot be compared; take the model that was pruned as the teacher, or leave the "
            "teacher out."
        )
    if not hidden:
        return
    if theirs.hidden_size != mine.hidden_size:
        raise StructPruneError(
            f"hidden_weight compares hidden states, but the teacher's have {theirs.hidden_size} channels and the "
            f"model's {mine.hidden_size}: its hidden space was pruned; set hidden_weight=0."
        )
    if theirs.num_hidden_layers != mine.num_hidden_layers:
        raise StructPruneError(
            f"hidden_weight compares hidden states block by block, but the teacher has {theirs.num_hidden_layers} "
            f"blocks and the model {mine.num_hidden_layers}; set hidden_weight=0."
        )
