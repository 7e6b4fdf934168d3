"""Every example runs, on a tiny model, and leaves a checkpoint that loads plainly."""

import csv
import json
import os
import re
import subprocess
import sys
from importlib import util
from math import log
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from models import PLAIN, real_text_model
from safetensors.torch import load_file
from trained import SHARED, needs_shared
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from optimum_structprune import StructPruneError
from optimum_structprune.domains.builtin import builtin_documents


EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def main(name: str):
    """The `main` of an example."""
    (path,) = EXAMPLES.rglob(f"{name}.py")
    spec = util.spec_from_file_location(f"example_{name}", path)
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


def test_set_aside_divides_every_file(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "calibration").mkdir(parents=True)
    documents = {name: [f"{name} {number}\n" for number in range(10)] for name in ("wiki", "web")}
    for name, lines in documents.items():
        (data / "calibration" / f"{name}.jsonl").write_text("".join(lines))
    main("set_aside")([str(data), str(out), "--domains", "wiki"])
    for name, folder in (("wiki", "heldout"), ("web", "unseen")):
        used, aside = ((out / at / f"{name}.jsonl").read_text().splitlines(True) for at in ("calibration", folder))
        assert len(used) == 8 and sorted(used + aside) == sorted(documents[name])
    assert not (out / "unseen" / "wiki.jsonl").exists() and not (out / "heldout" / "web.jsonl").exists()


def drawn(svg: str) -> tuple[list[str], list[float]]:
    """The texts of a picture, and the coordinates of what stands for its data."""
    root = ElementTree.fromstring(svg)
    groups = (group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith(("curve ", "bar ")))
    paths = "".join(path.get("d", "") for group in groups for path in group.iter(f"{SVG}path"))
    return [text.text for text in root.iter(f"{SVG}text")], [float(number) for number in NUMBER.findall(paths)]


def test_the_picture_of_the_readme_is_that_of_the_figures_in_the_docs(tmp_path):
    pictures = EXAMPLES.parent / "docs" / "pictures" / "quality.svg", tmp_path / "quality.svg"
    main("draw_quality")(["--output", str(pictures[1])])
    (texts, marks), (texts_now, marks_now) = (drawn(path.read_text()) for path in pictures)
    assert texts == texts_now and len(marks) > 20
    assert marks == pytest.approx(marks_now, abs=0.5), "python examples/benchmarks/draw_quality.py draws it anew"
    page = (EXAMPLES.parent / "docs" / "benchmarks.md").read_text()
    (tmp_path / "page.md").write_text(re.sub(r"\| (\d) \| 1\.", r"| \1 | 2.", page))
    main("draw_quality")(["--page", str(tmp_path / "page.md"), "--output", str(pictures[1])])
    other_texts, other_marks = drawn(pictures[1].read_text())
    assert other_texts != texts and other_marks != marks


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
    main("prune_and_recover")([str(desk / "model"), str(out), "--tokens", "6144", "--rounds", "2", *small])
    assert width(out) < 1536 and "recovered" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bert(desk):
    """A tiny random BERT with a head for two labels, which is one label too few."""
    tokenizer = AutoTokenizer.from_pretrained(desk / "model")
    torch.manual_seed(0)
    fields = {**PLAIN, "vocab_size": len(tokenizer), "intermediate_size": 256, "max_position_embeddings": 64}
    for saved in (AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **fields)), tokenizer):
        saved.save_pretrained(desk / "bert")
    return desk / "bert"


def accuracies(shown: str) -> dict[str, float]:
    lines = (line.partition(": accuracy ") for line in shown.splitlines() if ": accuracy " in line)
    return {name: float(rest.partition(",")[0]) for name, _, rest in lines}


@pytest.mark.parametrize("kind", [pytest.param(None, marks=pytest.mark.slow), "csv", "jsonl"])
def test_prune_bert_classifier(desk, bert, kind, capsys):
    out = desk / f"classifier-{kind}"
    flags = ["--model", str(bert), "--output", str(out), "--learning_rate", "5e-3", "--sparsity", "0.4"]
    small = ["--num_samples", "8", "--seq_length", "48"]
    if kind is not None:
        rows = [(text, kind) for kind in ("code", "math") for _, text in zip(range(60), builtin_documents(kind))]  # noqa: B905
        with open(desk / f"labelled.{kind}", "w", newline="") as file:
            if kind == "csv":
                csv.writer(file).writerows([("text", "label"), *rows])
            else:
                file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        flags += ["--data", str(desk / f"labelled.{kind}")]
    main("prune_bert_classifier")([*flags, *small])
    shown = accuracies(capsys.readouterr().out)
    chance = 1 / (3 if kind is None else 2)
    assert [*shown] == ["dense", "pruned", "fine-tuned again"] and min(shown.values()) > 1.3 * chance
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    assert pruned.config.intermediate_size == 128 and pruned.config.label2id["math"] == 1
    if kind == "csv":  # a classifier as it is: nothing is trained, and the dense accuracy is the one of before
        again = ["--model", str(out), "--output", str(desk / "again"), "--epochs", "0", "--epochs_after", "0"]
        main("prune_bert_classifier")([*again, *flags[-2:], *small])
        later = accuracies(capsys.readouterr().out)
        assert [*later] == ["dense", "pruned"] and later["dense"] == shown["fine-tuned again"]


