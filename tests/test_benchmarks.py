"""Every benchmark script prints its usage and runs on a tiny model."""

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
from helpers import main_of, save_with_tokenizer, write_texts
from models import GROUPED, PLAIN, random_model, real_text_model
from trained import SHARED, needs_shared
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from optimum_structprune.domains.sources import builtin_documents


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "benchmarks").glob("*.py"))
SVG = "{http://www.w3.org/2000/svg}"
# The beginnings of the commands that produce figures.
COMMANDS = ("python examples/", "structprune ", "ACCELERATE_USE_CPU=true accelerate launch ")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def save_real_text_model(folder, *arguments):
    """Save a model of `real_text_model` with its tokenizer."""
    model, reader = real_text_model(*arguments)
    save_with_tokenizer(model, folder, reader)


@pytest.mark.slow
def test_figures_measures_a_folder_against_the_original(tmp_path, capsys, monkeypatch):
    save_real_text_model(tmp_path / "model", 1600, "prose")
    figures = import_module("figures")
    monkeypatch.setattr(figures, "SAMPLES", 1)
    monkeypatch.setattr(figures, "SEQ_LENGTH", 32)
    names = [f"heldout/{name}" for name in figures.DOMAINS]
    names.append("unseen/letters")
    texts = list(islice(builtin_documents("prose"), 12))
    for name in names:
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_texts(path, texts)

    model = str(tmp_path / "model")
    main_of("figures")(["measure", model, str(tmp_path), model, "--answers", "--questions", "4", "--speed"])
    row = json.loads(capsys.readouterr().out)
    assert row["parameters"] == 0
    assert row["heldout"] == row["unseen"] == 1
    assert row["heldout_kl"] == pytest.approx(0, abs=1e-6)
    assert row["right"] == row["right_of_original"]
    assert row["log_probability"] == pytest.approx(0, abs=1e-6)
    assert row["speedup"] > 0


