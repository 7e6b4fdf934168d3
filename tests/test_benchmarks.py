"""What we measure with: every script says its usage, and runs small."""

import json
import re
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from shlex import split
from xml.etree import ElementTree

import pytest
import yaml
from helpers import main_of, write_texts
from models import GROUPED, real_text_model
from trained import SHARED, needs_shared
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune.domains.sources import builtin_documents


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "benchmarks").glob("*.py"))
SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.mark.slow
def test_the_protocol_of_the_docs_measures_a_folder_against_the_original(tmp_path, capsys, monkeypatch):
    for part in real_text_model(1600, "prose"):
        part.save_pretrained(tmp_path / "model")
    figures = import_module("figures")
    monkeypatch.setattr(figures, "SAMPLES", 1)
    monkeypatch.setattr(figures, "SEQ_LENGTH", 32)
    monkeypatch.setattr(figures, "QUESTIONS", 1)
    names = [f"heldout/{name}" for name in figures.DOMAINS]
    texts = list(islice(builtin_documents("prose"), 12))
    for name in [*names, "unseen/letters"]:
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_texts(path, texts)

    model = str(tmp_path / "model")
    main_of("figures")(["measure", model, str(tmp_path), model, "--answers", "--speed"])
    row = json.loads(capsys.readouterr().out)
    assert row["parameters"] == 0 and row["heldout"] == row["unseen"] == 1
    assert row["heldout_kl"] == pytest.approx(0, abs=1e-6) and row["right"] == row["right_of_dense"]
    assert row["speedup"] > 0


@pytest.mark.slow
def test_pick_yours_measures_each_row_once(tmp_path, capsys, monkeypatch):
    for saved in real_text_model(1600, "prose"):
        saved.save_pretrained(tmp_path / "model")
    small = "--width mlp=1024 --text builtin:prose --general-share 0 --num-samples 4 --seq-length 32"
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--num-samples", "1", "--questions", "1"]
    main_of("pick_yours")([*command, "--other", "letters=builtin:letters", "--row", small])
    dense, row = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:])
    assert dense[1] == "the dense model" and row[1] == f"`{small}`" and " of " in row[5] and row[6].startswith("× ")
    for name in ("measured", "time_"):
        monkeypatch.setattr(f"pick_yours.{name}", lambda *rest: 1 / 0)
    main_of("pick_yours")([*command, "--row", small])
    assert capsys.readouterr().out.splitlines()[-1].split(" | ") == row


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_how_to_call_it(path, capsys):
    if path.stem not in ("llama_cpp", "benchmark_peers_worker", "quality"):  # others call these
        assert f"    python {path.relative_to(ROOT)}" in path.read_text()
        with pytest.raises(SystemExit) as end:
            main_of(path.stem)(["--help"])
        assert not end.value.code and capsys.readouterr().out.startswith("usage: ")


def drawn(svg: str) -> tuple[list[str], list[float]]:
    """The texts of a picture, and the coordinates of what stands for its data."""
    root = ElementTree.fromstring(svg)
    groups = (group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith(("curve ", "bar ")))
    paths = "".join(path.get("d", "") for group in groups for path in group.iter(f"{SVG}path"))
    return [text.text for text in root.iter(f"{SVG}text")], [float(number) for number in NUMBER.findall(paths)]


def test_the_picture_of_the_readme_is_that_of_the_figures_in_the_docs(tmp_path):
    pictures = ROOT / "docs" / "pictures" / "quality.svg", tmp_path / "quality.svg"
    main_of("draw_quality")(["--output", str(pictures[1])])
    (texts, marks), (texts_now, marks_now) = (drawn(path.read_text()) for path in pictures)
    assert texts == texts_now and len(marks) > 20
    assert marks == pytest.approx(marks_now, abs=0.5), "python examples/benchmarks/draw_quality.py draws it anew"
    figures = (ROOT / "docs" / "figures.yaml").read_text()
    (tmp_path / "figures.yaml").write_text(figures.replace("heldout: 1.", "heldout: 2."))
    main_of("draw_quality")(["--figures", str(tmp_path / "figures.yaml"), "--output", str(pictures[1])])
    other_texts, other_marks = drawn(pictures[1].read_text())
    assert other_texts != texts and other_marks != marks


def test_pages_show_the_tables_of_the_data_file():
    """Run `python examples/benchmarks/figures.py render` after a change of `docs/figures.yaml`."""
    main_of("figures")(["render", "--check"])


def test_every_figure_has_a_command_and_is_shown():
    data = yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text())
    cells = str(data["tables"])
    for name, figure in data["figures"].items():
        assert figure["command"].startswith(("python examples/", "structprune ")), name
        assert f"{{{name}[" in cells, f"no table shows {name}"


