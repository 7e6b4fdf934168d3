"""The model that a pruned one learns from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..config.fields import read_mapping
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..forward.divergence import likeliest
from ..forward.metrics import input_device


if TYPE_CHECKING:
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
            f"hidden_weight compares hidden states sample by sample, but the teacher has {theirs.num_hidden_layers} "
            f"samples and the model {mine.num_hidden_layers}; set hidden_weight=0."
        )


INDEX_NAME = "teacher_logits.json"


# 64 likeliest tokens take 512 bytes per position, so a shard takes 32 MiB.
TOKENS_PER_SHARD = 2**16


TOKENS, LOG_PROBABILITIES = "teacher_tokens", "teacher_log_probabilities"


@torch.no_grad()
def write_teacher_logits(
    folder: str | Path,
    teacher: PreTrainedModel,
    samples: Tensor,
    top_k: int,
    temperature: float,
    perplexity: Mapping[str, float],
) -> None:
    """Run a teacher over token samples and keep what it finds likeliest.

    The folder appears only once it is whole.

    Args:
        folder: Where to; it must not exist.
        teacher: A causal language model.
        samples: Token ids, shape `(samples, seq_length)`.
        top_k: Tokens to keep per position.
        temperature: Divides the logits.
        perplexity: The teacher's own on held-out text, by domain, which is kept beside them.

    Raises:
        StructPruneError: If the folder exists.
    """
    target = Path(folder)
    if target.exists():
        raise StructPruneError(f"{target} exists; name a new folder for the teacher's logits.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    vocab_size = teacher.config.get_text_config().vocab_size
    shards = samples.split(max(1, TOKENS_PER_SHARD // samples.shape[1]))
    index = {
        "top_k": min(top_k, vocab_size),
        "temperature": temperature,
        "vocab_size": vocab_size,
        "shards": [len(shard) for shard in shards],
        "perplexity": dict(perplexity),
    }
    training = teacher.training
    teacher.eval()
    try:
        for number, shard in enumerate(logging.tqdm(shards, desc="teacher", unit="shard")):
            save_file(_predictions(teacher, shard, index["top_k"], temperature), staging / _shard_name(number))
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        teacher.train(training)
        shutil.rmtree(staging, ignore_errors=True)


def _predictions(teacher: PreTrainedModel, samples: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    device = input_device(teacher)
    pairs = [
        likeliest(teacher(ids[None].to(device), use_cache=False).logits[0], top_k, temperature) for ids in samples
    ]
    tokens, log_probabilities = (torch.stack(values).cpu() for values in zip(*pairs, strict=True))
    return {"input_ids": samples.contiguous(), TOKENS: tokens.to(torch.int32), LOG_PROBABILITIES: log_probabilities}


class TeacherLogits:
    """What `write_teacher_logits` wrote.

    Args:
        folder: Where to.

    Raises:
        StructPruneError: If it holds nothing of the kind.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index: dict[str, Any] = dict(read_mapping(self.folder / INDEX_NAME, json.loads))
        self._places = [
            (_shard_name(number), row) for number, count in enumerate(self.index["shards"]) for row in range(count)
        ]

    def check(self, samples: Tensor, recovery: RecoveryConfig, vocab_size: int) -> None:
        """Hold the folder against a training run.

        Args:
            samples: Its text.
            recovery: Its settings.
            vocab_size: Of its model.

        Raises:
            StructPruneError: If it belongs to another one, with what differs.
        """
        top_k = min(recovery.top_k or vocab_size, vocab_size)
        wanted = {"top_k": top_k, "temperature": float(recovery.temperature), "vocab_size": vocab_size}
        for name, value in wanted.items():
            if self.index[name] != value:
                raise StructPruneError(
                    f"The teacher's logits in {self.folder} were written with {name}={self.index[name]}, and this "
                    f"run has {name}={value}; name a new folder to write them again."
                )
        if len(self._places) != len(samples) or any(
            not torch.equal(self._read(row, "input_ids")[0], ids) for row, ids in enumerate(samples)
        ):
            raise StructPruneError(
                f"The teacher's logits in {self.folder} were written for other text, {len(self._places)} samples "
                f"against {len(samples)} in this run; name a new folder to write them again."
            )

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The likeliest tokens of a sample, shape `(seq_length, top_k)`, and their log-probabilities."""
        tokens, log_probabilities = self._read(row, TOKENS, LOG_PROBABILITIES)
        return {TOKENS: tokens.long(), LOG_PROBABILITIES: log_probabilities}

    def _read(self, row: int, *keys: str) -> list[Tensor]:
        name, at = self._places[row]
        try:
            with safe_open(self.folder / name, framework="pt") as shard:
                return [shard.get_slice(key)[at] for key in keys]
        except (OSError, SafetensorError) as error:
            raise StructPruneError(f"{self.folder / name} is not readable: {error}") from error


class TrainingSamples(Dataset):
    """Token samples as the Trainer takes them, with the teacher's predictions where they are on disk.

    Args:
        samples: Token ids, shape `(samples, seq_length)`.
        logits: Of the same samples.
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
