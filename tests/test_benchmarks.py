"""What we measure with: every script says its usage, and runs small.

The figures of the scripts are checked; what they measure is the docs' affair.
"""

import json
import re
import sys
from importlib import import_module
from math import log
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from models import real_text_model
from trained import SHARED, needs_shared
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import StructPruneError


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "benchmarks").glob("*.py"))
SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


TINY, DATA = str(SHARED / "models" / "stories260K"), SHARED / "data"


def main(name: str):
    """The `main` of a script."""
    return import_module(name).main


def rows_of(table: str) -> list[list[str]]:
    """The cells of the lines of a Markdown table."""
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_how_to_call_it(path, capsys):
    if path.stem not in ("llama_cpp", "benchmark_peers_worker"):  # others call these
        assert f"    python {path.relative_to(ROOT)}" in path.read_text()
        with pytest.raises(SystemExit) as end:
            main(path.stem)(["--help"])
        assert not end.value.code and capsys.readouterr().out.startswith("usage: ")


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
    pictures = ROOT / "docs" / "pictures" / "quality.svg", tmp_path / "quality.svg"
    main("draw_quality")(["--output", str(pictures[1])])
    (texts, marks), (texts_now, marks_now) = (drawn(path.read_text()) for path in pictures)
    assert texts == texts_now and len(marks) > 20
    assert marks == pytest.approx(marks_now, abs=0.5), "python examples/benchmarks/draw_quality.py draws it anew"
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (tmp_path / "page.md").write_text(re.sub(r"\| (\d) \| 1\.", r"| \1 | 2.", page))
    main("draw_quality")(["--page", str(tmp_path / "page.md"), "--output", str(pictures[1])])
    other_texts, other_marks = drawn(pictures[1].read_text())
    assert other_texts != texts and other_marks != marks


