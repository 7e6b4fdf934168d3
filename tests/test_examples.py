"""Every example runs, on a tiny model, and leaves a checkpoint that loads plainly."""

import json
import sys
from importlib import util
from pathlib import Path

import pytest
from models import real_text_model
from trained import SHARED, needs_shared
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError
from optimum_structprune.calibration.builtin import builtin_documents


EXAMPLES = Path(__file__).parents[1] / "examples"


def main(name: str):
    """The `main` of an example."""
    spec = util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def width(folder) -> int:
    return AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    for saved in real_text_model():
        saved.save_pretrained(folder / "model")
    lines = (json.dumps({"text": text}) for _, text in zip(range(400), builtin_documents("math", 7), strict=False))
    (folder / "notes.jsonl").write_text("\n".join(lines))
    return folder


def test_prune_with_flags(desk, capsys):
    arguments = ["--model", str(desk / "model"), "--output", str(desk / "flags"), "--sparsity", "0.3"]
    more = {"num_samples": 6, "seq_length": 64, "targets": ["mlp"]}
    domains = ["--domains", "prose=builtin:prose", f"notes={desk / 'notes.jsonl'}"]
    main("prune")([*arguments, *domains, "--pruning", json.dumps(more)])
    assert width(desk / "flags") < 1536 and "perplexity notes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_prune_with_a_file(desk, kind):
    fields = {"num_samples": 6, "seq_length": 64, "widths": {"mlp": 1024}}
    values = {"model": str(desk / "model"), "output": str(desk / kind), "pruning": fields}
    (desk / f"run.{kind}").write_text(json.dumps(values))  # YAML reads JSON too
    main("prune")([str(desk / f"run.{kind}")])
    assert width(desk / kind) == 1024


def test_prune_and_recover(desk, capsys):
    out, small = desk / "recovered", ["--every-round", "--num-samples", "6"]
    main("prune_and_recover")([str(desk / "model"), str(out), "--tokens", "3100", "--rounds", "2", *small])
    assert width(out) < 1536 and "recovered" in capsys.readouterr().out


def test_trainer_callback(desk, capsys):
    main("trainer_callback")([str(desk / "model"), str(desk / "tuned"), "--steps", "20"])
    assert f"FFN width {width(desk / 'tuned')}" in capsys.readouterr().out
    assert width(desk / "tuned") == width(desk / "tuned" / "checkpoint-10") < 1536
    assert width(desk / "tuned") <= width(desk / "tuned" / "checkpoint-5") < 1536
    arguments = [str(desk / "model"), str(desk / "tuned"), "--steps", "24", "--resume"]
    main("trainer_callback")([*arguments, "--text", str(desk / "notes.jsonl")])
    assert width(desk / "tuned" / "checkpoint-24") == width(desk / "tuned")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, about old names of arguments
def test_sft_trl(desk):
    pytest.importorskip("trl", reason="trl is not installed")
    main("sft_trl")([str(desk / "model"), str(desk / "sft"), "--steps", "10"])
    assert width(desk / "sft") < 1536


@needs_shared
def test_benchmark_recovery(desk, capsys):
    arguments = [str(SHARED / "models" / "stories260K"), str(SHARED / "data"), "--mlp", "96", "--domains", "stories"]
    small = ["--tokens", "4000", "--seq-length", "128", "--eval-blocks", "2", "--learning-rate", "2e-3"]
    main("benchmark_recovery")([*arguments, *small, "--json", str(desk / "out.json")])
    rows = json.loads((desk / "out.json").read_text())
    assert [*rows] == ["dense", "pruned", "LoRA, 3,968 tokens", "distilled, 3,968 tokens"]
    assert rows["distilled, 3,968 tokens"]["heldout"] < rows["pruned"]["heldout"]
    assert capsys.readouterr().out.count("\n| ") == 5


@needs_shared
def test_benchmark_domains(desk, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(EXAMPLES)
    out = desk / "grid.json"
    arguments = ["run", str(SHARED / "models" / "stories260K"), str(SHARED / "data"), str(out), "--domains", "stories"]
    small = ["--removed", "50", "--seeds", "0", "1", "--samples", "4", "--eval-blocks", "1", "--tasks", "--limit", "2"]
    run = main("benchmark_domains")
    run([*arguments, *small, "--cells", "mix, one-shot, wanda", "mix, *shot, wanda + refit"])
    first = json.loads(out.read_text())
    assert [(row["cell"], row["width"], row["seed"]) for row in first["runs"]] == [
        (f"mix, one-shot, wanda{refit}", 88, seed) for seed in (0, 1) for refit in ("", " + refit")
    ]
    assert first["runs"][1]["perplexity"]["stories"] < first["runs"][0]["perplexity"]["stories"]
    capsys.readouterr()
    run([*arguments, *small, "--cells", "mix, one-shot, wanda", "mix, one-shot, flap + bias"])
    again = json.loads(out.read_text())
    assert again["runs"][:4] == first["runs"] and capsys.readouterr().out.count("\n") == 2
    run(["table", str(out)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| mix")]
    assert len(rows) == 3 and rows[0][0] == "| mix, one-shot, wanda + refit"
    ratios = [row["perplexity"]["stories"] / first["dense"]["perplexity"]["stories"] for row in first["runs"][1::2]]
    mean, apart = sum(ratios) / 2, abs(ratios[0] - ratios[1]) / 2**0.5
    assert rows[0][1:3] == ["2", f"{mean:.3f} ± {apart:.3f}"]
    with pytest.raises(StructPruneError, match="other settings: samples"):
        run([*arguments, *small, "--samples", "5"])


def test_every_example_says_how_to_call_it():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert f"    python examples/{path.name}" in text or "make " in text, path.name
