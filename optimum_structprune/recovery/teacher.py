"""The model that a pruned one learns from, in memory or as its likeliest predictions on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from math import inf
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..config.fields import read_mapping
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..forward.divergence import likeliest
from ..forward.metrics import evaluating, input_device
from ..plain_json import to_json
from ..system.disk import Output
from .identity import DIGITS, weights_hash


INDEX_NAME = "teacher_logits.json"
# 64 likeliest tokens take 512 bytes per position, so a shard takes 32 MiB.
TOKENS_PER_SHARD = 2**16
# The names of the likeliest tokens and of their log-probabilities, in the shards and in the batches of the Trainer.
TOKENS, LOG_PROBABILITIES = "teacher_tokens", "teacher_log_probabilities"


def load_teacher(
    teacher: PreTrainedModel | str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a teacher from its id or folder; one that is loaded already comes back as it is."""
    if not isinstance(teacher, (str, Path)):
        return teacher
    try:
        return AutoModelForCausalLM.from_pretrained(
            teacher, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise StructPruneError(f"The teacher {str(teacher)!r} cannot be loaded: {error}") from error


def check_teacher(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Refuse a teacher that the model cannot be compared with."""
    theirs, mine = (each.config.get_text_config() for each in (teacher, model))
    if theirs.vocab_size != mine.vocab_size:
        raise StructPruneError(
            f"The teacher has a vocabulary of {theirs.vocab_size} tokens and the model one of {mine.vocab_size}, so "
            "their predictions cannot be compared; take the model that was pruned as the teacher, or leave the "
            "teacher out."
        )


@torch.no_grad()
def write_teacher_logits(
    folder: str | Path,
    teacher: PreTrainedModel,
    samples: Tensor,
    top_k: int,
    temperature: float,
    perplexity: Mapping[str, float],
) -> None:
    """Run a teacher over samples and keep what it finds likeliest.

    The folder appears only once all of it is written. The teacher's training mode is left as it was. `samples` has the
    shape `(samples, seq_length)`.
    """
    if Path(folder).exists():
        raise StructPruneError(f"{folder} exists; name a new folder for the teacher's logits.")
    vocab_size = teacher.config.get_text_config().vocab_size
    shards = samples.split(max(1, TOKENS_PER_SHARD // samples.shape[1]))
    index = {
        "teacher": weights_hash(teacher),
        "top_k": min(top_k, vocab_size),
        "temperature": temperature,
        "vocab_size": vocab_size,
        "shards": [len(shard) for shard in shards],
        "perplexity": perplexity,
    }
    with Output(folder).staged() as staging, evaluating(teacher):
        for number, shard in enumerate(logging.tqdm(shards, desc="teacher", unit="shard")):
            save_file(_predictions(teacher, shard, index["top_k"], temperature), staging / _shard_name(number))
        (staging / INDEX_NAME).write_text(to_json(index) + "\n")


def _predictions(teacher: PreTrainedModel, samples: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    device = input_device(teacher)
    pairs = [
        likeliest(teacher(ids[None].to(device), use_cache=False).logits[0], top_k, temperature) for ids in samples
    ]
    tokens, log_probabilities = (torch.stack(values).cpu() for values in zip(*pairs, strict=True))
    return {"input_ids": samples.contiguous(), TOKENS: tokens.to(torch.int32), LOG_PROBABILITIES: log_probabilities}


class TeacherLogits:
    """The predictions that `write_teacher_logits` wrote, by the row of their sample.

    Attributes:
        folder: The folder.
        teacher: The `weights_hash` of the teacher; None where an earlier version wrote the predictions.
        perplexity: The teacher's perplexity on held-out text, by domain.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_mapping(self.folder / INDEX_NAME, json.loads)
        try:
            self.teacher = None if index.get("teacher") is None else str(index["teacher"])
            # JSON has no infinity, which is the perplexity of a teacher that is destroyed.
            self.perplexity = {
                str(name): inf if value is None else float(value) for name, value in index["perplexity"].items()
            }
            self._places = [
                (_shard_name(number), row) for number, count in enumerate(index["shards"]) for row in range(count)
            ]
            self._written = {name: index[name] for name in ("top_k", "temperature", "vocab_size")}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StructPruneError(
                f"{self.folder / INDEX_NAME} is no index of a teacher's logits ({type(error).__name__}: {error}); "
                "name a new folder to write them again."
            ) from error

    def check(self, samples: Tensor, recovery: RecoveryConfig, vocab_size: int) -> None:
        """Refuse predictions that belong to another training run. `samples` has the shape `(samples, seq_length)`."""
        top_k = min(recovery.top_k or vocab_size, vocab_size)
        wanted = {"top_k": top_k, "temperature": float(recovery.temperature), "vocab_size": vocab_size}
        for name, value in wanted.items():
            if self._written[name] != value:
                raise StructPruneError(
                    f"The teacher's logits in {self.folder} were written with {name}={self._written[name]}, and this "
                    f"run has {name}={value}; name a new folder to write them again."
                )
        if len(self._places) != len(samples) or any(
            not torch.equal(self._read(row, "input_ids")[0], ids) for row, ids in enumerate(samples)
        ):
            raise StructPruneError(
                f"The teacher's logits in {self.folder} were written for other text, {len(self._places)} samples "
                f"against {len(samples)} in this run; name a new folder to write them again."
            )

    def check_teacher(self, teacher: PreTrainedModel | str | Path, trust_remote_code: bool = False) -> None:
        """Refuse the predictions of another teacher."""
        if self.teacher is None:
            warnings.warn(
                f"The teacher's logits in {self.folder} do not say whose they are, so the teacher is not checked.",
                stacklevel=3,
            )
            return
        mine = weights_hash(load_teacher(teacher, trust_remote_code=trust_remote_code))
        if mine != self.teacher:
            raise StructPruneError(
                f"The teacher's logits in {self.folder} were written by the model {self.teacher[:DIGITS]}…, and the "
                f"teacher of this run is {mine[:DIGITS]}…; name a new folder to write them again, or leave the "
                "teacher out."
            )

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The likeliest tokens of a sample, shape `(seq_length, top_k)`, int64, and their log-probabilities, fp32."""
        tokens, log_probabilities = self._read(row, TOKENS, LOG_PROBABILITIES)
        return {TOKENS: tokens.long(), LOG_PROBABILITIES: log_probabilities}

    def _read(self, row: int, *keys: str) -> list[Tensor]:
        name, row_of_shard = self._places[row]
        try:
            with safe_open(self.folder / name, framework="pt") as shard:
                return [shard.get_slice(key)[row_of_shard] for key in keys]
        except (OSError, SafetensorError, IndexError) as error:
            raise StructPruneError(f"{self.folder / name} is not readable: {error}") from error


class TrainingSamples(Dataset):
    """Samples as the Trainer takes them, with the teacher's predictions where they are on disk. `samples` has the
    shape `(samples, seq_length)`.
    """

    def __init__(self, samples: Tensor, logits: TeacherLogits | None = None):
        self.samples, self.logits = samples, logits

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.samples[row]
        stored = {} if self.logits is None else self.logits[row]
        return {"input_ids": ids, "labels": ids, **stored}


def _shard_name(number: int) -> str:
    return f"teacher_logits-{number:05d}.safetensors"
