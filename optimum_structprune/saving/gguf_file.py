"""Write a model and its tokenizer as a GGUF file for llama.cpp."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..arch import llama_cpp
from ..arch.meta import check_plain, is_quantized
from ..domains.manifest import check_tokens
from ..system.disk import GGUFOutput
from ..system.errors import StructPruneError
from .gguf_metadata import add_metadata, add_sizes, add_vocabulary, header_bytes, tokenizer_parts
from .gguf_types import BLOCKS, K_QUANTS, QUANTISER, WHOLE, check_gguf_type


# The data type of a file whose type is not named, by the dtype of the model.
TYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ROPE_NAME = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"


@dataclass(frozen=True)
class GGUFFile:
    """A description of a GGUF file.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        dtype: llama.cpp's name of the data type of the matrices.
        parameters: The number of values in all tensors.
        in_16_bits: The number of values in 16 bits, because their rows are not multiples of 32.
        bytes: The size of the file.
    """

    architecture: str
    dtype: str
    parameters: int
    in_16_bits: int
    bytes: int

    def __str__(self) -> str:
        """Return a description in one line."""
        return f"architecture {self.architecture}, {self.parameters:,} parameters as {self.dtype}, {self.size}"

    @property
    def size(self) -> str:
        """Return the size of the file, and the reason if it is larger than its data type suggests."""
        text = f"{self.bytes / 1e6:,.1f} MB"

        if self.in_16_bits:
            share = self.in_16_bits / self.parameters
            text += f" ({share:.1%} of its parameters are in 16 bits, as their rows are not multiples of 32)"
        return text


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a GGUF file, which is computed from parameters of the model.

    Attributes:
        name: The name in the file.
        parameters: The names of the parameters, which are concatenated along the rows.
        module_name: The name that distinguishes the halves of a divided parameter.
        layer_config: The config of the tensor's layer; None outside the layers.
    """

    name: str
    parameters: list[str]
    module_name: str
    layer_config: Any

    def values(self, weights: Mapping[str, Tensor], architecture: str, device: str = "cpu") -> Tensor:
        """Return the values in fp32, in the order of rows that the architecture expects."""
        parts = []

        for parameter in self.parameters:
            rows = weights[parameter].detach().to(device, torch.float32)
            parts.append(llama_cpp.in_file_order(parameter, rows, self.layer_config, architecture, self.module_name))

        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)


def export_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool = False,
    dtype: str | None = None,
) -> GGUFFile:
    """Write a model and its tokenizer as one GGUF file for llama.cpp.

    Layers may differ in width: llama.cpp's architectures `deci` and `openelm` read the sizes of each layer. A model
    with uniform layers is written as its own architecture, as llama.cpp's converter does, because more programs
    support it. The file appears in one step at the end.

    With fewer than 16 bits, vectors and matrices whose rows are not whole blocks keep more bits, and the head is
    `q8_0`. For K-quants llama.cpp chooses the type of the head.

    Args:
        model: A model of one of the types in `arch/llama_cpp.py`. It is not modified.
        path: The file to write. Missing parent folders are created.
        tokenizer: The tokenizer of the model.
        overwrite: Replace an existing file.
        dtype: llama.cpp's name of the data type of the matrices: `f32`, `f16`, `bf16`, `q8_0`, `q5_1`, `q5_0`, `q4_1`
            or `q4_0`. With llama.cpp's program `llama-quantize` on the `PATH` also `q6_k`, `q5_k_m`, `q4_k_m`,
            `q3_k_m` or `q2_k`. Defaults to the dtype of the model.

    Returns:
        A description of the file.

    Raises:
        StructPruneError: If llama.cpp cannot run the model or does not split text as its tokenizer does, if the data
            type is not available, if the file exists and `overwrite` is false, or if it cannot be written.
    """
    check_gguf(model.config, dtype)
    output = GGUFOutput(path, overwrite)
    output.check()
    check_plain(model)
    check_tokens(model, tokenizer)

    if tokenizer is None:
        raise StructPruneError("A GGUF file contains the tokenizer, and `tokenizer` is None. Pass the model's own.")
    if is_quantized(model):
        raise StructPruneError("`model` is quantized. Load it without quantization to write a GGUF file.")
    if model.dtype not in TYPE_OF_DTYPE:
        raise StructPruneError(f"A GGUF file requires float32, float16 or bfloat16, and `model` is in {model.dtype}.")

    kind = dtype or TYPE_OF_DTYPE[model.dtype]

    with output.staged() as staging:
        if kind in K_QUANTS:
            unquantized = staging.with_name("unquantized.gguf")
            layout = _write(model, unquantized, tokenizer, "F16")
            _quantize(unquantized, staging, kind.upper())
        else:
            layout = _write(model, staging, tokenizer, kind.upper())

        num_bytes = staging.stat().st_size

    in_16_bits = 0 if kind in WHOLE else layout.num_uneven
    return GGUFFile(layout.writer.arch, kind.upper(), layout.num_values, in_16_bits, num_bytes)


