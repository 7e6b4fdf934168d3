"""Writes a model and its tokenizer as a GGUF file for llama.cpp, by layer where widths differ."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .. import __version__
from ..arch import llama_cpp
from ..arch.meta import check_plain, is_quantized
from ..arch.spaces import heads_of
from ..domains.manifest import check_tokens
from ..errors import StructPruneError
from ..system.disk import GGUFOutput
from .gguf_types import BLOCKS, K_QUANTS, QUANTISER, WHOLE, check_gguf_type


# The type under which a model is written as it is, by its dtype.
TYPE_OF_DTYPE = dict(zip((torch.float32, torch.float16, torch.bfloat16), WHOLE, strict=True))
SPACE = "\u2581"  # how SentencePiece writes a space
# Tokens that some models do not mark as special, and that are.
CONTROL = re.compile(r"<pad>|<mask>|<[|｜](.*[|｜])?>", re.DOTALL)
# What tokenizers calls the steps before the merges, in the words of `PRE_TOKENIZERS`, and the field that tells more.
STEPS = {"Digits": ("digits", "individual_digits"), "ByteLevel": ("bytes", "use_regex"), "Split": ("split", "pattern")}


@dataclass(frozen=True)
class GGUFFile:
    """Describes a file: its architecture, its type, and the numbers of values, of those in 16 bits, and of bytes."""

    architecture: str
    dtype: str
    parameters: int
    in_16_bits: int
    bytes: int

    def __str__(self) -> str:
        """Say all of it in one line."""
        return f"architecture {self.architecture}, {self.parameters:,} parameters as {self.dtype}, {self.size}"

    @property
    def size(self) -> str:
        """Say how large the file is, and what makes it larger than its type says."""
        share = f"{self.in_16_bits / self.parameters:.1%} of its parameters are in 16 bits"
        rest = f" ({share}, as their rows are no multiples of 32)" if self.in_16_bits else ""
        return f"{self.bytes / 1e6:,.1f} MB{rest}"


def export_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool = False,
    dtype: str | None = None,
) -> GGUFFile:
    """Write a model and its tokenizer as one GGUF file, which llama.cpp runs as it is.

    Layers may differ in width: llama.cpp's architectures `deci` and `openelm` read the sizes of each layer. A model
    whose layers are alike is written as its own architecture, as llama.cpp's converter does, because more programs
    know that one. The file appears once it is whole. In fewer than 16 bits, vectors and matrices whose rows are no
    whole blocks stay in more, and the head is `q8_0`; llama.cpp chooses its type of K-quants.

    Args:
        model: A model of one of the types in `arch/llama_cpp.py`; it is left as it is.
        path: The file to write; folders above it are made if need be.
        tokenizer: The tokenizer of the model.
        overwrite: Whether a file that exists is replaced.
        dtype: The type of the matrices by llama.cpp's name: `f32`, `f16`, `bf16`, `q8_0`, `q5_1`, `q5_0`, `q4_1`,
            `q4_0`, or with llama.cpp's program `llama-quantize` on the `PATH` also `q6_k`, `q5_k_m`, `q4_k_m`,
            `q3_k_m` and `q2_k`. None is the dtype of the model.

    Raises:
        StructPruneError: If llama.cpp cannot run such a model or cut text as its tokenizer does, no such type can be
            written here, the file exists and may not be replaced, or it cannot be written.
    """
    check_gguf(model.config, dtype)
    output = GGUFOutput(path, overwrite)
    output.check()
    check_plain(model)
    check_tokens(model, tokenizer)
    if tokenizer is None:
        raise StructPruneError("A GGUF file holds the tokenizer too, got None; pass the model's own.")
    if is_quantized(model):
        raise StructPruneError("A GGUF file is written from plain weights; load the model without quantization.")
    if model.dtype not in TYPE_OF_DTYPE:
        raise StructPruneError(f"A GGUF file holds float32, float16 or bfloat16, and the model is in {model.dtype}.")
    kind = dtype or TYPE_OF_DTYPE[model.dtype]
    with output.staged() as staging:
        whole = staging.with_name("whole.gguf") if kind in K_QUANTS else staging
        parameters, uneven = _write(model, whole, tokenizer, "F16" if kind in K_QUANTS else kind.upper())
        if kind in K_QUANTS:
            _quantise(whole, staging, kind.upper())
        size = staging.stat().st_size
    architecture = str(llama_cpp.gguf_architecture(model.config))
    return GGUFFile(architecture, kind.upper(), parameters, 0 if kind in WHOLE else uneven, size)


def check_gguf(
    config: PretrainedConfig, dtype: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Refuse a model, a type and a tokenizer that `export_gguf` cannot write, before weights are loaded."""
    if (reason := llama_cpp.gguf_refusal(config)) is not None:
        raise StructPruneError(reason)
    if dtype is not None:
        check_gguf_type(dtype)
    if tokenizer is not None:
        _parts_of(tokenizer)


