"""Hashes models, samples and vocabularies, and keeps text in files named by such hashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import StructPruneError
from ..written import whole_lines
from .offloading import weight_of


# The fields of a config that say where a model comes from or what a Trainer sets, and not what it computes.
ORIGIN_FIELDS = (
    *("_name_or_path", "transformers_version", "architectures", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's config and every weight by SHA-256, in hexadecimal digits."""
    class_and_config = [type(model).__name__, computing(model.config)]
    digest = sha256(json.dumps(class_and_config, sort_keys=True, default=str).encode())
    for name, tensor in _weights(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def checksums(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, torch.Size, int]]:
    """Give the dtype, shape and CRC-32 of every weight by name, in half the time of a `fingerprint`."""
    return {name: (tensor.dtype, tensor.shape, crc32(raw_bytes(tensor))) for name, tensor in _weights(model)}


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        yield name, weight_of(model, name) if tensor.is_meta else tensor


def computing(config: PretrainedConfig) -> dict[str, Any]:
    """Select the fields of a config that change the outputs of the model."""
    return {name: value for name, value in config.to_dict().items() if name not in ORIGIN_FIELDS}


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary with its added tokens: which token each id stands for."""
    return json_hash(sorted(tokenizer.get_vocab().items()))


def json_hash(value: Any) -> str:
    """Hash a value that JSON can hold by SHA-256, in hexadecimal digits."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class KeptText:
    """Keeps batches of text for later runs, in a file named by a hash of all dependencies."""

    def __init__(self, kind: str, *depends_on: Any):
        name = f"{kind}-batches-{json_hash(depends_on)[:24]}.jsonl"
        self.path = Path(constants.HF_HOME, "structprune", name).expanduser()

    def read(self) -> dict[str, Any]:
        """Read the batches by their names."""
        return dict(whole_lines(self.path))

    def add(self, name: str, batch: Any) -> None:
        """Add a batch to the file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # A process that was killed may have left half a line, so that each value begins a new one.
                file.write(f"\n{json.dumps([name, batch])}\n")
        except OSError as error:
            raise StructPruneError(
                f"Self-written text cannot be kept in {self.path.parent} ({error}); set HF_HOME to another folder."
            ) from error


def tensor_hash(tensor: Tensor) -> str:
    """Hash a tensor's bytes by SHA-256, in hexadecimal digits."""
    return sha256(raw_bytes(tensor)).hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Read the bytes of a tensor on any device, in order."""
    # Viewed as uint8, because numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
