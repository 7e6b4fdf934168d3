"""The model that a pruned one learns from, and the samples that both are run on."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import StructPruneError


def load_teacher(
    teacher: PreTrainedModel | str | Path, model: PreTrainedModel, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A teacher that a model can be compared with; from an id or folder, it is loaded as the model is."""
    if isinstance(teacher, (str, Path)):
        try:
            teacher = AutoModelForCausalLM.from_pretrained(
                teacher, dtype=model.dtype, device_map=model.device, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise StructPruneError(f"The teacher {str(teacher)!r} cannot be loaded: {error}") from error
    taught, learnt = (each.config.get_text_config().vocab_size for each in (teacher, model))
    if taught != learnt:
        raise StructPruneError(
            f"The teacher has a vocabulary of {taught} tokens and the model one of {learnt}, so their predictions "
            "cannot be compared; take the model that was pruned as the teacher, or leave the teacher out."
        )
    return teacher


class TrainingSamples(Dataset):
    """Samples as the Trainer takes them; `ids` has the shape `(samples, seq_length)`."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}
