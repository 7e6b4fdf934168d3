"""Architectures of llama.cpp, the order of rows that they expect, and its names for pre-tokenizers.

Sources, all of llama.cpp: the files of `src/models` for what an architecture computes and which sizes it reads by
layer, `src/llama-model.cpp` (`llama_model_rope_type`) for the order of rows, `src/llama-vocab.cpp` for the
pre-tokenizers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from .spaces import heads_of


# The architecture that llama.cpp has for a model type: it takes one width for all layers.
STOCK = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "olmo2": "olmo2"},
    **{"gemma3_text": "gemma3", "mixtral": "llama", "olmoe": "olmoe", "qwen3_moe": "qwen3moe"},
}
# What the mixtures among them have to say of their routers and layers.
MIXTURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtral": {},
    "olmoe": {"norm_topk_prob": (False,), "clip_qkv": (None,)},
    "qwen3_moe": {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
}
# Those that read the sizes of each layer: the one computes a Llama layer, with biases where the file has some, and the
# other a layer of Qwen3 under a tied head.
BY_LAYER = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}
# These rotate the channels 2i and 2i + 1 of a head together; transformers, and all others, channels i and i + half.
INTERLEAVED_ARCHITECTURES = ("llama", "deci")
# The gate and up projections of all experts in one parameter, shape `(experts, 2 * width, channels)`.
FUSED_EXPERTS = "experts.gate_up_proj"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
# What a byte-level tokenizer does before its merges, and whether it looks a word up whole before it merges: llama.cpp
# knows each such way by a name.
PRE_TOKENIZERS = {
    (("bytes", True), False): "gpt-2",
    (("digits", True), ("bytes", True), False): "smollm",
    (("split", _WORDS + r"\p{N}" + _REST), ("bytes", False), False): "qwen2",
    (("split", _WORDS + r"\p{N}{1,3}" + _REST), ("bytes", False), True): "llama-bpe",
    (("split", _CASED + r"\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)), ("bytes", False), True): "tekken",
}


def gguf_architecture(config: PretrainedConfig) -> str | None:
    """The architecture of llama.cpp that computes a model, or None; `gguf_refusal` gives the reason.

    The files of llama.cpp's converter run if this is the architecture in `STOCK`. Where it is `deci`, only
    `structprune export` writes a file that runs.
    """
    if gguf_refusal(config) is not None:
        return None
    return STOCK[config.model_type] if _fits_stock(config) else BY_LAYER[config.model_type]


def _fits_stock(config: PretrainedConfig) -> bool:
    stock, (heads, groups, head_dim) = STOCK[config.model_type], heads_of(layer_configs(config)[0])
    # Others than these take the width of the residual stream for that of all heads together.
    any_heads = (*INTERLEAVED_ARCHITECTURES, "qwen3", "qwen3moe", "openelm", "gemma3")
    heads_fit = stock in any_heads or heads * head_dim == config.hidden_size
    heads_fit = heads_fit and (stock != "olmoe" or groups == heads)
    # Only an interleaved architecture has factors of frequencies.
    rope_fits = stock in INTERLEAVED_ARCHITECTURES or rope_of(config).get("rope_type") != "llama3"
    return not config.is_heterogeneous and heads_fit and rope_fits


def gguf_refusal(config: PretrainedConfig) -> str | None:
    """The reason for which `structprune export` writes no GGUF of a model, with an alternative, or None."""
    kind, uniform = config.model_type, not getattr(config, "is_heterogeneous", False)
    if kind in STOCK and (reason := _not_computed(config)) is not None:
        return reason
    if kind in STOCK and (_fits_stock(config) or kind in BY_LAYER):
        return None
    if not uniform:
        return (
            f"llama.cpp reads the width of each layer only of {', '.join(BY_LAYER)} models, and this is a {kind} "
            "model; give all layers one width: structprune export MODEL OUT --pad-uniform."
        )
    if kind in STOCK:
        return f"llama.cpp's {STOCK[kind]} takes hidden_size for the width of all heads; prune its FFN, and no heads."
    return (
        f"structprune writes GGUF files of {', '.join(STOCK)} models, and this is a {kind} model. Its layers are "
        "alike, so llama.cpp's own convert_hf_to_gguf.py may take it."
    )


def _not_computed(config: PretrainedConfig) -> str | None:
    """The reason for which llama.cpp computes a model of a type in `STOCK` wrongly, or None."""
    rope, gemma = rope_of(config), config.model_type == "gemma3_text"
    plain = BY_LAYER.get(config.model_type) == "deci"
    needs: dict[str, tuple[Any, ...]] = {
        **{"hidden_activation" if gemma else "hidden_act": ("gelu_pytorch_tanh" if gemma else "silu",)},
        "rope_type": ("default", "linear", "llama3") if plain else ("default", "linear"),
        "partial_rotary_factor": (1.0, None),
    }
    if not plain:
        needs["attention_bias"] = (False, None)
    needs |= MIXTURES.get(config.model_type, {})
    if gemma:
        needs |= {"query_pre_attn_scalar": (config.head_dim,), "final_logit_softcapping": (None,)}
        needs |= {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)}
    if config.is_heterogeneous and BY_LAYER.get(config.model_type) == "openelm":
        needs["tie_word_embeddings"] = (True,)
    for name, computed in needs.items():
        value = rope.get(name, getattr(config, name, "default" if name == "rope_type" else None))
        if value not in computed:
            allowed = ", ".join(str(value) for value in computed if value is not None or len(computed) == 1)
            return f"llama.cpp computes such a model with {name}={allowed} only, found {value}."
    return None


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of a config's rotary embedding, as layers with full attention have it."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def layer_configs(config: PretrainedConfig) -> list[Any]:
    """The config of each layer, with its own sizes."""
    if not config.is_heterogeneous:
        return [config] * config.num_hidden_layers
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def parts_of(name: str, architecture: str) -> list[tuple[str, list[str]]]:
    """Pairs of a name in the file and the parameters that lie there, one after the other.

    There is no pair for a parameter that lies in another one, and there are two for one that the file divides.
    """
    if name.endswith(FUSED_EXPERTS):
        return [(name.replace("gate_up_proj", f"{half}_proj") + ".weight", [name]) for half in ("gate", "up")]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", [name])]
    projections = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
    if architecture != "openelm" or not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return [(name, [name])]
    return [(name.replace("q_proj", "qkv_proj"), projections)] if "q_proj" in name else []


def in_file_order(name: str, rows: Tensor, layer_config: Any, architecture: str, known_as: str) -> Tensor:
    """A parameter in the form that llama.cpp's architecture expects.

    Queries and keys of an interleaved one have channel i of each head at place 2i, and channel i + half at place
    2i + 1. The weights of some norms have one added. Of a divided parameter, `known_as` names the half.
    """
    if name.endswith(FUSED_EXPERTS):
        return rows.chunk(2, dim=1)["up_proj" in known_as]
    module = name.split(".")[-2]
    if architecture == "gemma3" and module.endswith("norm"):
        return rows + 1
    if architecture not in INTERLEAVED_ARCHITECTURES or module not in ("q_proj", "k_proj"):
        return rows
    heads = heads_of(layer_config)
    count = heads.groups if module == "k_proj" else heads.heads
    return rows.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(rows.shape)
