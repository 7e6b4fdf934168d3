"""The format of a teacher file: the predictions of a teacher on a text.

A teacher file is a folder with a manifest and safetensors shards. Each position holds the most probable tokens with
their log-probabilities, and tokens that are sampled from the rest, which share the probability of the rest. The stored
distribution is an unbiased estimate of the teacher's distribution, so the gradient of the divergence is unbiased too.
Without samples of the rest, the gradient has a systematic error (Anshumann et al., 2025,
https://arxiv.org/abs/2503.16870, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.fields import read_json
from ..measure.predictions import StoredPredictions
from ..system.codec import from_plain
from ..system.errors import StructPruneError
from ..system.fingerprint import json_hash
from ..system.written import Record


TEACHER_FILE_NAME = "teacher_file.json"
# The folder inside with the config and the tokenizer of the teacher.
TEACHER_NAME = "teacher"
# The number of stored tokens: the most probable ones, and samples of the rest.
TOP = 16
SAMPLES = 16
LOW_BITS = 16


@torch.no_grad()
def compressed(logits: Tensor, top: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of next-token distributions that a teacher file stores.

    The samples of the rest are systematic: their quantiles have equal distances (Madow, 1949), which has less variance
    than independent samples and is unbiased too.

    Args:
        logits: The logits of the teacher, divided by the temperature, shape `(positions, vocab)`.
        top: The number of the most probable tokens.
        samples: The number of tokens that are sampled from the rest.
        generator: The generator of the samples, on the CPU.

    Returns:
        The ids of the most probable and of the sampled tokens, shape `(positions, top + samples)`; the
        log-probabilities of the most probable tokens, shape `(positions, top)`, fp16; and the negative entropy, shape
        `(positions,)`, fp32.
    """
    log_all = logits.float().log_softmax(-1)
    all_probabilities = log_all.exp()
    log_top, ids = log_all.topk(min(top, logits.shape[1]), -1)

    rest = all_probabilities.scatter(1, ids, 0.0).double().cumsum(-1)
    offsets = torch.rand(len(rest), 1, generator=generator, dtype=torch.float64).to(rest.device)
    quantiles = (torch.arange(samples, device=rest.device) + offsets) / samples
    sampled = torch.searchsorted(rest, quantiles * rest[:, -1:], right=True)
    ids = torch.cat([ids, sampled.clamp(max=logits.shape[1] - 1)], 1)
    return ids, log_top.half(), (all_probabilities * log_all).sum(-1)


def high_bits(vocab_size: int) -> int:
    """Return the number of bits of a token id above the lower 16, as a divisor of 8."""
    bits = (vocab_size - 1).bit_length() - LOW_BITS
    for size in (0, 1, 2, 4, 8):
        if bits <= size:
            return size
    raise StructPruneError(f"The vocabulary of {vocab_size} tokens is too large for a teacher file.")


def bytes_per_token(vocab_size: int, top: int = TOP, samples: int = SAMPLES) -> float:
    """Return the bytes of a stored token: ids, log-probabilities, the entropy, and its own loss and id."""
    ids = (top + samples) * (LOW_BITS + high_bits(vocab_size)) / 8
    return ids + 2 * top + 4 + 2 + 4


def pack_ids(ids: Tensor, bits: int) -> dict[str, Tensor]:
    """Return token ids as their lower 16 bits, and their upper bits packed into bytes.

    Args:
        ids: Token ids, shape `(positions, tokens)`.
        bits: The number of upper bits; see `high_bits`.
    """
    low = (ids & 0xFFFF).to(torch.int32).to(torch.int16)
    if not bits:
        return {"ids": low}

    per_byte = 8 // bits
    high = torch.nn.functional.pad(ids >> LOW_BITS, (0, -ids.shape[1] % per_byte))
    shifts = bits * torch.arange(per_byte)
    packed = (high.unflatten(1, (-1, per_byte)) << shifts).sum(-1)
    return {"ids": low, "ids_high": packed.to(torch.uint8)}