@pytest.mark.slow
def test_pick_yours_measures_each_row_once(tmp_path, capsys, monkeypatch):
    save_real_text_model(tmp_path / "model", 1600, "prose")
    flags = "--width mlp=1024 --text builtin:prose --general-share 0 --num-samples 4 --seq-length 32"
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--num-samples", "1", "--questions", "1"]

    main_of("pick_yours")(command + ["--other", "letters=builtin:letters", "--row", flags])
    original_line, pruned_line = capsys.readouterr().out.splitlines()[-2:]
    assert original_line.split(" | ")[1] == "the original model"
    cells = pruned_line.split(" | ")
    assert cells[1] == f"`{flags}`"
    assert " of " in cells[5]
    assert cells[6].startswith("× ")

    def fail(*arguments):
        raise AssertionError("the row was measured again")

    monkeypatch.setattr("pick_yours.measure_row", fail)
    monkeypatch.setattr("pick_yours.measure_speeds", fail)
    main_of("pick_yours")(command + ["--row", flags])
    assert capsys.readouterr().out.splitlines()[-1] == pruned_line


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_prints_its_usage(path, capsys):
    if path.stem in ("llama_cpp", "benchmark_peers_worker", "quality"):  # Only other scripts call these.
        return

    assert f"    python {path.relative_to(ROOT)}" in path.read_text()
    with pytest.raises(SystemExit) as end:
        main_of(path.stem)(["--help"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith("usage: ")


def texts_and_marks(path: Path) -> tuple[list[str], list[float]]:
    """Return the texts of a picture, and the coordinates of its curves and bars."""
    root = ElementTree.fromstring(path.read_text())
    texts = [text.text for text in root.iter(f"{SVG}text")]

    marks = []
    for group in root.iter(f"{SVG}g"):
        if group.get("id", "").startswith(("curve ", "bar ")):
            for element in group.iter(f"{SVG}path"):
                marks += [float(number) for number in NUMBER.findall(element.get("d", ""))]
    return texts, marks


@pytest.mark.parametrize("name", ["quality.svg", "recovery.svg"])
def test_the_pictures_show_the_figures_of_the_docs(name, tmp_path):
    texts, marks = texts_and_marks(ROOT / "docs" / "pictures" / name)
    assert len(marks) > 20

    main_of("draw_pictures")(["--output", str(tmp_path)])
    current_texts, current_marks = texts_and_marks(tmp_path / name)
    assert texts == current_texts
    assert marks == pytest.approx(current_marks, abs=0.5), "run python examples/benchmarks/draw_pictures.py"

    figures = (ROOT / "docs" / "figures.yaml").read_text()
    (tmp_path / "figures.yaml").write_text(figures.replace("heldout: 1.", "heldout: 2."))
    main_of("draw_pictures")(["--figures", str(tmp_path / "figures.yaml"), "--output", str(tmp_path)])
    changed_texts, changed_marks = texts_and_marks(tmp_path / name)
    assert changed_texts != texts
    assert changed_marks != marks


def test_pages_show_the_tables_of_the_data_file():
    """Run `python examples/benchmarks/figures.py render` after a change of `docs/figures.yaml`."""
    main_of("figures")(["render", "--check"])


def test_every_figure_has_a_command_and_is_in_a_table():
    data = yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text())
    cells = str(data["tables"])
    for name, figure in data["figures"].items():
        assert figure["command"].startswith(COMMANDS), name
        assert f"{{{name}[" in cells, f"no table shows {name}"


def test_a_page_that_differs_from_the_data_file_is_named(monkeypatch, tmp_path):
    figures = import_module("figures")
    page = tmp_path / "README.md"
    page.write_text("<!-- figures: best -->\n<!-- figures: end -->\n")
    monkeypatch.setattr(figures, "pages", lambda: [page])
    monkeypatch.setattr(figures, "ROOT", tmp_path)

    with pytest.raises(SystemExit, match="README.md.*render"):
        main_of("figures")(["render", "--check"])

    main_of("figures")(["render"])
    assert "188" in page.read_text()
    main_of("figures")(["render", "--check"])


TINY = str(SHARED / "models" / "stories260K")
DATA = SHARED / "data"
# The arguments of each script, and words of its output.
SMALL = {
    "benchmark_recovery": (
        f"{TINY} {DATA} --mlp 96 --seq-length 128 --eval-samples 2 --bf16 --domains stories --tokens 2000",
        ["pruned", "LoRA, ", "text and answers, ", "KL to the original"],
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
        f"{TINY} {DATA} peers.json --domains stories --samples 4 --eval-samples 1 --rows original '*, defaults'",
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
        "--cells '*original, seed*' '*FLAP*'",
        ["| stories, original | ", "| stories, 50 %, FLAP | -", " | 1.00 / 1.00 | "],
    ),
    "benchmark_encoders": (f"judges {DATA} model other", ["other, int8 | ", "Kendall's tau of neighbours | "]),
    "set_aside": (f"{DATA} divided --domains wiki", []),
}


@needs_shared
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_a_script_runs_on_a_tiny_model(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if name in ("benchmark_speed", "benchmark_vocabulary"):
        save_real_text_model("model")
    if name == "benchmark_encoders":
        _, reader = real_text_model()
        sizes = PLAIN | {"vocab_size": len(reader), "max_position_embeddings": 256}
        for folder in ("model", "other"):
            save_with_tokenizer(random_model(AutoModel, "bert", sizes), folder, reader)
    if name == "benchmark_experts":
        _, reader = real_text_model()
        sizes = GROUPED | {"vocab_size": len(reader), "num_experts": 16, "max_position_embeddings": 1024}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **sizes))
        save_with_tokenizer(model, "model", reader)

    arguments, words = SMALL[name]
    assert not main_of(name)(split(arguments))

    output = capsys.readouterr().out
    assert [word for word in words if word not in output] == [], output
