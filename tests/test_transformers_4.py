"""transformers 4 and ONNX, installed by `make onnx`, compute the same from saved folders as transformers 5 does."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import golden
import pytest
import torch
from helpers import ask_python
from models import CASES, OTHERS, described, random_model, token_ids
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner
from optimum_structprune.arch.inference import outputs_for
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.saving.save import make_portable


PYTHON = Path(os.environ.get("ONNX_PYTHON", Path(__file__).parents[1] / "build" / "onnx" / "bin" / "python"))
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make onnx` makes it"),
]


def ask(place, requests):
    """Return the answers of transformers 4."""
    return ask_python(PYTHON, "transformers_4_ask.py", place, requests, PYTHONPATH="", HF_HUB_OFFLINE="1")


# Parameters of scaled rotary embeddings, by case.
SCALED = {
    "llama-tied": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "deepseek_v3": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "mistral": {"rope_type": "linear", "factor": 3.0},
    "phi3": {"rope_type": "longrope", "type": "longrope", "short_factor": [2.0, 3.0], "long_factor": [4.0, 5.0]},
}
# transformers 4 refuses these configs: they name a number of experts or the types of layers by keys of version 5.
REFUSED = {"qwen3_moe", "granitemoehybrid"}
# Cases that cannot be compared. The outer configs of InternVL and Mistral 3 tie an embedding that the inner configs do
# not tie. Zamba 2 of this size cannot run. transformers 4 rounds the activation parameters of Apertus to bf16.
EXCLUDED = {"internvl", "mistral3", "zamba2", "apertus"}


def with_other_bases(rope):
    """Return the parameters of a rotary embedding with other bases than the defaults."""
    if not isinstance(rope, dict):
        return rope

    parameters = {}
    for key, value in rope.items():
        if key == "rope_theta":
            parameters[key] = 7 * value
        else:
            parameters[key] = with_other_bases(value)
    return parameters


def save_with_rope(case, scaling, folder):
    """Save a random model with other parameters of its rotary embedding.

    Return a request to transformers 4 and the expected outputs, or None if the rotary embedding cannot be changed.
    """
    auto, model_type, fields = described(case)
    config = AutoConfig.for_model(model_type, **deepcopy(fields))
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not rope or "proportional" in str(rope):
        return None

    fields = deepcopy(fields)
    text_fields = fields.get("text_config", fields)
    text_fields["rope_parameters"] = with_other_bases(rope) | scaling
    model = random_model(auto, model_type, fields)
    model.save_pretrained(folder)
    make_portable(folder / "config.json", type(model.config))
    request = {"folder": str(folder), "kind": auto.__name__, "ids": token_ids().tolist()}
    return request, outputs_for(model, token_ids())


def test_families(tmp_path):
    saved_models = {}
    for case in [*CASES, *OTHERS]:
        if case not in EXCLUDED:
            saved_models[case] = save_with_rope(case, {}, tmp_path / case)
    scaled_names = set()
    for case, scaling in SCALED.items():
        name = f"{case}-scaled"
        scaled_names.add(name)
        saved_models[name] = save_with_rope(case, scaling, tmp_path / name)
    saved_models = {name: saved for name, saved in saved_models.items() if saved is not None}
    answers = ask(tmp_path, [request for request, _ in saved_models.values()])

    refused = set()
    for (name, (_, expected)), answer in zip(saved_models.items(), answers, strict=True):
        if "error" in answer:
            assert name in REFUSED or "does not recognize this architecture" in answer["error"], answer["error"]
            refused.add(name)
        else:
            torch.testing.assert_close(torch.tensor(answer["outputs"]), expected, atol=1e-5, rtol=0, msg=name)
    assert refused >= REFUSED
    assert refused.isdisjoint(scaled_names)
    assert len(saved_models) - len(refused) > 60


def prune_vocabulary(folder):
    """Save a trained model with 320 tokens. Return the model, its tokenizer, and a text of other documents."""
    original = AutoModelForCausalLM.from_pretrained(golden.TINY, dtype=torch.float32)
    original.config.rope_parameters["rope_theta"] = 1e5  # transformers 4 has another default.
    original.save_pretrained(folder / "original")
    original = AutoModelForCausalLM.from_pretrained(folder / "original")

    documents = list(builtin_documents("prose"))
    settings = {"widths": {"vocab": 320}, "general_share": 0.0, "num_samples": 8, "seq_length": 64}
    pruner = StructPruner(StructPruneConfig(domains=[DomainConfig("prose", documents[:40])], **settings))
    small = pruner.prune_model(original, AutoTokenizer.from_pretrained(golden.TINY))
    pruner.save(small, folder / "small", pruner.result.tokenizer)
    return small, pruner.result.tokenizer, " ".join(documents[40:])[:700]


def test_onnx_of_a_trimmed_model(tmp_path):
    small, tokenizer, text = prune_vocabulary(tmp_path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    # Without the key of transformers 4, its default changes the outputs.
    without_key = shutil.copytree(tmp_path / "small", tmp_path / "without-key")
    fields = json.loads((without_key / "config.json").read_text())
    assert fields.pop("rope_theta") == 1e5
    (without_key / "config.json").write_text(json.dumps(fields))

    kind = "AutoModelForCausalLM"
    request = {"folder": str(tmp_path / "small"), "kind": kind, "text": text}
    request_without_key = {"folder": str(without_key), "kind": kind, "ids": ids.tolist()}
    answer, answer_without_key = ask(tmp_path, [request, request_without_key])
    assert answer["tokens"] == ids.tolist()

    def loss_of(logits):
        return cross_entropy(torch.as_tensor(logits)[0, :-1], ids[0, 1:]).item()

    expected = loss_of(outputs_for(small, ids))
    assert loss_of(answer["outputs"]) == pytest.approx(expected, abs=1e-6)
    assert loss_of(answer["onnx"]) == pytest.approx(expected, abs=1e-4)
    assert abs(loss_of(answer_without_key["outputs"]) - expected) > 1e-3