def _quantise(whole: Path, target: Path, kind: str) -> None:
    done = subprocess.run([QUANTISER, whole, target, kind], capture_output=True, text=True)
    whole.unlink()
    if done.returncode or not target.is_file():
        last = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise StructPruneError(f"{QUANTISER} could not write {kind}: {last or f'it ended with {done.returncode}'}")


def _types(tensors: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Any]:
    """Choose the type of each tensor of a file by its shape; `kind` is that of the matrices."""
    kinds, types = gguf.GGMLQuantizationType, {}
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    for name, shape in tensors.items():
        # llama.cpp leaves the head in more bits than other matrices: what is lost there is lost at every token.
        wanted = "Q8_0" if name == head and kind.lower() in BLOCKS else kind
        # llama.cpp adds and multiplies by vectors in F32 only; a rounded router sends tokens to other experts.
        if len(shape) == 1 or "ffn_gate_inp" in name:
            wanted = "F32"
        elif shape[-1] % gguf.GGML_QUANT_SIZES[kinds[wanted]][0]:
            wanted = "F16"
        types[name] = kinds[wanted]
    return types


def _write(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[int, int]:
    """Write the file, one tensor at a time; return the number of values in it, and of those in no whole blocks."""
    architecture = str(llama_cpp.gguf_architecture(model.config))
    writer = gguf.GGUFWriter(path, architecture)
    shapes = {name: shape for name, shape, _ in _tensors(model, architecture)}
    types = _types(shapes, kind)
    for name, shape in shapes.items():
        size = gguf.quant_shape_to_byte_shape(shape, types[name])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(size), raw_dtype=types[name])
    total = writer.get_total_parameter_count()[0]
    _add_metadata(writer, model, path.stem, total)
    _add_sizes(writer, model.config)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, tokenizer, model.config.vocab_size)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, tensor in _tensors(model, architecture):
            writer.write_tensor_data(_packed(name, tensor(), types[name]))
    finally:
        writer.close()
    return total, sum(prod(shapes[name]) for name, stored in _types(shapes, "Q8_0").items() if stored.name == "F16")


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Give the name, the shape, and a function that computes the values of each tensor of the file."""
    layers = llama_cpp.layer_configs(model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], len(layers))
    parameters = dict(model.named_parameters())
    stored = [(name, *place) for name in parameters for place in llama_cpp.parts_of(name, architecture)]
    for name, known_as, parts in stored:
        place = names.get_name(known_as, (".weight", ".bias"))
        if place is None:
            raise StructPruneError(f"llama.cpp's architecture {architecture} has no tensor for {name}.")
        layer = next((layers[int(part)] for part in name.split(".") if part.isdecimal()), None)
        values = partial(_values, parameters, parts, known_as, layer, architecture)
        yield place, tuple(values(device="meta").shape), values
    if llama_cpp.rope_of(model.config).get("rope_type") == "llama3":
        factors = _frequency_factors(model.config)
        yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", tuple(factors.shape), lambda: factors


def _values(
    weights: Mapping[str, Tensor], parts: list[str], known_as: str, layer: Any, architecture: str, device: str = "cpu"
) -> Tensor:
    """Join some parameters as the file holds them, in fp32; on the meta device only their shape."""
    pairs = zip(parts, (weights[part].detach().to(device, torch.float32) for part in parts), strict=True)
    ordered = [llama_cpp.in_file_order(*pair, layer, architecture, known_as) for pair in pairs]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)


def _packed(name: str, values: Tensor, kind: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large is refused below
        packed = gguf.quants.quantize(values.numpy(), kind)
    if packed.dtype == np.float16 and not np.isfinite(packed).all():
        raise StructPruneError(f"{name} has values that float16 cannot hold; write bfloat16 or float32.")
    return packed


def _frequency_factors(config: PretrainedConfig) -> Tensor:
    """Compute what the frequencies of the rotary embedding are divided by, `(head_dim / 2,)`."""
    scaled, _ = ROPE_INIT_FUNCTIONS[llama_cpp.rope_of(config)["rope_type"]](config, torch.device("cpu"))
    places = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return llama_cpp.rope_of(config)["rope_theta"] ** -places / scaled


def _add_metadata(writer: gguf.GGUFWriter, model: PreTrainedModel, name: str, total: int) -> None:
    # The card beside the model names its origin.
    writer.add_string("structprune.version", __version__)
    folder = Path(model.name_or_path) if model.name_or_path and Path(model.name_or_path).is_dir() else None
    metadata = gguf.Metadata.load(model_path=folder, total_params=total)
    metadata.name = metadata.name or name
    metadata.size_label = metadata.size_label or gguf.size_label(total, 0, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _add_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    window, local = getattr(config, "sliding_window", None), (config.rope_parameters or {}).get("sliding_attention")
    if window and local:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(local["rope_theta"])
        window = None
    # Otherwise llama.cpp attends to everything, which is the same as long as the text fits into the window.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = llama_cpp.rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    layers = llama_cpp.layer_configs(config)
    heads, groups, (head_dim, *_) = zip(*map(heads_of, layers), strict=True)
    widths = [layer.intermediate_size for layer in layers]
    by_layer = writer.arch in llama_cpp.BY_LAYER.values()
    if config.model_type in llama_cpp.MIXTURES:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", widths[0]))
    writer.add_feed_forward_length(widths if by_layer else widths[0])
    writer.add_head_count(list(heads) if by_layer else heads[0])
    writer.add_head_count_kv(list(groups) if by_layer else groups[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    model, pre = _parts_of(tokenizer)
    tokens, pieces = len(tokenizer), pre is None
    if tokens > size:
        raise StructPruneError(f"The tokenizer has {tokens:,} tokens and the model {size:,} rows; pass its own.")
    writer.add_tokenizer_model((gguf.LlamaHfVocab if pieces else gguf.BpeVocab).tokenizer_model)
    writer.add_tokenizer_pre(pre or "default")
    names, types = _tokens(tokenizer, size)
    writer.add_token_list(names)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(_scores(model, names))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(SPACE))
    else:
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    _add_special(writer, tokenizer)


def _parts_of(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str | None]:
    """Give a tokenizer's model, and llama.cpp's name for its first steps; None for SentencePiece."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = parts.get("model", {})
    if model.get("type") != "BPE":
        found = model.get("type", f"a slow {type(tokenizer).__name__}")
        raise StructPruneError(f"A GGUF file holds a fast BPE tokenizer, found {found}.")
    return model, None if model.get("byte_fallback", False) else pre_tokenizer(parts)


