"""Describe the architectures of llama.cpp: their names, the order of rows that they expect, and the pre-tokenizers.

Sources in llama.cpp: `src/models` for the computation of an architecture and the sizes that it reads by layer,
`src/llama-model.cpp` (`llama_model_rope_type`) for the order of rows, `src/llama-vocab.cpp` for the pre-tokenizers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from .spaces import heads_of


# llama.cpp's architecture of a model type. It requires the same width in all layers.
STOCK = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gemma3_text": "gemma3",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen3_moe": "qwen3moe",
}
# The mixtures of experts among them, with the config values that llama.cpp supports.
MIXTURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtral": {},
    "olmoe": {"norm_topk_prob": (False,), "clip_qkv": (None,)},
    "qwen3_moe": {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
}
# Architectures that read the sizes of each layer. `deci` computes Llama layers, with biases if the file has them, and
# `openelm` computes Qwen3 layers with a tied head.
BY_LAYER = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}
# These architectures rotate channels 2i and 2i + 1 of a head together. transformers and the other architectures rotate
# channels i and i + head_dim / 2 together.
INTERLEAVED_ARCHITECTURES = ("llama", "deci")
# The gate and up projections of all experts in one parameter, shape `(experts, 2 * width, channels)`.
FUSED_EXPERTS = "experts.gate_up_proj"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
# llama.cpp's names of pre-tokenizers. A key lists the steps before the merges, and then whether the tokenizer looks up
# whole words before it applies merges (`ignore_merges`).
PRE_TOKENIZERS = {
    (("bytes", True), False): "gpt-2",
    (("digits", True), ("bytes", True), False): "smollm",
    (("split", _WORDS + r"\p{N}" + _REST), ("bytes", False), False): "qwen2",
    (("split", _WORDS + r"\p{N}{1,3}" + _REST), ("bytes", False), True): "llama-bpe",
    (("split", _CASED + r"\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)), ("bytes", False), True): "tekken",
}


def gguf_architecture(config: PretrainedConfig) -> str | None:
    """Return llama.cpp's architecture for a model, or None if llama.cpp cannot run it.

    `gguf_refusal` returns the reason. llama.cpp's own converter supports the architectures in `STOCK`. For `deci` and
    `openelm`, only `structprune export` writes a file that runs.
    """
    if gguf_refusal(config) is not None:
        return None
    if _fits_stock(config):
        return STOCK[config.model_type]
    return BY_LAYER[config.model_type]


def _fits_stock(config: PretrainedConfig) -> bool:
    """Return whether the architecture in `STOCK` can run a model with these sizes."""
    architecture = STOCK[config.model_type]
    counts = heads_of(layer_configs(config)[0])
    has_head_dim = INTERLEAVED_ARCHITECTURES + ("qwen3", "qwen3moe", "openelm", "gemma3")

    if config.is_heterogeneous:
        return False

    # The other architectures assume that the heads together are as wide as the hidden states.
    if architecture not in has_head_dim and counts.heads * counts.head_dim != config.hidden_size:
        return False
    if architecture == "olmoe" and counts.groups != counts.heads:
        return False

    # Only the interleaved architectures read frequency factors.
    return architecture in INTERLEAVED_ARCHITECTURES or rope_of(config).get("rope_type") != "llama3"


def gguf_refusal(config: PretrainedConfig) -> str | None:
    """Return why `structprune export` cannot write a GGUF file of a model, with an alternative, or None if it can."""
    model_type = config.model_type

    if model_type in STOCK:
        reason = _unsupported_value(config)
        if reason is not None:
            return reason
        if _fits_stock(config) or model_type in BY_LAYER:
            return None

    if getattr(config, "is_heterogeneous", False):
        return (
            f"llama.cpp supports layers of different widths only in {', '.join(BY_LAYER)} models, and this is a "
            f"{model_type} model. Make the widths equal: structprune export MODEL OUT --pad-uniform."
        )
    if model_type in STOCK:
        return (
            f"llama.cpp's {STOCK[model_type]} requires heads that are together as wide as `hidden_size`. Prune FFN "
            "channels instead of heads."
        )
    return (
        f"structprune writes GGUF files of {', '.join(STOCK)} models, and this is a {model_type} model. Its layers "
        "have the same widths, so llama.cpp's own convert_hf_to_gguf.py may support it."
    )


def _unsupported_value(config: PretrainedConfig) -> str | None:
    """Return an error message if a config has a value that llama.cpp does not support for its model type."""
    rope = rope_of(config)

    for name, supported in _supported_values(config).items():
        value = rope.get(name, getattr(config, name, None))
        if name == "rope_type" and value is None:
            value = "default"

        if value not in supported:
            names = [str(value) for value in supported if value is not None]
            return f"llama.cpp supports this model with {name}={', '.join(names) or None} only, got {value}."

    return None


def _supported_values(config: PretrainedConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values of config fields that llama.cpp supports for a model type of `STOCK`."""
    values: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0, None)}
    layered_architecture = BY_LAYER.get(config.model_type)

    if layered_architecture == "deci":
        values["rope_type"] = ("default", "linear", "llama3")
    else:
        values["rope_type"] = ("default", "linear")
        values["attention_bias"] = (False, None)

    if config.model_type == "gemma3_text":
        values["hidden_activation"] = ("gelu_pytorch_tanh",)
        values["query_pre_attn_scalar"] = (config.head_dim,)
        values["final_logit_softcapping"] = (None,)
        values["attn_logit_softcapping"] = (None,)
        values["use_bidirectional_attention"] = (False, None)
    else:
        values["hidden_act"] = ("silu",)

    if config.is_heterogeneous and layered_architecture == "openelm":
        values["tie_word_embeddings"] = (True,)

    values.update(MIXTURES.get(config.model_type, {}))
    return values


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding parameters of layers with full attention."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def layer_configs(config: PretrainedConfig) -> list[Any]:
    """Return the config of each layer, with the sizes of that layer."""
    if not config.is_heterogeneous:
        return [config] * config.num_hidden_layers
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def parts_of(name: str, architecture: str) -> list[tuple[str, list[str]]]:
    """Return the tensors of a file that hold a parameter.

    Args:
        name: The name of the parameter.
        architecture: llama.cpp's architecture.

    Returns:
        Pairs of a module name and the parameters that are concatenated there. The list has two pairs if the file
        divides the parameter, and none if the file holds it with another parameter.
    """
    if name.endswith(FUSED_EXPERTS):
        gate = name.replace("gate_up_proj", "gate_proj")
        up = name.replace("gate_up_proj", "up_proj")
        return [(f"{gate}.weight", [name]), (f"{up}.weight", [name])]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", [name])]

    if architecture == "openelm" and name.endswith("q_proj.weight"):
        projections = [name.replace("q_proj", projection) for projection in ("q_proj", "k_proj", "v_proj")]
        return [(name.replace("q_proj", "qkv_proj"), projections)]
    if architecture == "openelm" and name.endswith(("k_proj.weight", "v_proj.weight")):
        return []

    return [(name, [name])]


def in_file_order(name: str, rows: Tensor, layer_config: Any, architecture: str, module_name: str) -> Tensor:
    """Return the values of a parameter as llama.cpp's architecture expects them.

    Interleaved architectures expect channel i of each query and key head at row 2i, and channel i + head_dim / 2 at
    row 2i + 1. Gemma's norms have one added to their weights.

    Args:
        name: The name of the parameter.
        rows: The values of the parameter.
        layer_config: The config of the parameter's layer.
        architecture: llama.cpp's architecture.
        module_name: The name that `parts_of` returned, which selects the half of a divided parameter.
    """
    if name.endswith(FUSED_EXPERTS):
        gate, up = rows.chunk(2, dim=1)
        if "up_proj" in module_name:
            return up
        return gate

    module = name.split(".")[-2]
    if architecture == "gemma3" and module.endswith("norm"):
        return rows + 1
    if architecture not in INTERLEAVED_ARCHITECTURES or module not in ("q_proj", "k_proj"):
        return rows

    counts = heads_of(layer_config)
    num_heads = counts.heads
    if module == "k_proj":
        num_heads = counts.groups
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
