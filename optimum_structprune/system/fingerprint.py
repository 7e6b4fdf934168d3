"""Hash models, samples, vocabularies and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .offloading import weight_of


WORD_BYTES = 8
# The fields of a config that do not change the outputs: the origin of a model, and settings of a Trainer.
ORIGIN_FIELDS = (
    *("_name_or_path", "transformers_version", "architectures", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's config and every weight by SHA-256, in hexadecimal digits."""
    class_and_config = [type(model).__name__, computing(model.config)]
    return tensors_hash(_weights(model), json.dumps(class_and_config, sort_keys=True, default=str))


def tensors_hash(tensors: Iterable[tuple[str, Tensor]], settings: str) -> str:
    """Hash settings, and the names, dtypes, shapes and bytes of tensors by SHA-256, in hexadecimal digits."""
    digest = sha256(settings.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def shapes_of(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shape of every weight by name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def file_hash(path: Path) -> str:
    """Hash the bytes of a file by SHA-256, in hexadecimal digits."""
    digest = sha256()
    with path.open("rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def checksums(model: PreTrainedModel) -> dict[str, tuple[Any, ...]]:
    """Return the dtype, the shape and two checksums of every weight by name.

    Equal weights have equal checksums on every device. Each device adds up its own weights, so that only the checksums
    are copied to the CPU. Checksums detect changes such as a training. Use `fingerprint` against an attacker.
    """
    formats: dict[str, tuple[torch.dtype, torch.Size]] = {}
    sums: dict[torch.device, dict[str, Tensor]] = {}
    # Weights on disk are mapped into memory, so each is dropped before the next is read.
    for name, tensor in _weights(model):
        formats[name] = (tensor.dtype, tensor.shape)
        sums.setdefault(tensor.device, {})[name] = _checksum(tensor)

    identities = {}
    for sums_by_name in sums.values():
        pairs = torch.stack(list(sums_by_name.values())).tolist()
        for name, pair in zip(sums_by_name, pairs, strict=True):
            identities[name] = (*formats[name], *pair)
    return identities


def _checksum(tensor: Tensor) -> Tensor:
    """Return two weighted sums of a tensor's bytes in words of 64 bits, modulo 2**64, shape `(2,)`.

    The words form a matrix. The sum of each row and of each column is multiplied by its number.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    if len(flat) % WORD_BYTES or flat.storage_offset() % WORD_BYTES:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % WORD_BYTES))
    words = flat.view(torch.int64)

    num_rows = 1
    if tensor.ndim > 1 and tensor.shape[0] > 0 and len(words) % tensor.shape[0] == 0:
        num_rows = tensor.shape[0]
    matrix = words.view(num_rows, -1)
    return torch.stack([_numbered_sum(matrix.sum(1)), _numbered_sum(matrix.sum(0))])


def _numbered_sum(values: Tensor) -> Tensor:
    """Multiply each value by its number, from 1 on, and add them up, modulo 2**64."""
    return (values * torch.arange(1, len(values) + 1, device=values.device)).sum()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the weights of a model. Offloaded weights are read one by one."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            tensor = weight_of(model, name)
        yield name, tensor


def computing(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a config that change the outputs of a model."""
    return {name: value for name, value in config.to_dict().items() if name not in ORIGIN_FIELDS}


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary with its added tokens, as pairs of token and id."""
    return json_hash(sorted(tokenizer.get_vocab().items()))


def json_hash(value: Any) -> str:
    """Hash a JSON value by SHA-256, in hexadecimal digits."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Hash a tensor's bytes by SHA-256, in hexadecimal digits."""
    return sha256(raw_bytes(tensor)).hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Read the bytes of a tensor on any device, in order."""
    # Viewed as uint8, because numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
