"""Inputs, texts, criteria and models that cannot be used: one sentence before work begins, and no traceback."""

import json

import numpy as np
import pytest
import torch
from models import build, config, token_ids, tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, prune_model
from optimum_structprune.config.fields import parse_yaml, to_yaml
from optimum_structprune.criteria import CRITERIA, register_criterion
from optimum_structprune.domains.sources import documents as read
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import perplexity
from optimum_structprune.saving.gguf_file import export_gguf


def pruned(inputs, model=None, **fields):
    model = build("llama-tied") if model is None else model
    return prune_model(model, config(**fields), inputs=inputs)


def test_odd_tensors_and_models(tmp_path):
    for samples, message in (
        (token_ids(8, 8).int(), "holds torch.int32 .*the ids as int64"),
        (token_ids(8, 8).float(), "holds torch.float32 .*the ids as int64"),
        (torch.zeros(8, 0, dtype=torch.long), r"shape \(8, 0\).*2 tokens or more"),
        (token_ids(8, 1), "2 tokens or more"),
    ):
        with pytest.raises(StructPruneError, match=message):
            pruned({"a": samples})
    shared = build("llama-tied")
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    odd = build("llama-tied")
    odd.generation_config = GenerationConfig()
    odd.generation_config.temperature = 0.7
    compiled = torch.compile(build("llama-tied"), backend="eager")
    for model, message in (
        (shared, r"layers.1.mlp.\w+.weight is the same tensor"),
        (odd, "temperature"),
        (compiled, "_orig_mod"),
    ):
        with pytest.raises(StructPruneError, match=message):
            pruned({"a": token_ids(8, 8)}, model)
    with torch.inference_mode():
        fixed = LlamaForCausalLM(build("llama-tied").config)
    with pytest.raises(StructPruneError, match="inside torch.inference_mode.*pass copy.deepcopy"):
        prune_model(fixed, config(), tokenizer(), inplace=True)
    prune_model(fixed, config(), tokenizer())
    with pytest.raises(StructPruneError, match="pass the model's own"):
        export_gguf(build("llama-tied"), tmp_path / "m.gguf", None)
    with pytest.raises(StructPruneError, match="nothing to predict"):
        perplexity(build("llama-tied"), torch.zeros(0, 8, dtype=torch.long))


@pytest.mark.parametrize(("scores", "fields"), [
    *((scores, {}) for scores in (None, np.ones(40), np.float64(3))),
    (np.ones(40), {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1}),
    *((scores, {"widths": {"layer": 1}}) for scores in (None, torch.ones(3), torch.tensor([1.0, torch.nan]))),
])  # fmt: skip
def test_odd_criteria(scores, fields, monkeypatch):
    monkeypatch.setattr(CRITERIA, "_entries", dict(CRITERIA._entries))
    register_criterion("odd", judges="layer" if "widths" in fields else "unit")(lambda *_: scores)
    with pytest.raises(StructPruneError, match=r"'odd' has to give \d+ finite scores, one per unit, at model.layers"):
        pruned({"a": token_ids(8, 8)}, criterion="odd", **fields)


def test_odd_texts(tmp_path):
    with pytest.raises(StructPruneError, match="is empty"):
        read_heldout(DomainConfig("a", []), tokenizer(), 8)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "full.csv").write_text("text\nmine\n")
    assert [*read(DomainConfig("a", str(tmp_path)), 0)] == ["mine"]
    pandas = pytest.importorskip("pandas")
    assert [*read(DomainConfig("a", pandas.Series(["x", "y"])), None)] == ["x", "y"]


def test_messages_without_text_and_in_parts():
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    parts = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "two"}]
    rows = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "assistant", "content": None},
    ]
    reader = tokenizer()
    call = "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
    reader.chat_template = f"{{% for m in messages %}}{{{{ m['content'] }}}}|{call};{{% endfor %}}"
    (text,) = read(DomainConfig("a", [json.loads(json.dumps({"messages": rows}))], template="chat"), 0, reader)
    assert text == "one two|;|f;|;"


def test_a_config_comes_back_from_yaml():
    for text in ("yes", "~", "1_000", "a\nb", "é", "a: b"):
        before = StructPruneConfig(sparsity=1.5e-7, domains=[DomainConfig(text, text, revision=text)])
        assert StructPruneConfig.from_dict(parse_yaml(to_yaml(before.to_dict()))) == before, text
