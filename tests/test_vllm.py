"""A real vLLM computes from our folders what transformers computes; `make vllm` installs one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ask_python, first_units, ran
from models import real_text_model
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune import StructPruneConfig, prune_model


ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / "build" / "vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make vllm` makes it"),
]
PROMPT, NEW = [5, 60, 7, 300, 9], 12
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False}
# vLLM's attention on CPUs wants heads of 32 channels or more.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def dense(model_type="llama", **fields):
    """A random model of three layers whose logits are apart, and a tokenizer."""
    _, tokenizer = real_text_model()
    sizes = {**SIZES, "num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": 256, **fields}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, tokenizer


@pytest.fixture(scope="module")
def models():
    model, tokenizer = dense()
    return {
        "uniform": first_units(model, [256] * 3, [1] * 3),
        "ffn": first_units(model, [512, 200, 256]),
        "heads": first_units(model, [512, 200, 256], [2, 1, 2]),
    }, tokenizer


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("vllm")
    for name, model in models[0].items():
        model.save_pretrained(place / name)
        models[1].save_pretrained(place / name)
    return place


def ask(place, requests, **variables):
    """What vLLM answers."""
    wanted = [{"folder": str(place / name), "ids": PROMPT, "new": NEW, "options": more} for name, more in requests]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    quiet |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PYTHONPATH": str(ROOT)}
    return ask_python(PYTHON, "vllm_ask.py", place, wanted, **quiet, **variables)


def check(model, answer):
    """The same greedy tokens, and their log-probabilities to three digits."""
    assert "error" not in answer, answer
    written = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert answer["tokens"] == written[0, len(PROMPT) :].tolist()
    with torch.no_grad():
        ours = model(written).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    np.testing.assert_allclose(answer["logprobs"], ours[range(NEW), answer["tokens"]], atol=1e-3)


def test_without_this_package(models, folders):
    remote = {"trust_remote_code": True}
    unknown = {"hf_overrides": {"architectures": ["StructPruneForCausalLM"]}}
    requests = [("uniform", {}), ("heads", {**remote, "model_impl": "transformers"}), ("ffn", {**remote, **unknown})]
    requests += [("ffn", {})]
    *answers, native = ask(folders, requests, VLLM_PLUGINS="")
    for (name, _), answer in zip(requests, answers, strict=False):
        check(models[0][name], answer)
    assert [answer["class"] for answer in answers] == [["LlamaForCausalLM"]] + [["TransformersForCausalLM"]] * 2
    assert "AmbiguousGlobalPerLayerAttributeError" in native["error"]


@pytest.mark.parametrize(("model_type", "fields"), [
    ("qwen3_moe", {"moe_intermediate_size": 128, "norm_topk_prob": True, "head_dim": 64}),
    ("olmoe", {"num_key_value_heads": 4}),
])  # fmt: skip
def test_a_mixture_of_fewer_experts(model_type, fields, tmp_path):
    """As vLLM's own class, which knows nothing of the pruning; five experts are no multiple of 8."""
    model, tokenizer = dense(model_type, **MIXTURE, **fields)
    wish = StructPruneConfig(
        widths={"expert": 5, "mlp": 96}, num_samples=6, seq_length=64, general_text="builtin:prose"
    )
    small = prune_model(model, wish, tokenizer)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    (answer,) = ask(tmp_path, [("small", {})], VLLM_PLUGINS="")
    check(small, answer)
    assert answer["class"][0].lower() == model_type.replace("_", "") + "forcausallm"


def test_with_this_package(models, folders):
    requests = [("heads", {}), ("uniform", {})]
    answers = ask(folders, requests)
    for (name, _), answer in zip(requests, answers, strict=True):
        check(models[0][name], answer)
    assert [answer["class"] for answer in answers] == [["TransformersForCausalLM"], ["LlamaForCausalLM"]]


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


def test_in_mlx(models, folders):
    model = models[0]["uniform"]
    row, logprobs = json.loads(
        ran([PYTHON, "-c", MLX.replace("{new}", str(NEW)), json.dumps(PROMPT), folders / "uniform"])
    )
    assert row == model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, min_new_tokens=NEW)[0].tolist()
    with torch.no_grad():
        ours = model(torch.tensor([row])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(logprobs, ours, atol=1e-3)
