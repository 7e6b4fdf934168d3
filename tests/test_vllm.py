"""A real vLLM computes the same from saved folders as transformers does. `make vllm` installs it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ask_python, first_units, ran, save_with_tokenizer
from models import real_text_model
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune import StructPruneConfig, prune_model


ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / "build" / "vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make vllm` makes it"),
]
PROMPT = [5, 60, 7, 300, 9]
NEW = 12
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False}
# The attention of vLLM on CPUs needs heads of 32 channels or more.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def original(model_type="llama", **fields):
    """Return a random model of three layers with distinct logits, and a tokenizer."""
    _, tokenizer = real_text_model()
    sizes = SIZES | {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    sizes |= fields
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, tokenizer


@pytest.fixture(scope="module")
def models():
    """Return pruned models: one width for all layers, FFNs of different widths, and heads too."""
    model, _ = original()
    return {
        "uniform": first_units(model, [256, 256, 256], [1, 1, 1]),
        "ffn": first_units(model, [512, 200, 256]),
        "heads": first_units(model, [512, 200, 256], [2, 1, 2]),
    }


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Return the folder that contains the folders of the models."""
    place = tmp_path_factory.mktemp("vllm")
    _, tokenizer = original()
    for name, model in models.items():
        save_with_tokenizer(model, place / name, tokenizer)
    return place


def ask(place, requests, **variables):
    """Return the answers of vLLM to requests, each the name of a folder and options."""
    questions = []
    for name, options in requests:
        questions.append({"folder": str(place / name), "ids": PROMPT, "new": NEW, "options": options})
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "PYTHONPATH": str(ROOT),
    }
    return ask_python(PYTHON, "vllm_ask.py", place, questions, **environment, **variables)


def generate(model):
    """Return the prompt with greedy tokens of transformers."""
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def check(model, answer, class_name):
    """Check the class in vLLM, the greedy tokens, and their log-probabilities to three digits."""
    assert "error" not in answer, answer
    assert answer["class"] == [class_name]

    tokens = generate(model)
    assert answer["tokens"] == tokens[0, len(PROMPT) :].tolist()
    with torch.no_grad():
        logprobs = model(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    np.testing.assert_allclose(answer["logprobs"], logprobs[range(NEW), answer["tokens"]], atol=1e-3)


def test_vllm_without_this_package(models, folders):
    transformers_options = {"trust_remote_code": True, "model_impl": "transformers"}
    unknown = {"hf_overrides": {"architectures": ["StructPruneForCausalLM"]}, "trust_remote_code": True}
    requests = [("uniform", {}), ("heads", transformers_options), ("ffn", unknown), ("ffn", {})]
    uniform, heads, ffn, native_ffn = ask(folders, requests, VLLM_PLUGINS="")

    check(models["uniform"], uniform, "LlamaForCausalLM")
    check(models["heads"], heads, "TransformersForCausalLM")
    check(models["ffn"], ffn, "TransformersForCausalLM")
    assert "AmbiguousGlobalPerLayerAttributeError" in native_ffn["error"]


@pytest.mark.parametrize(("model_type", "class_name", "fields"), [
    ("qwen3_moe", "Qwen3MoeForCausalLM", {"moe_intermediate_size": 128, "norm_topk_prob": True, "head_dim": 64}),
    ("olmoe", "OlmoeForCausalLM", {"num_key_value_heads": 4}),
])  # fmt: skip
def test_a_mixture_of_fewer_experts_needs_no_package(model_type, class_name, fields, tmp_path):
    """The class of vLLM itself loads the model, even though 5 experts are not a multiple of 8."""
    model, tokenizer = original(model_type, **MIXTURE, **fields)
    settings = StructPruneConfig(
        widths={"expert": 5, "mlp": 96}, num_samples=6, seq_length=64, general_text="builtin:prose"
    )
    small = prune_model(model, settings, tokenizer)
    save_with_tokenizer(small, tmp_path / "small", tokenizer)

    (answer,) = ask(tmp_path, [("small", {})], VLLM_PLUGINS="")
    check(small, answer, class_name)


def test_vllm_with_this_package(models, folders):
    heads, uniform = ask(folders, [("heads", {}), ("uniform", {})])
    check(models["heads"], heads, "TransformersForCausalLM")
    check(models["uniform"], uniform, "LlamaForCausalLM")


MLX = """
import json, sys
import mlx.core as mx
from mlx_lm import load
model, _ = load(sys.argv[2])
row = json.loads(sys.argv[1])
for _ in range({new}):
    row.append(mx.argmax(model(mx.array([row]))[0, -1]).item())
logits = model(mx.array([row]))[0]
print(json.dumps([row, (logits - mx.logsumexp(logits, -1, keepdims=True)).tolist()]))
"""


def test_mlx_computes_the_same_as_transformers(models, folders):
    model = models["uniform"]
    script = MLX.replace("{new}", str(NEW))
    row, logprobs = json.loads(ran([PYTHON, "-c", script, json.dumps(PROMPT), folders / "uniform"]))

    assert row == generate(model)[0].tolist()
    with torch.no_grad():
        expected = model(torch.tensor([row])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(logprobs, expected, atol=1e-3)
