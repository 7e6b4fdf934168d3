"""A real llama.cpp computes the same from exported GGUF files as transformers does. `make llama-cpp` installs it."""

import os
import sys

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from helpers import ran
from models import GROUPED, LLAMA3_ROPE, SLIDING, random_model, real_text_model
from trained import needs_shared, stories_config, stories_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner, export_gguf, prune_model
from optimum_structprune.vocabulary.tokens import Vocabulary


pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing())),
]
# Spaces, digits, contractions, line ends, other scripts, and characters that several tokens share.
TEXTS = [
    "Once upon a time there was a little girl named Lily. She's 7 and it's   2024!\n\n\tShe  said: don't",
    " leading space, ünïcödé, 日本語 3333 café 😀 ... (x+y)**2 == 9;\n    return None\n",
    "def f(x):\n\treturn {'a': 1, \"b\": [2.50, 1e-3]}  # A'S I'LL\r\n",
]


def check(model, tokenizer, path, prompt, new=24, tolerance=2e-4):
    """Check that llama.cpp computes the same tokens, log-probabilities, likeliest tokens and greedy text."""
    export_gguf(model, path, tokenizer)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    start = tokenizer(prompt).input_ids
    answer = llama_cpp.ask(path, texts=TEXTS, ids=ids, prompt=start, write=new)

    assert answer["tokens"] == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert answer["bos"] == (ids[0][0] == tokenizer.bos_token_id)

    for row, tokens in zip(ids, answer["logprobs"], strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
        logprobs = [token["logprob"] for token in tokens]
        np.testing.assert_allclose(logprobs, expected[range(len(row) - 1), row[1:]], atol=tolerance)

        best_tokens = torch.tensor([token["best"] for token in tokens])
        best_logprobs = expected.gather(1, best_tokens[:, None])[:, 0]
        assert ((best_logprobs - expected.amax(1)).abs() < tolerance).all()

    generated = model.generate(torch.tensor([start]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert answer["written"] == generated[0, len(start) :].tolist()


def architecture_of(path):
    return gguf.GGUFReader(path).get_field("general.architecture").contents()


@pytest.fixture(scope="module")
def stories():
    """Return a trained model whose layers differ in FFN width and number of KV groups, and its tokenizer."""
    model, tokenizer = stories_model()
    widths = {"mlp": [172, 140, 96, 120, 88], "attention": [4, 4, 2, 4, 2]}
    pruned = prune_model(model, stories_config(widths=widths), tokenizer).eval()
    return pruned, tokenizer


@needs_shared
def test_layers_of_different_widths(stories, tmp_path):
    model, tokenizer = stories
    check(model, tokenizer, tmp_path / "out.gguf", "Once upon a time, there was a")
    assert architecture_of(tmp_path / "out.gguf") == "deci"


@needs_shared
@pytest.mark.parametrize(("kind", "error"), [("f16", 0.002), ("bf16", 0.01), ("q8_0", 0.02), ("q4_0", 0.02)])
def test_fewer_bits(stories, tmp_path, kind, error):
    """llama.cpp computes nearly the same loss as transformers. It rounds activations too."""
    model, tokenizer = stories
    if kind.startswith("q"):  # transformers reads quantized files only if all layers have one width.
        model, _ = stories_model()
        export_gguf(model, tmp_path / "out.gguf", tokenizer, dtype=kind)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    else:
        export_gguf(model, tmp_path / "out.gguf", tokenizer, dtype=kind)

    text = "One day, a bird saw a big tree. The bird was happy to sit in it and sing all day long."
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()

    (tokens,) = llama_cpp.ask(tmp_path / "out.gguf", ids=[ids])["logprobs"]
    loss = -sum(token["logprob"] for token in tokens) / len(tokens)
    assert loss == pytest.approx(expected, rel=error)


BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
DIFFERING = {"per_layer_config": {1: {"intermediate_size": 24}}}
DIFFERING_HEADS = {
    "per_layer_config": {0: {"num_attention_heads": 4, "num_key_value_heads": 2}, 1: {"intermediate_size": 24}},
    "allow_global_per_layer_attribute_access": True,
}
FEWER = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Models by name: the model type, the config fields, and the architecture in the GGUF file.
RANDOM = {
    "llama": ("llama", {}, "llama"),
    "biases": ("llama", BIASED, "llama"),
    "biases-differing": ("llama", {**BIASED, **DIFFERING}, "deci"),
    "llama3-rope": ("llama", {**DIFFERING, "rope_parameters": LLAMA3_ROPE}, "deci"),
    "linear-rope": ("llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "linear", "factor": 2.0}}, "llama"),
    "mistral": ("mistral", {**DIFFERING, "head_dim": 8}, "deci"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2-fewer-heads": ("qwen2", FEWER, "deci"),
    "qwen2-differing": ("qwen2", DIFFERING, "deci"),
    "qwen3": ("qwen3", FEWER, "qwen3"),
    "qwen3-differing": ("qwen3", {**DIFFERING_HEADS, "tie_word_embeddings": True}, "openelm"),
    "olmo2": ("olmo2", {}, "olmo2"),
    "phi3": ("phi3", {}, "phi3"),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "llama"),
    "olmoe": ("olmoe", {"num_key_value_heads": 8, "num_experts": 4, "num_experts_per_tok": 2}, "olmoe"),
    "qwen3_moe": (
        "qwen3_moe",
        {**FEWER, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
        "qwen3moe",
    ),
    "gemma3": ("gemma3_text", {**FEWER, **SLIDING, "query_pre_attn_scalar": 4}, "gemma3"),
}


@pytest.mark.parametrize("case", RANDOM)
def test_families_and_variants(case, tmp_path):
    model_type, fields, architecture = RANDOM[case]
    _, tokenizer = real_text_model()
    text_sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = random_model(AutoModelForCausalLM, model_type, GROUPED | text_sizes | fields, seed=1)

    tolerance = 2e-4
    if model_type == "gemma3_text":  # llama.cpp reads GELU from a table of 16-bit numbers.
        tolerance = 1e-3
    check(model, tokenizer, tmp_path / "out.gguf", "Question: what is", tolerance=tolerance)
    assert architecture_of(tmp_path / "out.gguf") == architecture


@pytest.mark.parametrize("load", [real_text_model, pytest.param(stories_model, marks=needs_shared)])
def test_a_smaller_vocabulary(load, tmp_path):
    _, tokenizer = load()
    vocabulary = Vocabulary.of(tokenizer)
    kept_ids = set(vocabulary.fixed)
    for token in range(vocabulary.size):
        parts = vocabulary.parts(token)
        if token % 3 and parts and kept_ids.issuperset(parts):
            kept_ids.add(token)
    tokenizer = vocabulary.smaller(sorted(kept_ids))
    assert len(tokenizer) < vocabulary.size

    fields = GROUPED | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = random_model(AutoModelForCausalLM, "llama", fields, seed=1)
    check(model, tokenizer, tmp_path / "out.gguf", "Question: what is")


@needs_shared
def test_the_converter_of_llama_cpp_writes_the_same_file(tmp_path):
    """The source of the converter comes with the binaries."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter imports sentencepiece")
    source = tmp_path / "source"
    bundle = llama_cpp.modules() / "node-llama-cpp" / "llama" / "gitRelease.bundle"
    ran(["git", "clone", "--quiet", bundle, source])

    pruner = StructPruner(stories_config(widths={"mlp": 120, "attention": 2}))
    model, tokenizer = stories_model()
    model = pruner.prune_model(model, tokenizer).eval()
    pruner.save(model, tmp_path / "pruned", tokenizer=tokenizer)

    converted_path = tmp_path / "converted.gguf"
    command = [sys.executable, source / "convert_hf_to_gguf.py", tmp_path / "pruned", "--outtype", "f32"]
    ran(command + ["--outfile", converted_path], env=os.environ | {"PYTHONPATH": str(source / "gguf-py")})
    export_gguf(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), tmp_path / "exported.gguf", tokenizer)
    converted = gguf.GGUFReader(converted_path)
    exported = gguf.GGUFReader(tmp_path / "exported.gguf")

    tensors = {tensor.name: tensor.data for tensor in converted.tensors}
    assert {tensor.name for tensor in exported.tensors} == tensors.keys()
    for tensor in exported.tensors:
        assert np.array_equal(tensor.data, tensors[tensor.name]), tensor.name

    # The export adds its version, scores of the tokens, and the special tokens around a text.
    differences = {
        "GGUF.kv_count",
        "structprune.version",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_sep_token",
        "tokenizer.ggml.add_space_prefix",
    }
    exported_fields = {name: field.contents() for name, field in exported.fields.items()}
    converted_fields = {name: field.contents() for name, field in converted.fields.items()}
    for name in exported_fields.keys() | converted_fields.keys():
        if name not in differences:
            assert exported_fields.get(name) == converted_fields.get(name), name

    row = tokenizer(TEXTS[0]).input_ids
    (tokens,) = llama_cpp.ask(converted_path, ids=[row])["logprobs"]
    logprobs = [token["logprob"] for token in tokens]
    expected = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
    np.testing.assert_allclose(logprobs, expected.detach(), atol=2e-4)
