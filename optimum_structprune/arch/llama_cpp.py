"""What llama.cpp can run: its architecture for a model, the rows that it expects in another order, and its names for
ways to cut text.

Sources, all of llama.cpp: `src/models/{llama,qwen2,deci}.cpp` for what an architecture computes and which sizes it
reads by layer, `src/llama-model.cpp` (`llama_model_rope_type`) for the order of rows, `src/llama-vocab.cpp` for the
pre-tokenizers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from .spaces import heads_of


# The architecture that llama.cpp has for a model type: it takes one width for all layers.
STOCK = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
# The only one that reads the sizes of each layer. It computes a Llama layer, with biases where the file has some.
BY_LAYER = "deci"
# These rotate the channels 2i and 2i + 1 of a head together; transformers, and all others, channels i and i + half.
INTERLEAVED = ("llama", BY_LAYER)
ROTATED = {"q_proj": "heads", "k_proj": "groups"}
ROPE_TYPES = ("default", "linear", "llama3")

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
    """The architecture of llama.cpp as which a model can be written; None where there is none, see `gguf_refusal`.

    The files of llama.cpp's converter run if this is the architecture in `STOCK`. Where it is `deci`, only
    `structprune export` writes a file that runs.
    """
    if gguf_refusal(config) is not None:
        return None
    stock, (heads, _, head_dim) = STOCK[config.model_type], heads_of(layer_configs(config)[0])
    # An architecture that is not interleaved takes the width of the residual stream for that of all heads together,
    # and has no factors of frequencies.
    usual = heads * head_dim == config.hidden_size and rope_of(config).get("rope_type") != "llama3"
    return stock if not config.is_heterogeneous and (usual or stock in INTERLEAVED) else BY_LAYER


def gguf_refusal(config: PretrainedConfig) -> str | None:
    """Why `structprune export` cannot write a model for llama.cpp, and what can be done instead; None where it can."""
    kind, uniform = config.model_type, not getattr(config, "is_heterogeneous", False)
    if kind not in STOCK:
        return f"structprune writes GGUF files of {', '.join(STOCK)} models, and this is a {kind} model. " + (
            "Its layers are alike, so llama.cpp's own convert_hf_to_gguf.py may take it."
            if uniform
            else "llama.cpp reads the width of each layer only in an architecture that computes what these compute. "
            "Give all layers one width: structprune export MODEL OUT --pad-uniform. llama.cpp's own "
            "convert_hf_to_gguf.py may take that."
        )
    rope = rope_of(config)
    for name, value, computed in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_type", rope.get("rope_type", "default"), ROPE_TYPES),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
    ):
        if value not in computed:
            return f"llama.cpp computes such a model with {name}={', '.join(map(str, computed))} only, found {value}."
    return None


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of a config's rotary embedding."""
    return getattr(config, "rope_parameters", None) or {}


def layer_configs(config: PretrainedConfig) -> list[Any]:
    """The config of each layer, with its own sizes."""
    if not config.is_heterogeneous:
        return [config] * config.num_hidden_layers
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def in_file_order(name: str, rows: Tensor, layer_config: Any, architecture: str) -> Tensor:
    """A parameter with its rows in the order in which llama.cpp's architecture expects them: for queries and keys of
    an interleaved one, channel i of each head at place 2i, and channel i + half at place 2i + 1.
    """
    module = name.split(".")[-2]
    if architecture not in INTERLEAVED or module not in ROTATED:
        return rows
    heads = getattr(heads_of(layer_config), ROTATED[module])
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
