"""`structprune evaluate --html`; `saving/test_save.py` runs the command lines that the page names."""

import html
import json

import pytest
from helpers import error_line, save_desk, write_texts
from models import documents, full_disk

from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two texts, and the model pruned on the first of them."""
    folder = tmp_path_factory.mktemp("report")
    save_desk(folder, count=200)
    write_texts(folder / "b.jsonl", documents(200, seed=1))
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--num-samples", "6"]
    assert main(["prune", str(folder / "model"), str(folder / "small"), "--width", "mlp=24", *text, "--quiet"]) == 0
    return folder


def page(folder) -> str:
    return html.unescape((folder / "small" / "report.html").read_text())


def test_further_text_is_measured_and_told_from_what_was_calibrated_on(folder, capsys):
    assert "Measured later" not in page(folder)
    domains = [flag for name in "ab" for flag in ("--domain", f"{name}={folder / name}.jsonl")]
    small, against = str(folder / "small"), ["--against", str(folder / "model"), "--html"]
    line = ["evaluate", small, *against, *domains, "--seq-length", "24", "--num-samples", "4"]
    assert main([*line, "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["models"]["pruned"]["evaluation"]["shared"] == ["a"] and values["report"].endswith("report.html")
    text = page(folder)
    later = text.index("Measured later")
    for row in ("perplexity, a (calibration domain)", "perplexity, b (unseen)"):
        assert f'<th scope="row">{row}' in text[later:]


def test_later_measurements_are_replaced_with_the_result(folder, tmp_path, capsys):
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--num-samples", "4", "--quiet"]
    small, model = str(tmp_path / "small"), str(folder / "model")
    prune = ["prune", model, small, "--width", "mlp=24", *text]
    assert main(prune) == 0
    page = ["evaluate", small, "--against", model, "--html"]
    speed = ["--speed", "--prompt", "8", "--new-tokens", "2", "--repeats", "2"]
    assert main([*page, *text]) == 0
    assert main([*prune, "--overwrite"]) == 0 and not (tmp_path / "small" / "evaluation.json").exists()
    for name, flags in (
        ("report.html", []),
        ("evaluation.json", text),
        ("speed.json", speed),
    ):
        (tmp_path / "small" / name).write_text("{}")
        assert main([*page, *flags]) == 0
        assert (tmp_path / "small" / name).read_text() != "{}"


def test_a_full_disk_is_said_with_the_file_and_leaves_the_page_as_it_was(folder, capsys):
    before = page(folder)
    with full_disk(300):
        assert main(["evaluate", str(folder / "small"), "--html"]) == 2
    assert "small/report.html: File too large." in error_line(capsys) and page(folder) == before
    assert not [*(folder / "small").glob(".*.new")]


def test_a_page_with_speeds_takes_the_dense_model(folder, capsys):
    assert main(["evaluate", str(folder / "small"), "--html", "--speed"]) == 2
    assert "name it by --against" in error_line(capsys)
