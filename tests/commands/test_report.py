"""Test `structprune evaluate --html`."""

import html
import json

import pytest
from helpers import error_line, save_desk, write_texts
from models import documents, full_disk

from optimum_structprune.commands.cli import main


def domain_flags(folder, *names):
    flags = ["--seq-length", "24"]
    for name in names:
        flags += ["--domain", f"{name}={folder / name}.jsonl"]
    return flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model, the two texts `a` and `b`, and the model pruned on `a`."""
    folder = tmp_path_factory.mktemp("report")
    save_desk(folder, count=200)
    write_texts(folder / "b.jsonl", documents(200, seed=1))
    line = ["prune", str(folder / "model"), str(folder / "small"), "--width", "mlp=24", "--quiet"]
    assert main(line + ["--num-samples", "6"] + domain_flags(folder, "a")) == 0
    return folder


def read_page(folder) -> str:
    return html.unescape((folder / "small" / "report.html").read_text())


def test_further_text_is_distinguished_from_the_calibration_text(folder, capsys):
    assert "Measured later" not in read_page(folder)
    line = ["evaluate", str(folder / "small"), "--against", str(folder / "model"), "--html"]
    line += ["--num-samples", "4", "--json", "--quiet"]

    assert main(line + domain_flags(folder, "a", "b")) == 0

    values = json.loads(capsys.readouterr().out)
    assert values["models"]["pruned"]["evaluation"]["shared"] == ["a"]
    assert values["report"].endswith("report.html")
    page = read_page(folder)
    later_measurements = page[page.index("Measured later") :]
    assert '<th scope="row">perplexity, a (calibration domain)' in later_measurements
    assert '<th scope="row">perplexity, b (unseen)' in later_measurements


def test_a_new_result_replaces_later_measurements(folder, tmp_path, capsys):
    model = str(folder / "model")
    small = tmp_path / "small"
    text = ["--num-samples", "4", "--quiet"] + domain_flags(folder, "a")
    prune = ["prune", model, str(small), "--width", "mlp=24"] + text
    evaluate = ["evaluate", str(small), "--against", model, "--html"]
    assert main(prune) == 0
    assert main(evaluate + text) == 0

    assert main(prune + ["--overwrite"]) == 0
    assert not (small / "evaluation.json").exists()

    speed = ["--speed", "--prompt", "8", "--new-tokens", "2", "--repeats", "2"]
    for name, flags in (("report.html", []), ("evaluation.json", text), ("speed.json", speed)):
        (small / name).write_text("{}")
        assert main(evaluate + flags) == 0
        assert (small / name).read_text() != "{}"


def test_a_full_disk_is_reported_with_the_file_and_leaves_the_page_unchanged(folder, capsys):
    page_before = read_page(folder)

    with full_disk(300):
        assert main(["evaluate", str(folder / "small"), "--html"]) == 2

    assert "small/report.html: File too large." in error_line(capsys)
    assert read_page(folder) == page_before
    assert not list((folder / "small").glob(".*.new"))


def test_a_page_with_speeds_needs_the_original_model(folder, capsys):
    assert main(["evaluate", str(folder / "small"), "--html", "--speed"]) == 2

    assert "Pass the original model with --against" in error_line(capsys)
