"""A real llama.cpp computes from our GGUF files what transformers computes; `make llama-cpp` installs one."""

import os
import sys

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from helpers import ran
from models import GROUPED, SLIDING, random_model, real_text_model
from trained import needs_shared, stories_config, stories_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruner, export_gguf, prune_model
from optimum_structprune.vocabulary.tokens import Vocabulary


pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing())),
]
# Spaces, digits, contractions, line ends, other scripts and bytes that no token holds whole.
TEXTS = [
    "Once upon a time there was a little girl named Lily. She's 7 and it's   2024!\n\n\tShe  said: don't",
    " leading space, ünïcödé, 日本語 3333 café 😀 ... (x+y)**2 == 9;\n    return None\n",
    "def f(x):\n\treturn {'a': 1, \"b\": [2.50, 1e-3]}  # A'S I'LL\r\n",
]


def check(model, tokenizer, path, prompt, new=24, tolerance=2e-4):
    """The same tokens, log-probabilities, likeliest tokens and greedy text."""
    export_gguf(model, path, tokenizer)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    start = tokenizer(prompt).input_ids
    found = llama_cpp.ask(path, texts=TEXTS, ids=ids, prompt=start, write=new)
    assert found["tokens"] == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert found["bos"] == (ids[0][0] == tokenizer.bos_token_id)
    for row, theirs in zip(ids, found["logprobs"], strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
        found_here = [token["logprob"] for token in theirs]
        np.testing.assert_allclose(found_here, ours[range(len(row) - 1), row[1:]], atol=tolerance)
        best = torch.tensor([token["best"] for token in theirs])
        assert ((ours.gather(1, best[:, None])[:, 0] - ours.amax(1)).abs() < tolerance).all()
    written = model.generate(torch.tensor([start]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert found["written"] == written[0, len(start) :].tolist()


@pytest.fixture(scope="module")
def stories():
    """A trained model of which each layer keeps another width of its FFN, and one layer half its heads."""
    model, tokenizer = stories_model()
    widths = {"mlp": [172, 140, 96, 120, 88], "attention": [4, 4, 2, 4, 2]}
    return prune_model(model, stories_config(widths=widths), tokenizer).eval(), tokenizer


@needs_shared
def test_layers_of_different_widths(stories, tmp_path):
    model, tokenizer = stories
    check(model, tokenizer, tmp_path / "out.gguf", "Once upon a time, there was a")
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.architecture").contents() == "deci"


@needs_shared
@pytest.mark.parametrize(("kind", "error"), [("f16", 0.002), ("bf16", 0.01), ("q8_0", 0.02), ("q4_0", 0.02)])
def test_fewer_bits(stories, tmp_path, kind, error):
    """llama.cpp, which rounds activations too, computes nearly what transformers makes of the same file."""
    model, tokenizer = stories
    quantised = kind.startswith("q")
    if quantised:  # of which transformers reads no file of layers that differ
        model, _ = stories_model()
    export_gguf(model, tmp_path / "out.gguf", tokenizer, dtype=kind)
    if quantised:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    ids = tokenizer("One day, a bird saw a big tree. The bird was happy to sit in it and sing all day long.").input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    (theirs,) = llama_cpp.ask(tmp_path / "out.gguf", ids=[ids])["logprobs"]
    assert -sum(token["logprob"] for token in theirs) / len(theirs) == pytest.approx(expected, rel=error)


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
DIFFERING = {"per_layer_config": {1: {"intermediate_size": 24}}}
DIFFERING_HEADS = {
    "per_layer_config": {0: {"num_attention_heads": 4, "num_key_value_heads": 2}, 1: {"intermediate_size": 24}},
    "allow_global_per_layer_attribute_access": True,
}
FEWER = {"num_attention_heads": 4, "num_key_value_heads": 2}
# name -> model type, fields, and the architecture that it is written as
RANDOM = {
    "llama": ("llama", {}, "llama"),
    "biases": ("llama", BIASED, "llama"),
    "biases-differing": ("llama", {**BIASED, **DIFFERING}, "deci"),
    "llama3-rope": ("llama", {**DIFFERING, "rope_parameters": ROPE}, "deci"),
    "linear-rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, "llama"),
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
    sizes = {**GROUPED, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **fields}
    model = random_model(AutoModelForCausalLM, model_type, sizes, seed=1)
    # llama.cpp looks GELU up in a table of 16-bit numbers.
    tolerance = 1e-3 if model_type == "gemma3_text" else 2e-4
    check(model, tokenizer, tmp_path / "out.gguf", "Question: what is", tolerance=tolerance)
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.architecture").contents() == architecture


@pytest.mark.parametrize("trained", [real_text_model, pytest.param(stories_model, marks=needs_shared)])
def test_a_smaller_vocabulary(trained, tmp_path):
    vocabulary = Vocabulary.of(trained()[1])
    kept = set(vocabulary.fixed)
    for token in range(vocabulary.size):
        if token % 3 and vocabulary.parts(token) and kept.issuperset(vocabulary.parts(token)):
            kept.add(token)
    tokenizer = vocabulary.smaller(sorted(kept))
    assert len(tokenizer) < vocabulary.size
    fields = {**GROUPED, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = random_model(AutoModelForCausalLM, "llama", fields, seed=1)
    check(model, tokenizer, tmp_path / "out.gguf", "Question: what is")


@needs_shared
def test_a_uniform_result_is_the_file_of_llama_cpps_own_converter(tmp_path):
    """Its source comes with the binaries."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter imports sentencepiece")
    source = tmp_path / "source"
    bundle = llama_cpp.modules() / "node-llama-cpp" / "llama" / "gitRelease.bundle"
    ran(["git", "clone", "--quiet", bundle, source])
    pruner = StructPruner(stories_config(widths={"mlp": 120, "attention": 2}))
    model, tokenizer = stories_model()
    model = pruner.prune_model(model, tokenizer).eval()
    pruner.save(model, tmp_path / "pruned", tokenizer=tokenizer)
    command = [sys.executable, source / "convert_hf_to_gguf.py", tmp_path / "pruned", "--outtype", "f32"]
    paths = {**os.environ, "PYTHONPATH": str(source / "gguf-py")}
    ran([*command, "--outfile", tmp_path / "theirs.gguf"], env=paths)
    export_gguf(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), tmp_path / "ours.gguf", tokenizer)
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    tensors = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == tensors.keys()
    assert all(np.array_equal(tensor.data, tensors[tensor.name]) for tensor in ours.tensors)
    # Ours says more: who wrote it, what stands around a text, and scores, which theirs gives no piece.
    more = {"GGUF.kv_count", "structprune.version", "tokenizer.ggml.scores"}
    more |= {f"tokenizer.ggml.{name}" for name in ("add_eos_token", "add_sep_token", "add_space_prefix")}
    left, right = ({name: field.contents() for name, field in file.fields.items()} for file in (ours, theirs))
    assert {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)} <= more
    (row,) = [tokenizer(TEXTS[0]).input_ids]
    (found,) = llama_cpp.ask(tmp_path / "theirs.gguf", ids=[row])["logprobs"]
    expected = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
    np.testing.assert_allclose([token["logprob"] for token in found], expected.detach(), atol=2e-4)
