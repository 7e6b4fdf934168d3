"""NVIDIA's form `nemotron-nas` (DeciLM): a Llama whose layers differ, which several engines read.

Sources: `nemotron_nas.py` of vLLM 0.32 and of SGLang 0.5.23, `modeling_nemotron_nas.py` of TensorRT-LLM, and
`nemotron-nas.py` of mlx-lm 0.32. All have as many query heads in each layer, MLX as many as fill the residual stream,
and all but vLLM know the width of an FFN only as a factor, rounded up to a multiple of 256 channels.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from ..errors import StructPruneError
from . import configuration_nemotron_nas as configuration
from .llama_cpp import BY_LAYER, layer_configs, not_computed, rope_of
from .spaces import heads_of


FORM, FFN_MULTIPLE = "nemotron-nas", 256
CODE = Path(configuration.__file__)
LLAMAS = [name for name, architecture in BY_LAYER.items() if architecture == "deci"]
# The sizes of one layer: KV groups, query heads in each, channels of a head and of the FFN.
Sizes = namedtuple("Sizes", "groups per_group head_dim ffn")
# The dimension of each matrix that depends on the sizes of a layer, and the sizes whose product it is.
QUERIES, KEYS, FFN = ("groups", "per_group", "head_dim"), ("groups", "head_dim"), ("ffn",)
PARTS = {
    **{"q_proj": (0, QUERIES), "k_proj": (0, KEYS), "v_proj": (0, KEYS), "o_proj": (1, QUERIES)},
    **{"gate_proj": (0, FFN), "up_proj": (0, FFN), "down_proj": (1, FFN)},
}


def sizes_of(layer_config: Any, pad: bool) -> Sizes:
    """The sizes of a layer, or the next larger ones that the form can say. Those add query heads first and KV groups
    only where their number does not divide that of the heads, so that the cache stays small.
    """
    (heads, groups, head_dim), ffn = heads_of(layer_config), layer_config.intermediate_size
    if pad:
        heads, ffn = layer_config.hidden_size // head_dim, -(-ffn // FFN_MULTIPLE) * FFN_MULTIPLE
        groups = next(number for number in range(groups, heads + 1) if heads % number == 0)
    return Sizes(groups, heads // groups, head_dim, ffn)


def check_nemotron_nas(config: PretrainedConfig, pad: bool) -> None:
    """Refuse a model that the form cannot hold, or not without padding unless `pad` is set."""
    if config.model_type not in LLAMAS:
        raise StructPruneError(
            f"{FORM} is a Llama whose layers differ, which {', '.join(LLAMAS)} models are; the layers of this "
            f"{config.model_type} model compute something else. vLLM runs the folder as it is."
        )
    if (reason := not_computed(config, FORM)) is not None:
        raise StructPruneError(reason)
    for number, layer in enumerate(layer_configs(config)):
        (heads, groups, head_dim), width = heads_of(layer), config.hidden_size
        if heads * head_dim > width or width % head_dim:
            raise StructPruneError(f"{FORM} has {width} / {head_dim} query heads, and layer {number} has {heads}.")
        ffn, legal = layer.intermediate_size, sizes_of(layer, pad=True)
        if sizes_of(layer, pad=False) != legal and not pad:
            nearest = " or ".join(str(size) for size in (legal.ffn - FFN_MULTIPLE, legal.ffn) if size and size != ffn)
            raise StructPruneError(
                f"Layer {number} has {ffn} FFN channels and {heads} query heads in {groups} KV groups; {FORM} takes "
                f"multiples of {FFN_MULTIPLE} channels ({nearest or ffn}) and {width // head_dim} query heads (in "
                f"{legal.groups} groups). Prune to such widths (round_to={FFN_MULTIPLE}), or have zeros added (--pad)."
            )


def llama_config(config: PretrainedConfig) -> LlamaConfig:
    """The config of the same model as a Llama with sizes that the form can say."""
    layers = [sizes_of(layer, pad=True) for layer in layer_configs(config)]
    most = Sizes(*map(max, zip(*layers, strict=True)))
    same = "vocab_size hidden_size num_hidden_layers hidden_act rms_norm_eps initializer_range dtype rope_parameters"
    same += " tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    fields: dict[str, Any] = {name: getattr(config, name) for name in same.split()}
    if differing := {number: layer for number, layer in enumerate(layers) if layer != most}:
        fields["per_layer_config"] = {
            number: {"num_key_value_heads": layer.groups, "intermediate_size": layer.ffn}
            for number, layer in differing.items()
        }
        fields["allow_global_per_layer_attribute_access"] = True
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return LlamaConfig(
        **fields,
        head_dim=most.head_dim,
        num_attention_heads=config.hidden_size // most.head_dim,
        num_key_value_heads=most.groups,
        intermediate_size=most.ffn,
        # The engines attend to everything, which is the same as long as the text fits into a sliding window.
        max_position_embeddings=min(config.max_position_embeddings, window),
        attention_bias=getattr(config, "attention_bias", config.model_type == "qwen2"),
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def nemotron_nas_fields(config: LlamaConfig) -> dict[str, Any]:
    """The fields of `config.json`, those of the rotary embedding in the words that MLX knows."""
    plain, rope = {"no_op": False, "replace_with_linear": False}, dict(rope_of(config))
    blocks = [
        {
            "attention": {**plain, "n_heads_in_group": layer.per_group},
            "ffn": {**plain, "ffn_mult": 3 * layer.ffn / (2 * config.hidden_size)},
        }
        for layer in (sizes_of(layer, pad=False) for layer in layer_configs(config))
    ]
    unknown = ("rope_parameters", "per_layer_config", "allow_global_per_layer_attribute_access")
    return {
        **{name: value for name, value in config.to_diff_dict().items() if name not in unknown},
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "architectures": ["DeciLMForCausalLM"],
        "model_type": FORM,
        "auto_map": {"AutoConfig": f"{CODE.stem}.{configuration.NemotronNASConfig.__name__}"},
        "block_configs": blocks,
    }


def padded(name: str, tensor: Tensor, present: Sizes, legal: Sizes) -> Tensor:
    """A parameter of a layer, padded with zeros; in the consumers too, so that they change no output."""
    dim, part = PARTS.get(name.split(".")[-2], (0, ()))
    if not part or dim == tensor.ndim:  # the bias of a consumer stays
        return tensor
    before, after = ([getattr(sizes, size) for size in part] for sizes in (present, legal))
    grown = tensor.new_zeros((*tensor.shape[:dim], *after, *tensor.shape[dim + 1 :]))
    grown[(slice(None),) * dim + tuple(map(slice, before))] = tensor.unflatten(dim, before)
    return grown.flatten(dim, dim + len(after) - 1)
