"""A model with different widths by layer is padded to one width for all layers."""

import pytest
import torch
from helpers import logits
from models import build, config, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import Manifest, Plan, StructPruneConfig, StructPruner, export_uniform
from optimum_structprune.record.report import Report
from optimum_structprune.system.errors import StructPruneError


@pytest.fixture(scope="module")
def pruner():
    """Return a pruner that has pruned a model to different widths by layer."""
    pruner = StructPruner(config(widths={"mlp": [20, 30], "attention": [4, 2]}))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    assert model.config.is_heterogeneous
    return pruner


@pytest.fixture
def folder(pruner, tmp_path):
    """Save the pruned model and return its folder."""
    pruner.save(pruner.result.model, tmp_path / "pruned", tokenizer=tokenizer())
    return tmp_path / "pruned"


def test_the_records_of_the_pruning_are_exported(pruner, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    recovery_files = ("recovery_config.json", "recovery_report.json")
    for name in recovery_files:
        (folder / name).write_text("{}")
    with pytest.raises(StructPruneError, match="pruned overlaps with .*pruned, which this run"):
        export_uniform(model, folder, overwrite=True)

    out = tmp_path / "out"
    padding = export_uniform(model, out)
    assert padding.original == pruner.result.report.original.parameters
    added = padding.after - padding.before
    share = added / (padding.original - padding.before)
    assert f"adds {added:,} zero parameters" in str(padding)
    assert f"{share:.1%} of the parameters that pruning had removed" in str(padding)

    assert all((out / name).is_file() for name in recovery_files)
    assert Plan.load(out / "pruning_plan.json") == pruner.result.plan
    assert Manifest.load(out) == pruner.result.manifest
    assert StructPruneConfig.from_pretrained(out).widths == pruner.config.widths
    report = Report.load(out / "report.json")
    assert report.pruned.parameters == padding.before == model.num_parameters()

    padded = AutoModelForCausalLM.from_pretrained(out)
    assert not padded.config.is_heterogeneous
    assert padded.num_parameters() == padding.after
    torch.testing.assert_close(logits(padded), logits(model), atol=1e-5, rtol=0)
    assert not (out / "modeling_structprune.py").exists()

    with pytest.raises(StructPruneError, match="same width already"):
        export_uniform(padded, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_an_export_can_be_replaced_without_records_or_with_records_of_another_program(pruner, folder, tmp_path):
    out = tmp_path / "out"
    saved_model = AutoModelForCausalLM.from_pretrained(folder)
    for text in ("{}", '{"parameters": 5}', '{"parameters": {"before": "many"}}', "[]", "no JSON"):
        (folder / "report.json").write_text(text)
        padding = export_uniform(saved_model, out, overwrite=True)
        assert padding.original is None
        assert "pruning had removed" not in str(padding)

    unsaved_model = pruner.result.model
    for _ in range(2):
        padding = export_uniform(unsaved_model, out, overwrite=True)
        assert padding.original is None
    assert not (out / "report.json").exists()