def unpack_ids(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return the token ids of `pack_ids`, shape `(positions, tokens)`, int64."""
    ids = tensors["ids"].long() & 0xFFFF
    if not bits:
        return ids

    shifts = bits * torch.arange(8 // bits)
    high = (tensors["ids_high"].long()[..., None] >> shifts) & (2**bits - 1)
    return ids | high.flatten(1)[:, : ids.shape[1]] << LOW_BITS


def predictions_of(tensors: Mapping[str, Tensor], targets: Tensor, manifest: TeacherManifest) -> StoredPredictions:
    """Return the predictions in the tensors of a shard, or of a part of it.

    Args:
        tensors: The stored tensors.
        targets: The token of the text at each position, shape `(positions,)`, int64.
        manifest: The settings of the file.
    """
    ids = unpack_ids(tensors, high_bits(manifest.vocab_size))
    probabilities = tensors["log_probabilities"].float().exp()
    losses = tensors["losses"].float()
    has_rest = not manifest.samples
    if not has_rest:
        # The loss is the exact log-probability of the text's own token, so it replaces a sample of this token.
        is_target = ids == targets[:, None]
        own = (-losses).exp()[:, None]
        top = probabilities.masked_fill(is_target[:, : probabilities.shape[1]], 0)

        is_other = ~is_target[:, probabilities.shape[1] :]
        rest = (1 - top.sum(1, keepdim=True) - own).clamp(min=0)
        sampled = is_other * rest / is_other.sum(1, keepdim=True).clamp(min=1)

        ids = torch.cat([ids, targets[:, None]], 1)
        probabilities = torch.cat([top, sampled, own], 1)
    return StoredPredictions(ids, probabilities, tensors["negative_entropy"], losses, manifest.vocab_size, has_rest)


@dataclass
class TeacherManifest(Record):
    """The settings of a teacher file.

    Attributes:
        teacher: The id or the folder name of the teacher; empty if it is unknown.
        teacher_sha256: The hash of the teacher's config and weights; empty for rows of another engine.
        tokenizer_sha256: The hash of the teacher's vocabulary; empty without a tokenizer.
        vocab_size: The number of tokens of the teacher.
        text_sha256: The hash of all rows.
        rows: The number of rows.
        tokens: The number of tokens in all rows.
        longest: The number of tokens in the longest row.
        top: The number of the most probable tokens at each position.
        samples: The number of tokens that are sampled from the rest.
        temperature: The temperature of the distributions.
        seed: The seed of the samples.
        shards: The number of rows in each shard.
    """

    teacher: str
    teacher_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    text_sha256: str
    rows: int
    tokens: int
    longest: int
    top: int = TOP
    samples: int = SAMPLES
    temperature: float = 1.0
    seed: int = 0
    shards: list[int] = field(default_factory=list)

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of a stored token."""
        return bytes_per_token(self.vocab_size, self.top, self.samples)

    @property
    def sha256(self) -> str:
        """Return the hash of the settings, which every shard repeats."""
        return json_hash(self.to_dict())

    @classmethod
    def load(cls, folder: Path) -> TeacherManifest:
        """Read the manifest of a teacher file.

        Raises:
            StructPruneError: If there is no complete teacher file in the folder.
        """
        path = folder / TEACHER_FILE_NAME
        if not path.is_file():
            reason = "holds no teacher file. Write one with `structprune teacher`, or check the path"
            if any(folder.glob("shard-*.safetensors")):
                reason = "holds a teacher file that is not complete. Run the same command again, which resumes"
            raise StructPruneError(f"{folder} {reason}.")
        return from_plain(cls, read_json(path), str(path))


def is_teacher_file(folder: Any) -> bool:
    """Return whether a folder holds a teacher file, complete or not.

    Raises:
        StructPruneError: If it holds a model too.
    """
    if not isinstance(folder, (str, Path)) or not Path(folder).is_dir():
        return False
    is_file = Path(folder, TEACHER_FILE_NAME).is_file() or any(Path(folder).glob("shard-*.safetensors"))
    if is_file and Path(folder, "config.json").is_file():
        raise StructPruneError(f"{folder} holds both a model and a teacher file. Move one of them to another folder.")
    return is_file


def shard_name(number: int) -> str:
    """Return the name of a shard."""
    return f"shard-{number:05}.safetensors"
