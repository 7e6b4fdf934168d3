"""transformers 4 and the ONNX exporter of `make onnx` compute from our folders what transformers 5 computes."""

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
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.forward.metrics import outputs_for
from optimum_structprune.saving.save import settle


PYTHON = Path(os.environ.get("ONNX_PYTHON", Path(__file__).parents[1] / "build" / "onnx" / "bin" / "python"))
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make onnx` makes it"),
]


def ask(place, requests):
    """What transformers 4 answers."""
    return ask_python(PYTHON, "transformers_4_ask.py", place, requests, PYTHONPATH="", HF_HUB_OFFLINE="1")


# What else than another base a rotary embedding may have.
SCALED = {
    "llama-tied": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "deepseek_v3": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "mistral": {"rope_type": "linear", "factor": 3.0},
    "phi3": {"rope_type": "longrope", "type": "longrope", "short_factor": [2.0, 3.0], "long_factor": [4.0, 5.0]},
}
# transformers 4 refuses these: their configs name fewer experts, and kinds of layers, by words of transformers 5.
REFUSED = {"qwen3_moe", "granitemoehybrid"}
# The outer config of these random models ties an embedding that the inner one does not tie, and Zamba 2 of this size
# is only built, never run; transformers 4 rounds the parameters of Apertus' activation to bf16.
ODD = {"internvl", "mistral3", "zamba2", "apertus"}


def with_other_bases(rope):
    """The parameters of a rotary embedding that no default would give."""
    if not isinstance(rope, dict):
        return rope
    return {key: 7 * of if key == "rope_theta" else with_other_bases(of) for key, of in rope.items()}


def test_families(tmp_path):
    requests, known = [], []
    for case, scaled in [*((case, {}) for case in (*CASES, *OTHERS) if case not in ODD), *SCALED.items()]:
        auto, model_type, fields = described(case)
        config = AutoConfig.for_model(model_type, **deepcopy(fields))
        rope = getattr(config.get_text_config(), "rope_parameters", None)
        if not rope or "proportional" in str(rope):
            continue
        fields = deepcopy(fields)
        fields.get("text_config", fields)["rope_parameters"] = {**with_other_bases(rope), **scaled}
        model = random_model(auto, model_type, fields)
        folder = tmp_path / f"{case}{'-scaled' * bool(scaled)}"
        model.save_pretrained(folder)
        settle(folder / "config.json", type(model.config))
        requests.append({"folder": str(folder), "kind": auto.__name__, "ids": token_ids().tolist()})
        known.append(outputs_for(model, token_ids()))
    refused, same = set(), 0
    for request, answer, outputs in zip(requests, ask(tmp_path, requests), known, strict=True):
        case = Path(request["folder"]).name
        if "error" in answer:
            assert case in REFUSED or "does not recognize this architecture" in answer["error"], answer["error"]
            refused.add(case)
        else:
            torch.testing.assert_close(torch.tensor(answer["outputs"]), outputs, atol=1e-5, rtol=0, msg=case)
            same += 1
    assert refused >= REFUSED and not refused & {f"{case}-scaled" for case in SCALED} and same > 60, (refused, same)


def test_onnx_of_a_trimmed_model(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(golden.TINY, dtype=torch.float32)
    dense.config.rope_parameters["rope_theta"] = 1e5  # not what transformers 4 takes where it reads none
    dense.save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    reader = AutoTokenizer.from_pretrained(golden.TINY)
    text = [*builtin_documents("prose")]
    settings = {"widths": {"vocab": 320}, "general_share": 0.0, "num_samples": 8, "seq_length": 64}
    pruner = StructPruner(StructPruneConfig(domains=[DomainConfig("prose", text[:40])], **settings))
    small = pruner.prune_model(dense, reader)
    pruner.save(small, tmp_path / "small", pruner.tokenizer)
    words = " ".join(text[40:])[:700]
    ids = pruner.tokenizer(words, return_tensors="pt")["input_ids"]
    bare = shutil.copytree(tmp_path / "small", tmp_path / "bare")
    fields = json.loads((bare / "config.json").read_text())
    assert fields.pop("rope_theta") == 1e5
    (bare / "config.json").write_text(json.dumps(fields))
    kind = {"kind": "AutoModelForCausalLM"}
    requests = [{"folder": str(tmp_path / "small"), **kind, "text": words}]
    requests += [{"folder": str(bare), **kind, "ids": ids.tolist()}]
    answer, without = ask(tmp_path, requests)
    assert answer["tokens"] == ids.tolist()
    ours = outputs_for(small, ids)
    logits = {"torch": ours, "4": answer["outputs"], "onnx": answer["onnx"], "without the key": without["outputs"]}
    losses = {name: cross_entropy(torch.as_tensor(of)[0, :-1], ids[0, 1:]).item() for name, of in logits.items()}
    assert losses["4"] == pytest.approx(losses["torch"], abs=1e-6)
    assert losses["onnx"] == pytest.approx(losses["torch"], abs=1e-4)
    assert abs(losses["without the key"] - losses["torch"]) > 1e-3
