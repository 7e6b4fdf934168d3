"""The data type of a GGUF file is part of the search: shapes in several types compete after quantization."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from helpers import same_weights, save_with_tokenizer
from models import fewer_tokens, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneConfig, StructPruneError, dry_run, export_gguf, prune
from optimum_structprune.arch.load import describe
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.manifest import remember_text
from optimum_structprune.saving.file_size import bytes_by_type
from optimum_structprune.saving.gguf_file import rounded_to


MODEL, READER = real_text_model()
remember_text(MODEL, READER)


def any_type(limit, **fields):
    """Return a config with a limit on the file in any data type."""
    return fewer_tokens(**({"widths": None, "sparsity": None, "budget": {"file": limit}, "gguf": "auto"} | fields))


SIZES = bytes_by_type(any_type("300kB", targets=["mlp"]), describe(MODEL), MODEL)


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4_0"])
def test_a_rounded_model_computes_like_its_file(kind, tmp_path):
    original, _ = real_text_model()
    ids = torch.arange(3, 40)[None]
    export_gguf(MODEL, tmp_path / "out.gguf", READER, dtype=kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    with torch.no_grad():
        before = MODEL(ids).logits
        with rounded_to(MODEL, kind):
            rounded = MODEL(ids).logits
        expected = loaded(ids).logits

    assert (rounded - expected).abs().max() < 1e-4 < (rounded - before).abs().max()
    assert same_weights(MODEL, original)


def test_fewer_bits_win_if_the_loss_of_pruning_is_larger():
    """The random model hardly changes in fewer bits, and a trim of tokens costs a lot."""
    result = prune(MODEL, any_type(SIZES["q5_1"] - 2000, targets=["vocab"], round_to=1), READER)
    report = result.report

    assert SIZES[result.config.gguf] == report.file.predicted
    assert report.is_quantized_only
    assert same_weights(result.model, MODEL)
    assert {shape["proposed_by"] for shape in report.shapes} == {"Q5_0, the original model", "Q5_1, vocab"}
    losses = [shape["loss"] for shape in report.shapes if not shape["chosen"]]
    chosen = next(shape for shape in report.shapes if shape["chosen"])
    assert chosen["loss"] <= min(losses)
    assert "Quantized, not pruned: Q5_0, the original model" in str(report)
    assert "The best pruned shape is not better. Tried: Q" in str(report)


@pytest.mark.parametrize("targets", [["mlp"], ["vocab", "mlp"]], ids="-".join)
def test_a_limit_below_all_types_prunes_in_the_best_one(targets, tmp_path):
    limit = int(0.9 * min(SIZES.values()))
    result = prune(MODEL, any_type(limit, targets=targets), READER)
    assert not result.report.is_quantized_only
    assert result.config.gguf in ("q4_0", "q4_1")

    result.save(tmp_path / "small")
    file = export_gguf(result.model, tmp_path / "small.gguf", result.tokenizer, dtype=result.config.gguf)
    assert file.bytes == result.report.file.predicted
    assert 0.97 * limit <= file.bytes <= limit


def test_the_command_writes_the_chosen_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(MODEL, "model", READER)
    options = f"--budget file={SIZES['q4_1']}B --gguf auto --target mlp --device cpu --num-samples 8 --seq-length 32"

    assert main(["prune", "model", "small", *options.split(), "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    (path,) = Path().glob("small-Q*.gguf")
    assert values["gguf"]["output"] == str(path)

    report = json.loads(Path("small/report.json").read_text())
    size = path.stat().st_size
    assert report["file"] == values["file"] == {
        "asked": SIZES["q4_1"], "predicted": size, "measured": size, "type": path.stem.split("-")[1].lower()
    }  # fmt: skip
    assert gguf.GGUFReader(path).get_field("general.architecture").contents() == "llama"

    Path("other-Q5_0.gguf").touch()
    assert main(["prune", "model", "other", *options.split(), "--quiet"]) == 2
    assert "other-Q5_0.gguf exists" in capsys.readouterr().err


def test_the_original_model_may_meet_the_limit_in_the_largest_type():
    with pytest.raises(StructPruneError, match=r"met by the original model as q8_0, .* export .* --dtype q8_0"):
        prune(MODEL, any_type("9MB", targets=["mlp"]), READER)


def test_the_original_model_in_fewer_bits_is_advised_if_no_pruned_model_meets_the_limit():
    message = r"file=0.24 MB cannot be met: .* The original model meets it as q5_0, with 0.24 MB: .* --dtype q5_0"
    with pytest.raises(StructPruneError, match=message):
        prune(MODEL, any_type(SIZES["q5_0"], targets=["vocab"]), READER)


def test_a_dry_run_says_that_trials_choose_the_type():
    outcome = dry_run(MODEL.config, any_type(SIZES["q5_0"], targets=["mlp"]), tokenizer=READER)
    assert "trials choose the type of the file; these sizes are those of q5_1" in outcome.notes


def test_a_search_for_the_type_needs_the_size_of_a_file():
    for budget in ({"parameters": 0.9}, {"file": 0.9}):
        with pytest.raises(StructPruneError, match="is 'auto' only with the size of a file"):
            StructPruneConfig(budget=budget, gguf="auto")