def pre_tokenizer(parts: Mapping[str, Any]) -> str:
    """Name in llama.cpp's words the steps before a byte-level tokenizer's merges."""
    step: Mapping[str, Any] = parts.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    key: Any = (*map(_kind, steps), bool(parts["model"].get("ignore_merges")))
    normalizer = (parts.get("normalizer") or {}).get("type")
    # llama.cpp does not normalise what it reads. In NFC, as Qwen's tokenizers want it, nearly all text is already.
    if key not in llama_cpp.PRE_TOKENIZERS or normalizer not in (None, "NFC"):
        names = [*filter(None, (normalizer, *(step.get("type") for step in steps)))]
        raise StructPruneError(
            f"llama.cpp would cut text in another way than this tokenizer, which takes the steps {names} before its "
            f"merges; structprune knows those of {', '.join(llama_cpp.PRE_TOKENIZERS.values())}."
        )
    return llama_cpp.PRE_TOKENIZERS[key]


def _kind(step: Mapping[str, Any]) -> tuple[Any, Any]:
    # As `PRE_TOKENIZERS` has a step; an unknown one becomes a pair of None.
    kind, field = STEPS.get(step.get("type", ""), (None, ""))
    value = step.get(field)
    if kind is None or step.get("add_prefix_space") or step.get("invert"):
        return (None, None)
    return kind, value.get("Regex") if isinstance(value, dict) else value


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    texts: list[str] = []
    types: list[int] = []
    for number in range(size):
        text, kind = names.get(number, f"[PAD{number}]"), kinds.NORMAL if number in names else kinds.UNUSED
        if number in special or (number in added and (added[number].special or CONTROL.fullmatch(text))):
            kind = kinds.CONTROL
        elif number in added:
            text, kind = text.replace(SPACE, " "), kinds.USER_DEFINED
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = kinds.BYTE
        texts.append(text)
        types.append(kind)
    return texts, types


def _scores(model: Mapping[str, Any], names: list[str]) -> list[float]:
    # llama.cpp joins the pieces of the highest score first: minus the number of the first merge to make it.
    rank = {"".join(pair): number for number, pair in reversed([*enumerate(model["merges"])])}
    return [-float(rank.get(name, 1e6)) for name in names]  # 1e6 is of what no merge makes


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos", "eos", "unk", "sep", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
