"""Tiny random models of every family and variant, with tokenizers, texts and configs for them."""

import random
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from itertools import islice

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from optimum_structprune import DomainConfig, StructPruneConfig
from optimum_structprune.domains.sources import builtin_documents


VOCAB = 96
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 64, **TOKENS}
GROUPED = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
PLAIN = {**SIZES, "num_attention_heads": 4}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}
TOP_2 = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {**GROUPED, **TOP_2, "moe_intermediate_size": 40}
ROUTED_2 = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
DEEPSEEK = {
    **PLAIN,
    **ROUTED_2,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

# Hybrid models: layers of linear attention, of a state-space mixer, or of short convolutions.
MIXED = {"layer_types": ["mamba", "attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
JAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
SHORT = {"layer_types": ["conv", "full_attention"]}
LOCAL_2 = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {**DEEPSEEK, "q_lora_rank": 8, "n_shared_experts": 1, "n_group": 1}
INDEXED = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
KIMI = {
    "q_lora_rank": None,
    "num_local_experts": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED_MOE = {**GROUPED, **ROUTED_2, "n_shared_experts": 2, "first_k_dense_replace": 1, "use_qk_norm": True}
NEMOTRON_H = {
    **GROUPED,
    **ROUTED_2,
    "layer_types": ["attention", "moe", "mamba", "mlp"],
    "moe_shared_expert_intermediate_size": 36,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "use_mamba_kernels": False,
}
del NEMOTRON_H["num_hidden_layers"]  # `layer_types` states the number of layers.
LLAMA_4 = {**GROUPED, "intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 2}
ERNIE = {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 40, "moe_num_shared_experts": 2}
BY_LAYER = {**GROUPED, **SLIDING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
GEMMA_4 = {**BY_LAYER, "global_head_dim": 8}
GEMMA_3N = {**BY_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 4}
ZAMBA_2 = {
    **GROUPED,
    "layer_types": ["mamba", "hybrid"],
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "mamba_headdim": 8,
    "mamba_d_state": 8,
    "adapter_rank": 4,
    "num_mem_blocks": 1,
    "chunk_size": 16,
    "use_mem_rope": True,
}

# The scaled frequencies of Llama 3.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Causal language models by name: the model type and the config fields.
CASES: dict[str, tuple[str, dict]] = {
    "llama-tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**GROUPED, "tie_word_embeddings": False}),
    "llama-bias": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", {**GROUPED, "no_rope_layers": [1, 0]}),
    "granite": ("granite", {**GROUPED, "attention_multiplier": 0.5, "residual_multiplier": 0.7}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "ministral": ("ministral", {**GROUPED, **SLIDING}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GROUPED, **SLIDING, "use_sliding_window": True}),
    "exaone4": ("exaone4", {**GROUPED, **SLIDING}),
    "ernie4_5": ("ernie4_5", {**GROUPED, "use_bias": True}),
    "gemma2": ("gemma2", {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4}),
    "gemma3_text": ("gemma3_text", {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4}),
    "olmo": ("olmo", {**GROUPED, "clip_qkv": 0.5}),
    "olmo3": ("olmo3", {**GROUPED, **SLIDING}),
    "cohere": ("cohere", {**GROUPED, "use_qk_norm": False}),
    "cohere-qk-norm": ("cohere", {**GROUPED, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**GROUPED, **SLIDING}),
    "seed_oss": ("seed_oss", {**GROUPED, "attention_out_bias": True}),
    "phi3": ("phi3", {**GROUPED, "tie_word_embeddings": False}),
    "glm4": ("glm4", {**GROUPED, "attention_bias": False}),
    "phi": ("phi", GROUPED),
    "phi-qk-norm": ("phi", {**GROUPED, "qk_layernorm": True}),
    "stablelm": ("stablelm", {**PLAIN, "num_key_value_heads": 2, "use_parallel_residual": True}),
    "helium": ("helium", {**GROUPED, "attention_bias": False}),
    "gpt2-tied": ("gpt2", GPT),
    "gpt2-inner": ("gpt2", {**GPT, "n_inner": 40}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4, "n_inner": 40}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4, "n_inner": 40}),
    "opt": ("opt", {**PLAIN, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "opt-no-bias": ("opt", {**PLAIN, "ffn_dim": 40, "word_embed_proj_dim": 32, "enable_bias": False}),
    "gpt_neox": ("gpt_neox", {**PLAIN, "use_parallel_residual": True}),
    "gpt_neox-serial": ("gpt_neox", {**PLAIN, "use_parallel_residual": False, "tie_word_embeddings": True}),
    "falcon": ("falcon", {**PLAIN, "ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {**PLAIN, "ffn_hidden_size": 40, "alibi": True, "parallel_attn": False, "bias": True}),
    "olmoe": ("olmoe", {**GROUPED, **TOP_2, "norm_topk_prob": False}),
    "granitemoe": ("granitemoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**GROUPED, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 36}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "n_shared_experts": 2}),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": 8, "n_shared_experts": 1, "n_group": 1}),
    "deepseek_v3-groups": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": 8, "n_group": 2, "topk_group": 2}),
    "gemma": ("gemma", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "nemotron": ("nemotron", GROUPED),
    "glm": ("glm", GROUPED),
    "starcoder2": ("starcoder2", GROUPED),
    "ministral3": ("ministral3", GROUPED),
    "arcee": ("arcee", GROUPED),
    "apertus": ("apertus", GROUPED),
    "apertus1p5_text": ("apertus1p5_text", GROUPED),
    "cwm": ("cwm", GROUPED),
    "exaone": ("exaone", GROUPED),
    "internlm3": ("internlm3", GROUPED),
    "iquestcoder": ("iquestcoder", GROUPED),
    "hyperclovax": ("hyperclovax", GROUPED),
    "jais2": ("jais2", GROUPED),
    "nanochat": ("nanochat", GROUPED),
    "mixtral": ("mixtral", {**GROUPED, **LOCAL_2}),
    "minimax_m2": ("minimax_m2", {**GROUPED, **LOCAL_2}),
    "phimoe": ("phimoe", {**GROUPED, **LOCAL_2}),
    "glm4_moe": ("glm4_moe", SHARED_MOE),
    "dots1": ("dots1", SHARED_MOE),
    "vaultgemma": ("vaultgemma", {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4}),
    "qwen3_next": ("qwen3_next", {**MOE, **LINEAR, "shared_expert_intermediate_size": 36, "mlp_only_layers": [0]}),
    "qwen3_5_text": ("qwen3_5_text", {**GROUPED, **LINEAR}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**MOE, **LINEAR, "shared_expert_intermediate_size": 36}),
    "gemma3n_text": ("gemma3n_text", GEMMA_3N),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT),
    "glm_moe_dsa": ("glm_moe_dsa", {**LATENT, **INDEXED}),
    "deepseek_v32": ("deepseek_v32", {**LATENT, **INDEXED, "index_topk": 64}),
    "kimi_linear": ("kimi_linear", {**LATENT, **KIMI}),
    "llama4_text": ("llama4_text", LLAMA_4),
    "minimax": ("minimax", {**GROUPED, **LOCAL_2, "block_size": 8, "layer_types": LINEAR["layer_types"][::-1]}),
    "ernie4_5_moe": ("ernie4_5_moe", ERNIE),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**GROUPED, "num_experts": 4, "moe_topk": 2}),
    "exaone_moe": ("exaone_moe", {**MOE, **SLIDING, "num_shared_experts": 2}),
    "flex_olmo": ("flex_olmo", {**GROUPED, **TOP_2}),
    "granitemoeshared": ("granitemoeshared", {**GROUPED, **LOCAL_2, "shared_intermediate_size": 36}),
    "granitemoehybrid": ("granitemoehybrid", {**GROUPED, **LOCAL_2, **MIXED, "shared_intermediate_size": 36, **MAMBA}),
    "falcon_h1": ("falcon_h1", {**GROUPED, **MAMBA, "mamba_d_ssm": 64}),
    "bamba": ("bamba", {**GROUPED, **MAMBA, "attn_layer_indices": [1]}),
    "jamba": ("jamba", {**GROUPED, **TOP_2, "attn_layer_period": 2, "attn_layer_offset": 1, **JAMBA}),
    "nemotron_h": ("nemotron_h", NEMOTRON_H),
    "lfm2": ("lfm2", {**GROUPED, "block_auto_adjust_ff_dim": False, **SHORT}),
    "lfm2_moe": ("lfm2_moe", {**MOE, "num_dense_layers": 1, **SHORT}),
    "olmo_hybrid": ("olmo_hybrid", {**GROUPED, **LINEAR}),
    "zamba2": ("zamba2", ZAMBA_2),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **TOKENS}),
}
# An older transformers does not have the newest model types.
CASES = {case: entry for case, entry in CASES.items() if entry[0] in transformers.CONFIG_MAPPING}
# Model types whose configs cannot describe a pruned model.
RIGID = {"bloom", "mpt", "gemma3n_text", "zamba2"}
PRUNABLE = [case for case, (model_type, _) in CASES.items() if model_type not in RIGID]

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {**VISION, "image_size": 8, "patch_size": 4}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4}
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
QWEN_3_VISION = {**QWEN_VISION, **SMALL_VISION, "num_position_embeddings": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
QWEN_VL = {**PLAIN, **MROPE, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "query_pre_attn_scalar": 4}


def multimodal(model_type: str, text: str | None, fields: dict, vision: str | None = None, **patches) -> tuple:
    """Return an entry of OTHERS for a model of text and pictures.

    `text` and `vision` are the model types of its two halves, if the configs of the halves need them.
    """
    text_config = dict(fields)
    if text is not None:
        text_config["model_type"] = text
    vision_config = dict(patches or PATCHES)
    if vision is not None:
        vision_config["model_type"] = vision
    halves = {"text_config": text_config, "vision_config": vision_config}
    return transformers.AutoModelForImageTextToText, model_type, halves


MASKED = transformers.AutoModelForMaskedLM
PICTURES = transformers.AutoModelForImageClassification
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 64,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
GEMMA_4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40}
# Models that are more or other than a causal language model, by name: the class, the model type, the config fields.
OTHERS: dict[str, tuple[type, str, dict]] = {
    "bert": (MASKED, "bert", PLAIN),
    "bert-no-head": (transformers.AutoModel, "bert", PLAIN),
    "roberta": (MASKED, "roberta", PLAIN),
    "xlm-roberta": (MASKED, "xlm-roberta", PLAIN),
    "camembert": (MASKED, "camembert", PLAIN),
    "distilbert": (MASKED, "distilbert", {"dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4}),
    "electra": (MASKED, "electra", {**PLAIN, "embedding_size": 16}),
    "modernbert": (MASKED, "modernbert", {**PLAIN, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "deberta-v2": (MASKED, "deberta-v2", {**PLAIN, **DEBERTA}),
    "t5": (transformers.AutoModelForSeq2SeqLM, "t5", T5),
    "t5-gated": (transformers.AutoModelForSeq2SeqLM, "t5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (transformers.AutoModelForSeq2SeqLM, "bart", BART),
    "vit": (PICTURES, "vit", {**PATCHES, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "llava": multimodal("llava", "llama", GROUPED, "clip_vision_model"),
    "llava_next": multimodal("llava_next", "llama", GROUPED, "clip_vision_model"),
    "llava_onevision": multimodal("llava_onevision", "qwen2", GROUPED, "siglip_vision_model"),
    "gemma3": multimodal("gemma3", None, {**GEMMA, **SLIDING}),
    "paligemma": multimodal("paligemma", "gemma", GROUPED, **PATCHES, projection_dim=32),
    "qwen2_vl": multimodal("qwen2_vl", None, QWEN_VL, **QWEN_VISION, embed_dim=16, hidden_size=32),
    "qwen2_5_vl": multimodal("qwen2_5_vl", None, QWEN_VL, **QWEN_VISION, **SMALL_VISION),
    "qwen3_vl": multimodal("qwen3_vl", None, {**GROUPED, **MROPE}, **QWEN_3_VISION, deepstack_visual_indexes=[0]),
    "qwen3_5": multimodal("qwen3_5", None, {**GROUPED, **LINEAR}, **QWEN_3_VISION),
    "mistral3": multimodal("mistral3", "mistral", GROUPED, "pixtral", **PATCHES, head_dim=8),
    "internvl": multimodal("internvl", "qwen2", GROUPED, **VISION, image_size=[8, 8], patch_size=[4, 4]),
    "smolvlm": multimodal("smolvlm", "llama", GROUPED),
    "idefics3": multimodal("idefics3", "llama", GROUPED),
    "lfm2_vl": multimodal("lfm2_vl", "lfm2", CASES["lfm2"][1], "siglip2_vision_model"),
    "gemma4_text": (AutoModelForCausalLM, "gemma4_text", GEMMA_4),
    "gemma4_text-experts": (AutoModelForCausalLM, "gemma4_text", {**GEMMA_4, **GEMMA_4_EXPERTS}),
    "gemma4": multimodal("gemma4", None, GEMMA_4, **PATCHES, head_dim=8, num_key_value_heads=2),
}
OTHERS["lfm2_vl"][2]["projector_hidden_size"] = 24

# One model for each structure, for tests that do not depend on the family.
STRUCTURES = [
    "llama-tied",  # grouped KV heads, a gated MLP, a tied head
    "llama-bias",  # biases in every projection
    "gpt2-tied",  # transposed weights, packed QKV, a tied head
    "phi3",  # packed QKV and gate
    "codegen",  # QKV packed in parts of its own, attention and MLP in parallel
    "gpt_neox",  # QKV interleaved by head
    "falcon",  # QKV interleaved by group
    "cohere-qk-norm",  # norms with weights of their own for each head
    "gemma2",  # sliding windows, norms behind the blocks
    "gpt_oss",  # stacked experts, transposed and interleaved, with biases
    "ernie4_5_moe",  # several shared experts in one module
    "deepseek_v2",  # latent attention, an original layer before the experts
    "qwen3_next",  # a gated query, linear attention, an original layer, a shared expert
    "nemotron_h",  # layers that are attention, experts, a mixer or an MLP
]
# The same for the models in OTHERS.
OTHER_STRUCTURES = ["modernbert", "bart", "t5-gated", "vit", "qwen2_5_vl", "gemma4_text-experts"]


def build(case: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model in fp32 whose biases and norms differ from their trivial initial values."""
    torch.manual_seed(seed)
    return deepcopy(_built(case, seed))


@cache
def _built(case: str, seed: int) -> PreTrainedModel:
    """Build each model once. `build` returns copies."""
    auto, model_type, fields = described(case)
    return random_model(auto, model_type, fields, seed)


def described(case: str) -> tuple[type, str, dict]:
    """Return the class, the model type and the config fields of a case."""
    if case in CASES:
        model_type, fields = CASES[case]
        return AutoModelForCausalLM, model_type, fields

    auto, model_type, fields = OTHERS[case]
    if "text_config" not in fields:
        fields = TOKENS | fields
    return auto, model_type, fields


def random_model(auto: type, model_type: str, fields: dict, seed: int = 0) -> PreTrainedModel:
    """Return a random model of any config fields, as `build` does for its cases."""
    torch.manual_seed(seed)
    model_config = AutoConfig.for_model(model_type, **deepcopy(fields))
    # An auto class has `from_config`; the class of a model itself has not.
    build_from = getattr(auto, "from_config", auto)
    model = build_from(model_config).eval()

    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.05
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def three_layers() -> PreTrainedModel:
    """Return a Llama of three layers whose second layer has almost no effect."""
    torch.manual_seed(0)
    fields = GROUPED | {"num_hidden_layers": 3, "initializer_range": 0.1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval()

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.01)
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
    return model


def token_ids(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over `w3` … `w95`, with BOS 1, EOS 2 and padding 0."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for number in range(3, VOCAB):
        vocab[f"w{number}"] = number

    backend = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **SPECIAL)


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Return documents of 10 to 39 random words."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        length = rng.randrange(10, 40)
        words = [f"w{rng.randrange(3, VOCAB)}" for _ in range(length)]
        texts.append(" ".join(words))
    return texts


def config(**fields) -> StructPruneConfig:
    """Return a config that calibrates on a few short samples of two domains in memory."""
    domains = [DomainConfig(name="a", source=documents(seed=0)), DomainConfig(name="b", source=documents(seed=1))]
    defaults = {"domains": domains, "general_share": 0.0, "num_samples": 8, "seq_length": 24}
    if "sparsity" not in fields:
        defaults["widths"] = {"mlp": 24}
    return StructPruneConfig(**(defaults | fields))


def fewer_tokens(**fields) -> StructPruneConfig:
    """Return a config that keeps 320 of the 400 tokens of `real_text_model`."""
    domains = [DomainConfig(name=kind, source=f"builtin:{kind}") for kind in ("math", "prose")]
    defaults = {"domains": domains, "widths": {"vocab": 320}, "seq_length": 48}
    return config(**(defaults | fields))


CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_level(texts: Iterable[str], tokens: int) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer with a number of tokens on texts."""
    backend = Tokenizer(BPE(unk_token=None))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()

    special_tokens = list(SPECIAL.values())
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=tokens, special_tokens=special_tokens, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def real_text_model(tokens: int = 400, kind: str = "math") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a random Llama with the FFN width of SmolLM2, and a byte-level tokenizer that reads any text."""
    reader = byte_level(islice(builtin_documents(kind), 50), tokens)

    torch.manual_seed(0)
    fields = GROUPED | {"vocab_size": len(reader), "intermediate_size": 1536, "max_position_embeddings": 1024}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval()
    return model, reader


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as if the disk was full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
