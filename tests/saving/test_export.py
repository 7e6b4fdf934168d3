"""A non-uniform model with one width for all layers."""

import pytest
import torch
from helpers import logits
from models import build, config, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import Manifest, Plan, StructPruneConfig, StructPruner, export_uniform
from optimum_structprune.errors import StructPruneError
from optimum_structprune.record.report import Report


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
    (pruner, _), (folder, model) = run, pruned
    for name in (of_training := ("recovery_config.json", "recovery_report.json")):
        (folder / name).write_text("{}")
    with pytest.raises(StructPruneError, match="pruned overlaps with .*pruned, which this run"):
        export_uniform(model, folder, overwrite=True)
    padding = export_uniform(model, tmp_path / "out")
    assert padding.dense == pruner.report.dense.parameters
    share = (padding.after - padding.before) / (padding.dense - padding.before)
    assert f"adds {padding.after - padding.before:,} zero parameters" in str(padding)
    assert f"{share:.1%} of the parameters that pruning had removed" in str(padding) and all(
        (tmp_path / "out" / name).is_file() for name in of_training
    )
    assert Plan.load(tmp_path / "out" / "pruning_plan.json") == pruner.plan
    assert Manifest.load(tmp_path / "out") == pruner.manifest
    assert StructPruneConfig.from_pretrained(tmp_path / "out").widths == pruner.config.widths
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.pruned.parameters == padding.before == model.num_parameters()
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
        assert padding.dense is None and "pruning had removed" not in str(padding)
    model = run[1]
    for _ in range(2):
        assert export_uniform(model, tmp_path / "out", overwrite=True).dense is None
    assert not (tmp_path / "out" / "report.json").exists()
