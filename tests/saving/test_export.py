"""A non-uniform model with one width for all layers, or as NVIDIA's DeciLM, which `test_vllm.py` runs in vLLM, MLX."""

import json

import pytest
import torch
from helpers import first_units, logits
from models import GROUPED, build, config, random_model, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_structprune import Manifest, Plan, StructPruneConfig, StructPruner, export_nemotron_nas, export_uniform
from optimum_structprune.errors import StructPruneError


@pytest.fixture(scope="module")
def run():
    pruner = StructPruner(config(widths={"mlp": [20, 30], "attention": [4, 2]}))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    assert model.config.is_heterogeneous
    return pruner, model


@pytest.fixture
def pruned(run, tmp_path):
    """The folder of a non-uniform model, and the model loaded from it."""
    pruner, model = run
    pruner.save(model, tmp_path / "pruned", tokenizer=tokenizer())
    return tmp_path / "pruned", AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


def test_the_records_of_the_pruning_are_exported(run, pruned, tmp_path):
    pruner, _ = run
    folder, model = pruned
    with pytest.raises(StructPruneError, match="pruned shares files with .*pruned, which this run"):
        export_uniform(model, folder, overwrite=True)
    padding = export_uniform(model, tmp_path / "out")
    assert padding.dense == pruner.report.parameters["before"]
    share = (padding.after - padding.before) / (padding.dense - padding.before)
    said = str(padding)
    assert f"adds {padding.after - padding.before:,} parameters" in said and f"back {share:.1%}" in said
    assert Plan.load(tmp_path / "out" / "pruning_plan.json") == pruner.plan
    assert Manifest.load(tmp_path / "out") == pruner.manifest
    assert StructPruneConfig.from_pretrained(tmp_path / "out").widths == pruner.config.widths
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["parameters"]["after"] == padding.before == model.num_parameters()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not again.config.is_heterogeneous and again.num_parameters() == padding.after
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    with pytest.raises(StructPruneError, match="same width already"):
        export_uniform(again, tmp_path / "twice")
    assert not (tmp_path / "twice").exists() and not (tmp_path / "out" / "modeling_structprune.py").exists()


def test_an_export_can_be_replaced_even_without_records_or_with_those_of_another_program(run, pruned, tmp_path):
    folder, model = pruned
    for text in ("{}", '{"parameters": 5}', '{"parameters": {"before": "many"}}', "[]", "no JSON"):
        (folder / "report.json").write_text(text)
        padding = export_uniform(model, tmp_path / "out", overwrite=True)
        assert padding.dense is None and "gives back" not in str(padding)
    model = run[1]
    for _ in range(2):
        assert export_uniform(model, tmp_path / "out", overwrite=True).dense is None
    assert not (tmp_path / "out" / "report.json").exists()


def model(model_type="llama", ffn=(512, 256), groups=(4, 2), **fields):
    """Two layers that keep their first units, of 4 KV groups with two query heads each."""
    dense = random_model(AutoModelForCausalLM, model_type, {**GROUPED, "intermediate_size": 512, **fields})
    return first_units(dense, ffn, groups)


def blocks(folder):
    """The query heads in a group and the width of the FFN of each layer, as the engines read them."""
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == "nemotron-nas" and fields["num_attention_heads"] == 8
    ffn = [int(2 * block["ffn"]["ffn_mult"] * fields["hidden_size"] / 3) for block in fields["block_configs"]]
    assert all(width % 256 in (0, 255) for width in ffn)  # rounded up to the next multiple
    heads = [block["attention"]["n_heads_in_group"] for block in fields["block_configs"]]
    return [(count, -(-width // 256) * 256) for count, width in zip(heads, ffn, strict=True)]


# model type, fields, widths of FFN and numbers of KV groups, and then the query heads in a group and the FFN
CASES = {
    "differing": ("llama", {}, (512, 256), (4, 4), [(2, 512), (2, 256)]),
    "padded": ("mistral", {}, (300, 40), (2, 3), [(4, 512), (2, 256)]),  # 3 groups do not divide 8 heads
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, (300, 40), (1, 4), [(8, 512), (2, 256)]),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, (512, 100), (4, 1), [(2, 512), (8, 256)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_has_the_sizes_of_the_layers(case, tmp_path):
    model_type, fields, ffn, groups, expected = CASES[case]
    small = model(model_type, ffn, groups, **fields)
    for _ in range(2):  # the second time in place of the first
        cost = export_nemotron_nas(small, tmp_path / "out", tokenizer(), overwrite=True, pad=True)
    assert blocks(tmp_path / "out") == expected
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    widths = [tensors[f"model.layers.{layer}.mlp.up_proj.weight"].shape[0] for layer in (0, 1)]
    assert widths == [width for _, width in expected]
    assert cost.after - cost.before == sum(map(torch.numel, tensors.values())) - small.num_parameters()
    assert (cost.after == cost.before) == (case == "differing")
    assert (tmp_path / "out" / "configuration_nemotron_nas.py").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve out --trust-remote-code" in card and "from_pretrained" not in card
    assert not (tmp_path / "out" / "modeling_structprune.py").exists()


@pytest.mark.parametrize(("fields", "words"), [
    ({"ffn": (512, 300)}, "Layer 1 has 300 FFN channels .*.256 or 512.*--pad"),
    ({"groups": (3, 4)}, "Layer 0 .* 6 query heads in 3 KV groups.*and 8 query heads .in 4"),
    ({"model_type": "qwen3"}, "llama, mistral, qwen2 models are; the layers of this qwen3"),
    ({"hidden_act": "gelu", "groups": (4, 4)}, "hidden_act=silu only, found gelu"),
    ({"head_dim": 8, "groups": (4, 4)}, "has 32 / 8 query heads, and layer 0 has 8"),
])  # fmt: skip
def test_what_the_form_cannot_say_is_refused(fields, words, tmp_path):
    with pytest.raises(StructPruneError, match=words):
        export_nemotron_nas(model(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()
