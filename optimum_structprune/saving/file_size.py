"""The size of the file that is served, as a figure of a shape: a GGUF file, or the weights and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ..arch.spec import VOCAB, ArchSpec, Widths
from ..config.pruning import FILE, StructPruneConfig
from ..domains.manifest import tokenizer_of
from ..system.errors import StructPruneError
from ..widths.budget import FIGURES, Figure, Shapes
from .gguf_types import BLOCKS


TOKENIZER = "tokenizer.json"
# The names of dtypes in a safetensors file. Its tensors are sorted by the size of their elements.
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@FIGURES.register(FILE)
def _file(shapes: Shapes) -> Figure:
    """Return the bytes of the file that is served, with its tokenizer.

    The tokenizer of fewer tokens is not known before text has ranked them. Until then, its size is in proportion to
    the number of tokens. Afterwards it is an upper bound.
    """
    tokenizer = tokenizer_of(shapes.model)
    if tokenizer is None:
        raise StructPruneError(f"The budget {FILE!r} counts the tokenizer of the model. Pass `tokenizer`.")

    kind = shapes.config.gguf
    rows = shapes.model.config.get_text_config().vocab_size
    if kind is None:
        vocabulary = tokenizer_bytes(tokenizer)
    else:
        from .gguf_metadata import vocabulary_bytes  # most runs write no GGUF file

        vocabulary = vocabulary_bytes(tokenizer, rows)

    by_number = _bytes_by_number(shapes, tokenizer, vocabulary)

    def size(widths: Widths) -> int:
        model = shapes.skeleton(widths)
        number = widths.get(VOCAB, rows)
        assert isinstance(number, int)
        if kind is None:
            return safetensors_bytes(model, shapes.model.dtype) + by_number(number)

        from .gguf_file import gguf_bytes

        return gguf_bytes(model, by_number(number), kind)

    return Figure(size, lambda figure: f"{figure / 1e6:,.2f} MB")


def _bytes_by_number(shapes: Shapes, tokenizer: PreTrainedTokenizerBase, all_bytes: int) -> Callable[[int], int]:
    """Return a function from a number of tokens to the bytes of their tokenizer, which has `all_bytes` in full."""
    rows = shapes.model.config.get_text_config().vocab_size
    if shapes.order is None:
        return lambda number: all_bytes * number // rows

    removed_bytes = _token_bytes(tokenizer, shapes.config.gguf is not None)
    sizes = [removed_bytes.get(token, 0) for token in reversed(shapes.order)]
    removable = [0, *accumulate(sizes)]
    return lambda number: all_bytes - removable[rows - number]


def _token_bytes(tokenizer: PreTrainedTokenizerBase, is_gguf: bool) -> Mapping[int, int]:
    """Return the bytes by which a file shrinks at least without a token, by its id.

    A token has its text and the merges that produce it. In a GGUF file, the text has its length in 8 bytes and its
    type in 4 bytes. In `tokenizer.json`, it has at least a comma, a colon and a digit.
    """
    ids = tokenizer.get_vocab()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]

    def size(text: str) -> int:
        if is_gguf:
            return 8 + len(text.encode())
        return len(json.dumps(text, ensure_ascii=False).encode())

    sizes = {token: size(text) + (4 if is_gguf else 3) for text, token in ids.items()}
    for first, second in model.get("merges", ()):
        product = ids.get(first + second)
        if product is not None:
            sizes[product] += size(f"{first} {second}")
    return sizes


def bytes_by_type(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> dict[str, int]:
    """Return the size of the GGUF file of a model by data type, ascending."""
    sizes = {}
    for kind in BLOCKS:
        figure = FIGURES.get(FILE)(Shapes(replace(config, gguf=kind), arch, model, ()))
        sizes[kind] = int(figure.of({}))
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the bytes of the `tokenizer.json` of a tokenizer."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _bytes_in(Path(folder), TOKENIZER)


def safetensors_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the size of the safetensors file of a model, which may have no weights.

    Args:
        model: The model.
        dtype: The dtype of its weights.
    """
    tied_names = getattr(model, "all_tied_weights_keys", {})
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied_names}
    # Some classes have other names in their files.
    tensors = revert_weight_conversion(model, tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start = end
        end += prod(tensors[name].shape) * dtype.itemsize
        description = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(tensors[name].shape)}
        header[name] = {**description, "data_offsets": [start, end]}

    length = len(json.dumps(header, separators=(",", ":")))
    # The file begins with the length of the header in 8 bytes, and the header is padded to a multiple of 8.
    return 8 + length + -length % 8 + end


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the weights and of the tokenizer in a folder: `*.safetensors` and `tokenizer.json`."""
    return _bytes_in(folder, "*.safetensors") + _bytes_in(folder, TOKENIZER)


def _bytes_in(folder: Path, pattern: str) -> int:
    """Return the bytes of the files in a folder that match a pattern."""
    return sum(path.stat().st_size for path in folder.glob(pattern))
