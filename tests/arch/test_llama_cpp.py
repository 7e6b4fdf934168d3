"""Which of llama.cpp's architectures holds a model, and in which order it expects rows."""

import re

import pytest
import torch
from models import GROUPED
from transformers import AutoConfig

from optimum_structprune.arch.llama_cpp import gguf_architecture, gguf_refusal, in_file_order


def settings(model_type, **fields):
    return AutoConfig.for_model(model_type, **{**GROUPED, **fields})


def differing(model_type, **fields):
    return settings(model_type, per_layer_config={1: {"intermediate_size": 24}}, **fields)


@pytest.mark.parametrize(("config", "architecture"), [
    (settings("llama"), "llama"),
    (settings("mistral"), "llama"),
    (settings("qwen2"), "qwen2"),
    (differing("llama"), "deci"),
    (differing("mistral"), "deci"),
    (differing("qwen2"), "deci"),
    # qwen2 takes the width of the residual stream for that of all heads.
    (settings("qwen2", num_attention_heads=4, num_key_value_heads=2), "deci"),
    (settings("llama", num_attention_heads=4, num_key_value_heads=2), "llama"),
], ids=lambda value: value if isinstance(value, str) else value.model_type)  # fmt: skip
def test_the_architecture(config, architecture):
    assert gguf_architecture(config) == architecture and gguf_refusal(config) is None


@pytest.mark.parametrize(("config", "reason"), [
    (settings("qwen3"), "this is a qwen3 model.*convert_hf_to_gguf.py may take it"),
    (differing("qwen3"), "--pad-uniform"),
    (settings("mixtral"), "this is a mixtral model"),
    (settings("llama", hidden_act="gelu"), "hidden_act=silu only, found gelu"),
    (
        settings("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type=default, linear, llama3 only, found yarn",
    ),
], ids=["family", "family-differing", "experts", "activation", "rope"])  # fmt: skip
def test_what_has_none_gets_the_reason(config, reason):
    assert gguf_architecture(config) is None
    assert re.search(reason, gguf_refusal(config))


@pytest.mark.parametrize(("name", "heads"), [("self_attn.q_proj.weight", 8), ("self_attn.k_proj.bias", 4)])
def test_rows_that_are_rotated_together_lie_beside_each_other(name, heads):
    rows = torch.arange(heads * 4.0)[:, None].expand(-1, 3) if name.endswith("weight") else torch.arange(heads * 4.0)
    moved = in_file_order(f"model.layers.0.{name}", rows, settings("llama"), "deci")
    first = moved.reshape(heads, 4, -1)[:, :, 0]
    assert first[0].tolist() == [0, 2, 1, 3] and first[1].tolist() == [4, 6, 5, 7]
    back = moved.unflatten(0, (heads, 2, 2)).transpose(1, 2).reshape(rows.shape)
    assert torch.equal(back, rows)


def test_other_rows_stay():
    rows = torch.arange(32.0)
    assert in_file_order("model.layers.0.self_attn.v_proj.bias", rows, settings("llama"), "deci") is rows
    assert in_file_order("model.layers.0.self_attn.q_proj.bias", rows, settings("qwen2"), "qwen2") is rows
