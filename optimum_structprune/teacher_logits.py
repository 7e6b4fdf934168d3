"""A teacher's likeliest predictions on disk, so that it need not be in memory while a model learns from it."""

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
from transformers.utils import logging

from .distill import likeliest
from .errors import StructPruneError
from .metrics import input_device
from .schema import read_mapping


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recovery_config import RecoveryConfig

INDEX_NAME = "teacher_logits.json"
# 64 likeliest tokens take 512 bytes per position, so a shard takes 32 MiB.
TOKENS_PER_SHARD = 2**16
TOKENS, LOG_PROBABILITIES = "teacher_tokens", "teacher_log_probabilities"


@torch.no_grad()
def write_teacher_logits(
    folder: str | Path,
    teacher: PreTrainedModel,
    blocks: Tensor,
    top_k: int,
    temperature: float,
    perplexity: Mapping[str, float],
) -> None:
    """Run a teacher over token blocks and keep what it finds likeliest.

    The folder appears only once it is whole.

    Args:
        folder: Where to; it must not exist.
        teacher: A causal language model.
        blocks: Token ids, shape `(blocks, seq_length)`.
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
    shards = blocks.split(max(1, TOKENS_PER_SHARD // blocks.shape[1]))
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


def _predictions(teacher: PreTrainedModel, blocks: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    device = input_device(teacher)
    pairs = [likeliest(teacher(ids[None].to(device), use_cache=False).logits[0], top_k, temperature) for ids in blocks]
    tokens, log_probabilities = (torch.stack(values).cpu() for values in zip(*pairs, strict=True))
    return {"input_ids": blocks.contiguous(), TOKENS: tokens.to(torch.int32), LOG_PROBABILITIES: log_probabilities}


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

    def check(self, blocks: Tensor, recovery: RecoveryConfig, vocab_size: int) -> None:
        """Hold the folder against a training run.

        Args:
            blocks: Its text.
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
        if len(self._places) != len(blocks) or any(
            not torch.equal(self._read(row, "input_ids")[0], ids) for row, ids in enumerate(blocks)
        ):
            raise StructPruneError(
                f"The teacher's logits in {self.folder} were written for other text, {len(self._places)} blocks "
                f"against {len(blocks)} in this run; name a new folder to write them again."
            )

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The likeliest tokens of a block, shape `(seq_length, top_k)`, and their log-probabilities."""
        tokens, log_probabilities = self._read(row, TOKENS, LOG_PROBABILITIES)
        return {TOKENS: tokens.long(), LOG_PROBABILITIES: log_probabilities}

    def _read(self, row: int, *keys: str) -> list[Tensor]:
        name, at = self._places[row]
        try:
            with safe_open(self.folder / name, framework="pt") as shard:
                return [shard.get_slice(key)[at] for key in keys]
        except (OSError, SafetensorError) as error:
            raise StructPruneError(f"{self.folder / name} is not readable: {error}") from error


class TrainingBlocks(Dataset):
    """Token blocks as the Trainer takes them, with the teacher's predictions where they are on disk.

    Args:
        blocks: Token ids, shape `(blocks, seq_length)`.
        logits: Of the same blocks.
    """

    def __init__(self, blocks: Tensor, logits: TeacherLogits | None = None):
        self.blocks, self.logits = blocks, logits

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.blocks[row]
        stored = {} if self.logits is None else self.logits[row]
        return {"input_ids": ids, "labels": ids, **stored}


def _shard_name(number: int) -> str:
    return f"teacher_logits-{number:05d}.safetensors"