def check_gguf(
    config: PretrainedConfig, dtype: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise `StructPruneError` if `export_gguf` cannot write a model, a data type or a tokenizer.

    Call this before the weights are loaded.
    """
    reason = llama_cpp.gguf_refusal(config)
    if reason is not None:
        raise StructPruneError(reason)

    if dtype is not None:
        check_gguf_type(dtype)
    if tokenizer is not None:
        tokenizer_parts(tokenizer)


def _quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize a file with llama.cpp's program, and remove the source."""
    process = subprocess.run([QUANTISER, source, target, kind], capture_output=True, text=True)
    source.unlink()

    if process.returncode or not target.is_file():
        last_line = (process.stderr or process.stdout).strip().rpartition("\n")[2]
        reason = last_line or f"exit status {process.returncode}"
        raise StructPruneError(f"{QUANTISER} could not write {kind}: {reason}")


def _tensor_types(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, gguf.GGMLQuantizationType]:
    """Return the data type of each tensor of a file.

    Args:
        shapes: The shape of each tensor by its name in the file.
        kind: The data type of the matrices.
    """
    types = {}
    head = "output.weight"
    if head not in shapes:
        head = "token_embd.weight"

    for name, shape in shapes.items():
        tensor_type = gguf.GGMLQuantizationType[kind]

        # llama.cpp keeps more bits in the head, whose error affects every token.
        if name == head and kind.lower() in BLOCKS:
            tensor_type = gguf.GGMLQuantizationType.Q8_0

        block_size, _ = gguf.GGML_QUANT_SIZES[tensor_type]

        # llama.cpp supports vectors in F32 only, and a rounded router would choose other experts.
        if len(shape) == 1 or "ffn_gate_inp" in name:
            tensor_type = gguf.GGMLQuantizationType.F32
        elif shape[-1] % block_size:
            tensor_type = gguf.GGMLQuantizationType.F16

        types[name] = tensor_type

    return types


@dataclass(frozen=True)
class _Layout:
    """The tensors of a file.

    Attributes:
        tensors: The tensors that are computed from parameters of the model.
        rope_factors: The divisors of the rotary frequencies, or None.
        types: The data type of each tensor by its name.
        writer: The file, with all fields but the tokenizer.
        num_values: The number of values in all tensors.
        num_uneven: The number of values in matrices whose rows are not whole blocks.
    """

    tensors: list[_StoredTensor]
    rope_factors: Tensor | None
    types: Mapping[str, gguf.GGMLQuantizationType]
    writer: gguf.GGUFWriter
    num_values: int
    num_uneven: int

    @classmethod
    def of(cls, model: PreTrainedModel, path: Path, kind: str) -> _Layout:
        """Return the layout of a file. The model may have no weights."""
        architecture = str(llama_cpp.gguf_architecture(model.config))
        weights = dict(model.named_parameters())
        tensors = list(_stored_tensors(model, architecture))
        shapes = {}

        for tensor in tensors:
            shapes[tensor.name] = tuple(tensor.values(weights, architecture, device="meta").shape)

        rope_factors = _rope_factors(model.config)
        if rope_factors is not None:
            shapes[ROPE_NAME] = tuple(rope_factors.shape)

        types = _tensor_types(shapes, kind)
        num_values = sum(prod(shape) for shape in shapes.values())
        writer = gguf.GGUFWriter(path, architecture)
        add_metadata(writer, model, path.stem, num_values)
        add_sizes(writer, model.config)
        prefix = "ALL" if kind == "F32" else "MOSTLY"
        writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

        for name, shape in shapes.items():
            num_bytes = prod(gguf.quant_shape_to_byte_shape(shape, types[name]))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=types[name])
        return cls(tensors, rope_factors, types, writer, num_values, _num_uneven(shapes))

    def bytes(self, vocabulary: int) -> int:
        """Return the size of the file. `vocabulary` is the bytes of the tokenizer in its header."""
        sizes = [header_bytes(self.writer) + vocabulary]
        sizes += [tensor.nbytes for tensor in self.writer.tensors[0].values()]
        # Each tensor begins at a multiple of the alignment.
        return sum(self.writer.ggml_pad(size, self.writer.data_alignment) for size in sizes)