def test_a_page_that_differs_from_the_data_file_is_named(monkeypatch, tmp_path):
    figures = import_module("figures")
    page = tmp_path / "README.md"
    page.write_text("<!-- figures: e5 -->\n<!-- figures: end -->\n")
    monkeypatch.setattr(figures, "pages", lambda: [page])
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="README.md.*render"):
        main_of("figures")(["render", "--check"])
    main_of("figures")(["render"])
    assert "188" in page.read_text()
    main_of("figures")(["render", "--check"])


TINY, DATA = str(SHARED / "models" / "stories260K"), SHARED / "data"
# The arguments of a script, and words of what it prints.
SMALL = {
    "benchmark_recovery": (
        f"{TINY} {DATA} --mlp 96 --seq-length 128 --eval-samples 2 --bf16 --domains stories --tokens 2000",
        ["pruned", "LoRA, ", "text and answers, ", "KL answers "],
    ),
    "benchmark_scale": (
        "tiny --shape tiny --layers 2 --domains 2 --tokens 512 --seq-length 64",
        ["tiny, 2 of 4 layers", "| in memory | 2", "| on the disk | 2"],
    ),
    "benchmark_cost": (
        f"{TINY} --width mlp=96 --seq-length 64 --clock cpu "
        "--num-samples 6 12 --layers 2 --domains 1 3 --general-share 0",
        ["| 6 | 384 | 2 | 1", "| 12 | 768 | 2 | 3", "seconds = layers x "],
    ),
    "benchmark_stages": (
        f"{TINY} --runs uniform sensitivity --num-samples 4 --seq-length 32",
        ["| uniform | ", "| sensitivity | ", "round 1 ", "search ", "perplexity "],
    ),
    "benchmark_gpu": (
        f"{TINY} --device cpu --folder . --num-samples 8 --seq-length 32 --tokens 1024 --eval-samples 2 --prompt 8 "
        "--new-tokens 2 --repeats 1",
        ["  prune: ", "  recover: ", "  speed: ", "as on the CPU: True"],
    ),
    "benchmark_speed": ("model --widths 24 16 --prompts 8 --new-tokens 2 --repeats 1", ["mlp=24", "mlp=16"]),
    "benchmark_vocabulary": (
        f"model {DATA} --sizes 384 320 --calibration 8 --samples 1 --seq-length 16 --speed",
        ["384 | -", "320 | -"],
    ),
    "benchmark_domains": (
        f"run {TINY} {DATA} grid.json --domains stories --removed 50 --seeds 0 --samples 4 --eval-samples 1 --cells "
        "'mix, one-shot, wanda' 'mix, one-shot, obs by sensitivity + refit'",
        [],
    ),
    "benchmark_peers": (
        f"{TINY} {DATA} peers.json --domains stories --samples 4 --eval-samples 1 --rows dense '*, defaults'",
        [],
    ),
    "benchmark_experts": (
        f"model {DATA} out.json --kept 12 --seeds 0 --rows reap 'reap + refit' --domains code math --samples 4 "
        "--seq-length 64 --eval-samples 1",
        ["| reap + refit | 0.", "unseen kinds worse than with plain REAP: "],
    ),
    "train_mixture": (
        f"{DATA} trained --tokens 2560 --vocabulary 400 --seq-length 64 --batch-size 4 --eval-documents 1",
        ["cross entropy on documents set aside: ", "layer 3: load of an expert "],
    ),
    "train_tiny": (f"{DATA} trained --tokens 5120 --vocabulary 400 --seq-length 64 --batch-size 4", []),
    "benchmark_table": (
        f"{DATA} out --models stories={TINY} --domains stories --removed 50 --seeds 0 --samples 4 --eval-samples 1 "
        "--cells '*dense, seed*' '*FLAP*'",
        ["| stories, dense | ", "| stories, 50 %, FLAP | -", " | 1.00 / 1.00 | "],
    ),
    "set_aside": (f"{DATA} divided --domains wiki", []),
}


@needs_shared
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_small(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if name in ("benchmark_speed", "benchmark_vocabulary"):
        for saved in real_text_model():
            saved.save_pretrained("model")
    if name == "benchmark_experts":
        reader = real_text_model()[1]
        routed = {**GROUPED, "vocab_size": len(reader), "num_experts": 16, "max_position_embeddings": 1024}
        for saved in (AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **routed)), reader):
            saved.save_pretrained("model")
    arguments, words = SMALL[name]
    assert not main_of(name)(split(arguments))
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == [], shown