@needs_shared
@pytest.mark.nightly
def test_benchmark_recovery(tmp_path):
    small = tmp_path / "out.json"
    model = [TINY, str(DATA), "--mlp", "96", "--seq-length", "128", "--eval-samples", "2", "--json", str(small)]
    flags = "--domains stories --tokens 2000 4000 --learning-rate 2e-3 --bf16"
    main("benchmark_recovery")([*model, *flags.split()])
    rows = json.loads(small.read_text())
    curves = [f"{way}, {tokens} tokens" for way in ("LoRA", "distilled") for tokens in ("2,048", "3,968")]
    assert [*rows] == ["dense", "pruned", *curves]
    for way in ("LoRA", "distilled"):
        half, whole = (rows[f"{way}, {tokens} tokens"] for tokens in ("2,048", "3,968"))
        assert whole["heldout"] < half["heldout"] < rows["pruned"]["heldout"] and half["seconds"] < whole["seconds"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.nightly
def test_benchmark_scale(tmp_path, capsys):
    small = "--shape tiny --layers 2 --domains 2 --tokens 512 --seq-length 64"
    main("benchmark_scale")([str(tmp_path / "tiny"), *small.split()])
    shown = capsys.readouterr().out
    assert shown.startswith("tiny, 2 of 4 layers")
    assert [row[:2] for row in rows_of(shown)[1:]] == [["in memory", "2"], ["on the disk", "2"]]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").config.num_hidden_layers == 2


@needs_shared
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.nightly
def test_benchmark_cost(capsys):
    flags = "--width mlp=96 --seq-length 64 --clock cpu --num-samples 6 12 --layers 2 --domains 1 3"
    main("benchmark_cost")([TINY, *flags.split()])
    shown = capsys.readouterr().out
    rows = [row[:4] for row in rows_of(shown) if "layers" not in row]
    assert rows == [[f"{n}", f"{64 * n}", "2", k] for n in (6, 12) for k in "13"]
    assert "seconds = layers x " in shown


@needs_shared
@pytest.mark.nightly
def test_benchmark_domains(tmp_path, capsys):
    run, out, other = main("benchmark_domains"), tmp_path / "grid.json", tmp_path / "other.json"
    flags = "--domains stories --removed 50 --seeds 0 1 --samples 4 --eval-samples 1".split()
    arguments = ["run", TINY, str(DATA), str(out), *flags]
    run([*arguments, "--cells", "mix, one-shot, wanda", "mix, *shot, wanda + refit"])
    first = json.loads(out.read_text())
    assert [(row["cell"], row["width"], row["seed"]) for row in first["runs"]] == [
        (f"mix, one-shot, wanda{refit}", 88, seed) for seed in (0, 1) for refit in ("", " + refit")
    ]
    assert first["runs"][1]["perplexity"]["stories"] < first["runs"][0]["perplexity"]["stories"]
    run([*arguments, "--cells", "mix, one-shot, wanda", "mix, one-shot, obs by search_uniform + refit"])
    again = json.loads(out.read_text())["runs"]
    assert again[:4] == first["runs"] and len(again) == 6, "what is there is not run again"
    capsys.readouterr()
    run(["table", str(out)])
    ratios = [row["perplexity"]["stories"] / first["dense"]["perplexity"]["stories"] for row in first["runs"][1::2]]
    mean, apart = sum(ratios) / 2, abs(ratios[0] - ratios[1]) / 2**0.5
    rows = [row[:3] for row in rows_of(capsys.readouterr().out)]
    assert ["mix, one-shot, wanda + refit", "2", f"{mean:.3f} ± {apart:.3f}"] in rows
    other.write_text(json.dumps({**first, "setting": {**first["setting"], "samples": 5}}))
    with pytest.raises(StructPruneError, match="different settings: samples"):
        run(["table", str(out), str(other)])
    with pytest.raises(StructPruneError, match="other settings: samples"):
        run([*arguments, "--samples", "5"])


def few_documents(folder: Path, kinds: list[str]) -> Path:
    """A folder of data with the first documents of a few kinds of text."""
    (folder / "calibration").mkdir(parents=True)
    for kind in kinds:
        lines = (DATA / "calibration" / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        (folder / "calibration" / f"{kind}.jsonl").write_text("".join(lines[:80]))
    return folder


@needs_shared
@pytest.mark.nightly
def test_benchmark_domains_leaves_one_kind_out(tmp_path, capsys):
    run, out, kinds = main("benchmark_domains"), tmp_path / "left.json", ["stories", "math", "web"]
    flags = "--leave-one-out --removed 50 --seeds 0 --samples 6 --seq-length 64 --eval-samples 2 --domains"
    data = few_documents(tmp_path / "kinds", kinds)
    cells = ["mix, one-shot, obs + refit", "mix + a fifth general, one-shot, obs + refit", "web only, one-shot, wanda"]
    run(["run", TINY, str(data), str(out), *flags.split(), *kinds, "--cells", *cells])
    rows = [(row["cell"], row["left_out"]) for row in json.loads(out.read_text())["runs"]]
    assert {*rows} == {(cell, kind) for cell in cells for kind in kinds} - {(cells[2], "web")}
    capsys.readouterr()
    run(["table", str(out)])
    head, _, *rows = rows_of(capsys.readouterr().out)
    assert head[:4] == ["cell", "runs", "left out", "of the reference's"]
    assert {row[0]: row[1] for row in rows} == dict(zip(cells, "332", strict=True))


@needs_shared
@pytest.mark.nightly
def test_train_tiny(tmp_path):
    data, out = few_documents(tmp_path / "few", ["stories"]), tmp_path / "tiny"
    small = "--tokens 5120 --vocabulary 400 --seq-length 64 --batch-size 4"
    main("train_tiny")([str(data), str(out), *small.split()])
    model, reader = (kind.from_pretrained(out) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(reader) == 400
    text = json.loads((data / "calibration" / "stories.jsonl").read_text().splitlines()[0])["text"]
    assert reader.decode(reader(text)["input_ids"]) == text
    ids = reader(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < 0.98 * log(400)  # twenty steps have taught it something


@needs_shared
@pytest.mark.nightly
def test_benchmark_tasks(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    run, out, quiz = main("benchmark_tasks"), tmp_path / "answers", tmp_path / "one.jsonl"
    items = ({"query": f"Tom has {i} big", "choices": ["dogs", "and red"], "gold": i % 2} for i in range(4))
    quiz.write_text("\n".join(map(json.dumps, items)))
    flags = f"--domains stories --removed 50 --samples 4 --recovery-tokens 2048 --tasks {quiz}"
    arguments = ["run", TINY, str(DATA), str(out), *flags.split()]
    run([*arguments, "--cells", "mix"])
    first = {path: path.read_bytes() for path in out.rglob("*.json*")}
    run([*arguments, "--cells", "mix", "mix + recovery", "stories only"])
    assert all(path.read_bytes() == content for path, content in first.items())
    kept = json.loads((out / "mix, 50 %.json").read_text())
    assert kept["items"]["one"].keys() == {"acc", "acc_norm"} and len(kept["items"]["one"]["acc"]) == 4
    capsys.readouterr()
    run(["table", str(out), "--metric", "acc"])
    rows = {row[0]: row[1:] for row in rows_of(capsys.readouterr().out)}
    assert rows["mix"][0].startswith(f"{kept['scores']['one']['acc']:.3f} ± ") and "mix + recovery" in rows


@pytest.mark.nightly
def test_benchmark_speed(tmp_path, capsys):
    for saved in real_text_model():
        saved.save_pretrained(tmp_path / "model")
    small = f"--widths 24 16 --prompts 8 --new-tokens 2 --repeats 1 --json {tmp_path / 'speed.json'}"
    main("benchmark_speed")([str(tmp_path / "model"), *small.split()])
    models = json.loads((tmp_path / "speed.json").read_text())["models"]
    assert models["mlp=24"]["parameters"] - models["mlp=16"]["parameters"] == 2 * 3 * 32 * 8
    assert "mlp=16" in capsys.readouterr().out


@pytest.mark.nightly
def test_benchmark_gpu(tmp_path, capsys):
    assert main("benchmark_gpu")(["--device", "cpu", "--tiny", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in ("float32: cpu against the CPU | 0.0% other units", "--offload disk", "TFLOP/s", "(ideal "):
        assert words in shown
    assert not list(tmp_path.iterdir())


@needs_shared
@pytest.mark.nightly
def test_benchmark_peers(tmp_path, capsys, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    run, out = main("benchmark_peers"), tmp_path / "peers.json"
    arguments = [TINY, str(DATA), str(out), *"--domains stories --samples 4 --eval-samples 1".split()]
    names = ["dense", "optimum-structprune, defaults", "optipfair, L2"]
    run([*arguments, "--list"])
    assert {*names} <= {*capsys.readouterr().out.splitlines()}
    run([*arguments, "--rows", "dense", "*, defaults", "optipfair, L2"])
    rows = json.loads(out.read_text())["rows"]
    dense, ours, failed = rows.values()
    assert [*rows] == names and set(ours["widths"]) == {112} and ours["parameters"] < dense["parameters"]
    assert ours["reloads"] == "yes" and ours["perplexity"]["stories"] > dense["perplexity"]["stories"]
    assert failed["error"].startswith("not installed: ERROR: ") and ours["cpu_seconds"] > 0
    run([*arguments, "--rows", "dense"])
    assert json.loads(out.read_text())["rows"] == rows
    with pytest.raises(StructPruneError, match="other settings: samples"):
        run([*arguments, "--samples", "5"])