def gguf_bytes(model: PreTrainedModel, vocabulary: int, kind: str) -> int:
    """Return the size of the file that `export_gguf` writes, to the byte.

    Args:
        model: The model, with or without weights.
        vocabulary: The bytes of its tokenizer in a file; see `vocabulary_bytes`.
        kind: llama.cpp's name of the data type of the matrices, except K-quants.
    """
    return _Layout.of(model, Path("model.gguf"), kind.upper()).bytes(vocabulary)


@contextmanager
def rounded_to(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """Give a model inside `with` the weights that llama.cpp reads from its file of a data type.

    The order of rows in a file does not matter, because each row is quantized alone.
    """
    layout = _Layout.of(model, Path("model.gguf"), kind.upper())
    weights = dict(model.named_parameters())
    originals: dict[str, Tensor] = {}
    try:
        for tensor in layout.tensors:
            tensor_type = layout.types[tensor.name]
            for name in tensor.parameters:
                if name in originals:
                    continue
                weight = weights[name].detach()
                originals[name] = weight.clone()
                packed = _packed(name, weight.float().cpu(), tensor_type)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, tensor_type)).view_as(weight))
        yield
    finally:
        for name, original in originals.items():
            weights[name].detach().copy_(original)


def _write(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> _Layout:
    """Write a file, one tensor at a time, and return its layout."""
    layout = _Layout.of(model, path, kind)
    writer = layout.writer
    weights = dict(model.named_parameters())
    add_vocabulary(writer, tokenizer, model.config.vocab_size)

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        for tensor in layout.tensors:
            values = tensor.values(weights, writer.arch)
            writer.write_tensor_data(_packed(tensor.name, values, layout.types[tensor.name]))

        if layout.rope_factors is not None:
            writer.write_tensor_data(_packed(ROPE_NAME, layout.rope_factors, layout.types[ROPE_NAME]))
    finally:
        writer.close()

    return layout


def _num_uneven(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of values in matrices whose rows are not whole blocks of 32."""
    types = _tensor_types(shapes, "Q8_0")
    return sum(prod(shape) for name, shape in shapes.items() if types[name] == gguf.GGMLQuantizationType.F16)


def _stored_tensors(model: PreTrainedModel, architecture: str) -> Iterator[_StoredTensor]:
    """Yield the tensors of a file that hold parameters of a model."""
    layer_configs = llama_cpp.layer_configs(model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], len(layer_configs))

    for parameter, _ in model.named_parameters():
        numbers = [int(part) for part in parameter.split(".") if part.isdecimal()]
        layer_config = layer_configs[numbers[0]] if numbers else None

        for module_name, parts in llama_cpp.parts_of(parameter, architecture):
            name = names.get_name(module_name, (".weight", ".bias"))
            if name is None:
                raise StructPruneError(f"llama.cpp's architecture {architecture} has no tensor for {parameter}.")

            yield _StoredTensor(name, parts, module_name, layer_config)


def _packed(name: str, values: Tensor, tensor_type: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return values in a data type of GGUF."""
    # An overflow raises an error below.
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(values.numpy(), tensor_type)

    if packed.dtype == np.float16 and not np.isfinite(packed).all():
        raise StructPruneError(f"{name} has values beyond the range of float16. Use bfloat16 or float32.")
    return packed


def _rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return the divisors of the rotary frequencies of Llama 3, shape `(head_dim / 2,)`, or None for other types."""
    rope = llama_cpp.rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None

    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return rope["rope_theta"] ** -exponents / scaled
