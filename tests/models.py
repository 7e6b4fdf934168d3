"""Tiny random models, one entry for every family and variant."""

from __future__ import annotations

import random
from itertools import islice

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from optimum_structprune import DomainConfig, StructPruneConfig
from optimum_structprune.calibration.builtin import builtin_documents


VOCAB = 96
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    **TOKENS,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **TOKENS,
}

# name -> (model type, config fields)
CASES: dict[str, tuple[str, dict]] = {
    "llama-tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**GROUPED, "tie_word_embeddings": False}),
    "llama-bias": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GROUPED, **SLIDING, "use_sliding_window": True}),
    "gemma2": ("gemma2", {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4}),
    "gemma3_text": ("gemma3_text", {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4}),
    "phi3": ("phi3", {**GROUPED, "tie_word_embeddings": False}),
    "gpt2-tied": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}),
    "gpt2-inner": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40, **TOKENS}),
    "opt": ("opt", {**PLAIN, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "opt-no-bias": ("opt", {**PLAIN, "ffn_dim": 40, "word_embed_proj_dim": 32, "enable_bias": False}),
    "gpt_neox": ("gpt_neox", {**PLAIN, "use_parallel_residual": True}),
    "gpt_neox-serial": ("gpt_neox", {**PLAIN, "use_parallel_residual": False, "tie_word_embeddings": True}),
}


def build(case: str, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32, with biases and norms away from their trivial initial values."""
    model_type, fields = CASES[case]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise, alpha=0.1 if parameter.ndim == 1 else 0.05)
    return model


def token_ids(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `w3` … `w95`, with BOS 1, EOS 2 and padding 0."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    backend = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Documents of random words."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(rng.randrange(10, 40))) for _ in range(count)]


def config(**fields) -> StructPruneConfig:
    """A config that calibrates on a few short blocks of two in-memory domains."""
    domains = [DomainConfig(name="a", source=documents(seed=0)), DomainConfig(name="b", source=documents(seed=1))]
    defaults = {"domains": domains, "num_samples": 8, "seq_length": 24, "batch_size": 3}
    if "sparsity" not in fields:
        defaults["widths"] = {"mlp": 24}
    return StructPruneConfig(**{**defaults, **fields})


def real_text_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random Llama with SmolLM2's proportions and a byte-level tokenizer that reads any text."""
    backend = Tokenizer(BPE(unk_token=None))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=ByteLevel.alphabet()
    )
    backend.train_from_iterator(islice(builtin_documents("math"), 50), trainer)
    reader = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    fields = {**GROUPED, "vocab_size": len(reader), "intermediate_size": 1536, "max_position_embeddings": 1024}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval(), reader