def launch(desk, output: str, processes: int, batch_size: int) -> subprocess.CompletedProcess:
    """Run distributed.sh on this machine's CPU."""
    command = ["bash", str(EXAMPLES / "distributed.sh"), str(desk / "model"), str(desk / output)]
    flags = ["--tokens", "4100", "--num-samples", "6", "--batch-size", str(batch_size)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PROCESSES": str(processes), "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_the_script_for_several_processes_is_bash():
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "distributed.sh")]).returncode == 0
    bare = subprocess.run(["bash", str(EXAMPLES / "distributed.sh")], capture_output=True, text=True)
    assert bare.returncode == 2 and bare.stderr.startswith("usage: bash examples/distributed.sh MODEL OUTPUT")


@pytest.mark.slow
def test_several_processes_train_what_one_does(desk):
    one, two = launch(desk, "one", 1, 2), launch(desk, "two", 2, 1)
    for done in (one, two):
        assert "recovery: 4,096 tokens, 4 steps" in done.stdout and done.stdout.count("recovery:") == 1
    alone, shared = (load_file(desk / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


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
    small = ["--tokens", "2000", "4000", "--seq-length", "128", "--eval-samples", "2", "--learning-rate", "2e-3"]
    main("benchmark_recovery")([*arguments, *small, "--bf16", "--json", str(desk / "out.json")])
    rows = json.loads((desk / "out.json").read_text())
    curves = [f"{way}, {tokens} tokens" for way in ("LoRA", "distilled") for tokens in ("2,048", "3,968")]
    assert [*rows] == ["dense", "pruned", *curves]
    for way in ("LoRA", "distilled"):
        half, whole = (rows[f"{way}, {tokens} tokens"] for tokens in ("2,048", "3,968"))
        assert whole["heldout"] < half["heldout"] < rows["pruned"]["heldout"] and half["seconds"] < whole["seconds"]
    assert capsys.readouterr().out.count("\n| ") == 7
    left = ["--domains", "stories", "math", "--left-out", "stories", "--samples", "4", "--seq-length", "128"]
    main("benchmark_recovery")(
        [*arguments[:4], *left, "--tokens", "1024", "--eval-samples", "2", "--ways", "distilled, scales"]
    )
    out = capsys.readouterr().out
    assert (
        "| row | unseen | unseen closed | stories | seconds |" in out
        and "\n| distilled, scales, 1,024 tokens |" in out
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_benchmark_scale(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    small = ["--shape", "tiny", "--layers", "2", "--domains", "2", "--tokens", "512", "--seq-length", "64"]
    main("benchmark_scale")([str(tmp_path / "tiny"), *small])
    head, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny, 2 of 4 layers")
    assert [row.split(" | ")[:2] for row in rows] == [["| in memory", "2"], ["| on the disk", "2"]]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").config.num_hidden_layers == 2


@needs_shared
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_benchmark_cost(capsys):
    model = str(SHARED / "models" / "stories260K")
    numbers = ["--num-samples", "6", "12", "--layers", "2", "--domains", "1", "3"]
    main("benchmark_cost")([model, "--width", "mlp=96", "--seq-length", "64", "--clock", "cpu", *numbers])
    shown = capsys.readouterr().out
    rows = [line.split(" | ")[:4] for line in shown.splitlines() if line.startswith("| ") and "layers" not in line]
    assert rows == [[f"| {n}", f"{64 * n}", "2", k] for n in (6, 12) for k in "13"]
    assert "seconds = layers x " in shown


@needs_shared
def test_benchmark_domains(desk, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(BENCHMARKS)
    out = desk / "grid.json"
    arguments = ["run", str(SHARED / "models" / "stories260K"), str(SHARED / "data"), str(out), "--domains", "stories"]
    small = [
        "--removed",
        "50",
        "--seeds",
        "0",
        "1",
        "--samples",
        "4",
        "--eval-samples",
        "1",
        "--tasks",
        "--limit",
        "2",
    ]
    run = main("benchmark_domains")
    run([*arguments, *small, "--cells", "mix, one-shot, wanda", "mix, *shot, wanda + refit"])
    first = json.loads(out.read_text())
    assert [(row["cell"], row["width"], row["seed"]) for row in first["runs"]] == [
        (f"mix, one-shot, wanda{refit}", 88, seed) for seed in (0, 1) for refit in ("", " + refit")
    ]
    assert first["runs"][1]["perplexity"]["stories"] < first["runs"][0]["perplexity"]["stories"]
    capsys.readouterr()
    every_space = "mix, one-shot, obs by search_uniform + refit"
    run([*arguments, *small, "--cells", "mix, one-shot, wanda", "mix, one-shot, flap + bias", every_space])
    again = json.loads(out.read_text())
    assert again["runs"][:4] == first["runs"] and capsys.readouterr().out.count("\n") == 4
    one_width = first["runs"][0]["parameters"]
    shapes = [row["parameters"] for row in again["runs"] if row["cell"] == every_space]
    assert all(0.9 * one_width < parameters <= one_width for parameters in shapes)
    run(["table", str(out)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| mix")]
    assert len(rows) == 4 and rows[0][0] == "| mix, one-shot, wanda + refit"
    ratios = [row["perplexity"]["stories"] / first["dense"]["perplexity"]["stories"] for row in first["runs"][1::2]]
    mean, apart = sum(ratios) / 2, abs(ratios[0] - ratios[1]) / 2**0.5
    assert rows[0][1:3] == ["2", f"{mean:.3f} ± {apart:.3f}"]
    run(["table", str(out), str(out)])
    assert "| mix, one-shot, wanda + refit | 4 | " in capsys.readouterr().out
    other = desk / "other.json"
    other.write_text(json.dumps({**first, "setting": {**first["setting"], "samples": 5}}))
    with pytest.raises(StructPruneError, match="different settings: samples"):
        run(["table", str(out), str(other)])
    with pytest.raises(StructPruneError, match="other settings: samples"):
        run([*arguments, *small, "--samples", "5"])


@needs_shared
def test_benchmark_domains_leaves_one_kind_out(desk, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    data, out = desk / "kinds", desk / "left.json"
    (data / "calibration").mkdir(parents=True)
    kinds = ("stories", "math", "web")
    for kind in kinds:
        lines = (SHARED / "data" / "calibration" / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        (data / "calibration" / f"{kind}.jsonl").write_text("".join(lines[:80]))
    arguments = ["run", str(SHARED / "models" / "stories260K"), str(data), str(out), "--leave-one-out"]
    small = ["--removed", "50", "--seeds", "0", "--samples", "6", "--seq-length", "64", "--eval-samples", "2"]
    run = main("benchmark_domains")
    cells = ["mix, one-shot, obs + refit", "mix + a fifth broad, one-shot, obs + refit", "web only, one-shot, wanda"]
    run([*arguments, *small, "--domains", *kinds, "--cells", *cells[:2]])
    first = json.loads(out.read_text())["runs"]
    assert [(row["cell"], row["left_out"]) for row in first] == [(cell, kind) for cell in cells[:2] for kind in kinds]
    run([*arguments, *small, "--domains", *kinds, "--cells", *cells])
    again = json.loads(out.read_text())["runs"]
    assert again[:6] == first and [row["left_out"] for row in again[6:]] == ["stories", "math"]
    capsys.readouterr()
    run(["table", str(out)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0][:4] == ["cell", "runs", "left out", "of the reference's"]
    table = {row[0]: row for row in rows[2:]}
    assert {cell: table[cell][1] for cell in cells} == dict(zip(cells, "332", strict=True))
    assert table[cells[0]][3] == "1.000 ± 0.000"


@needs_shared
def test_train_tiny(desk, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    data, out = desk / "few", desk / "tiny"
    (data / "calibration").mkdir(parents=True)
    lines = (SHARED / "data" / "calibration" / "stories.jsonl").read_text().splitlines(keepends=True)
    (data / "calibration" / "stories.jsonl").write_text("".join(lines[:60]))
    small = ["--vocabulary", "400", "--seq-length", "64", "--batch-size", "4"]
    main("train_tiny")([str(data), str(out), "--tokens", "5120", *small])
    model, reader = (kind.from_pretrained(out) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(reader) == 400
    text = "Once upon a time there was a little girl."
    assert reader.decode(reader(text)["input_ids"]) == text
    ids = torch.tensor(reader("".join(json.loads(line)["text"] for line in lines[:3]))["input_ids"])[None, :256]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < 0.98 * log(400)  # twenty steps have taught it something


@needs_shared
def test_benchmark_tasks(desk, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(BENCHMARKS)
    out, quizzes = desk / "answers", []
    for name in ("one", "two"):
        quizzes.append(desk / f"{name}.jsonl")
        items = ({"query": f"Tom has {i} big", "choices": ["dogs", "and red"], "gold": i % 2} for i in range(4))
        quizzes[-1].write_text("\n".join(map(json.dumps, items)))
    arguments = ["run", str(SHARED / "models" / "stories260K"), str(SHARED / "data"), str(out), "--domains", "stories"]
    small = ["--removed", "50", "--samples", "4", "--recovery-tokens", "2048", "--tasks", *map(str, quizzes)]
    run = main("benchmark_tasks")
    run([*arguments, *small, "--cells", "mix"])
    first = {path: path.read_bytes() for path in out.rglob("*.json*")}
    run([*arguments, *small, "--cells", "mix", "mix + recovery", "stories only"])
    assert all(path.read_bytes() == content for path, content in first.items())
    kept = json.loads((out / "mix, 50 %.json").read_text())
    assert kept["items"]["two"].keys() == {"acc", "acc_norm"} and len(kept["items"]["two"]["acc"]) == 4
    assert "mix + recovery, 50 %.json" in {path.name for path in out.iterdir()}
    # The mix of one domain is that domain, so the two share their answers.
    assert len(list((out / "items").iterdir())) == len(list(out.glob("*%.json")))
    capsys.readouterr()
    run(["table", str(out), "--metric", "acc"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    by_name = {row[0]: row[1:] for row in rows}
    mean = kept["scores"]["one"]["acc"]
    assert by_name["| mix"][0].startswith(f"{mean:.3f} ± ") and len(rows) == 3 + len(list(out.glob("*%.json")))
    assert by_name["| stories only"][5:7] == ["+0.000 ± 0.000", "1.0000"]
    with pytest.raises(StructPruneError, match="other settings: samples"):
        run([*arguments, *small, "--samples", "5"])


def test_benchmark_speed(desk, capsys):
    small = ["--widths", "24", "16", "--prompts", "8", "--new-tokens", "2", "--repeats", "1"]
    main("benchmark_speed")([str(desk / "model"), *small, "--json", str(desk / "speed.json")])
    models = json.loads((desk / "speed.json").read_text())["models"]
    assert models["mlp=24"]["parameters"] - models["mlp=16"]["parameters"] == 2 * 3 * 32 * 8
    assert "mlp=16" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_gpu(tmp_path, capsys):
    assert main("benchmark_gpu")(["--device", "cpu", "--tiny", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in ("float32: cpu against the CPU | 0.0% other units", "--offload disk", "TFLOP/s", "(ideal "):
        assert words in shown
    assert not list(tmp_path.iterdir())


def test_benchmark_peers_names_its_rows_and_says_what_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    arguments = [str(tmp_path), str(tmp_path / "data"), str(tmp_path / "out.json")]
    main("benchmark_peers")([*arguments, "--list"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[:2] == ["dense", "optimum-structprune, defaults"] and any(row.startswith("optipfair") for row in rows)
    main("benchmark_peers")(arguments)
    assert capsys.readouterr().out.startswith("skipped: ") and not (tmp_path / "out.json").exists()


@needs_shared
@pytest.mark.slow
def test_benchmark_peers(desk, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    out = desk / "peers.json"
    arguments = [str(SHARED / "models" / "stories260K"), str(SHARED / "data"), str(out), "--domains", "stories"]
    small = ["--samples", "4", "--eval-samples", "1"]
    run = main("benchmark_peers")
    run([*arguments, *small, "--rows", "dense", "*, defaults", "optipfair, L2"])
    rows = json.loads(out.read_text())["rows"]
    assert [*rows] == ["dense", "optimum-structprune, defaults", "optipfair, L2"]
    dense, ours, failed = rows.values()
    assert ours["reloads"] == "yes" and set(ours["widths"]) == {112} and ours["parameters"] < dense["parameters"]
    assert ours["perplexity"]["stories"] > dense["perplexity"]["stories"] and ours["cpu_seconds"] > 0
    assert failed["error"].startswith("not installed: ERROR: ")
    assert capsys.readouterr().out.count("\n| ") == 4
    run([*arguments, *small, "--rows", "dense"])
    assert json.loads(out.read_text())["rows"] == rows
    with pytest.raises(StructPruneError, match="other settings: samples"):
        run([*arguments, "--samples", "5", "--eval-samples", "1"])


def test_every_example_says_how_to_call_it():
    for path in EXAMPLES.rglob("*.py"):
        text = path.read_text()
        assert f"    python {path.relative_to(EXAMPLES.parent)}" in text or "make " in text, path.name
