"""The page about a result: complete, self-contained, escaped, and silent on what was not recorded."""

import json
import re
import shutil

import pytest
from models import build, config, tokenizer

from optimum_structprune import Evaluation, StructPruner, write_report
from optimum_structprune.saving.page import PAGE_NAME, page, write_page_or_warn


PARTS = ("Size", "What it loses and gains", "Trained afterwards", "How it was made")
HOSTILE = '<img src=x onerror=alert(1)> & $x$ `y` "z"'
# The first of them that is there draws the page; Debian's is called chromium.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Elements beyond the right edge of the window, but for those in a box that scrolls.
OVERFLOWING = """() => [...document.querySelectorAll("body *")]
    .filter(one => !one.parentElement.closest("table, pre") && one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.outerHTML.slice(0, 120))"""
EMPTY = """() => [...document.querySelectorAll("main > *")]
    .filter(one => one.getBoundingClientRect().width < 20 || one.getBoundingClientRect().height < 20)
    .map(one => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A result with every record that there can be, one of whose domains has a hostile name."""
    folder = tmp_path_factory.mktemp("page") / "small & <slim>"
    fields = {"widths": None, "sparsity": 0.25, "allocation": "sensitivity", "round_to": 1, "rounds": 2}
    pruner = StructPruner(config(**fields))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    report = pruner.report
    report.perplexity[HOSTILE] = report.perplexity.pop(next(iter(report.perplexity)))
    pruner.save(model, folder, tokenizer())
    trained = {"tokens": 480, "steps": 20, "seconds": 3.0, "stopped": ""}
    perplexity = {HOSTILE: {"dense": 9.0, "pruned": 18.0, "recovered": 12.0}}
    (folder / "recovery_report.json").write_text(json.dumps({**trained, "perplexity": perplexity}))
    both = {"dense": 10.0, "model": 15.0}
    figures = {"dense": {"right": 0.75}, "model": {"right": 0.5}}
    found = Evaluation(str(folder), perplexity={"far": both, "near": both}, figures=figures, shared=["near"])
    found.save(folder / "evaluation.json")
    write_report(folder)
    return folder


def test_every_part_is_there_with_its_tables_and_nothing_else_is_needed(folder):
    text = (folder / PAGE_NAME).read_text()
    assert [name for name in PARTS if f"<h2>{name}</h2>" not in text] == []
    report = json.loads((folder / "report.json").read_text())
    uneven = [kind for kind, widths in report["widths"].items() if len({*widths.values()}) > 1]
    assert text.count(" by layer: ") == len(uneven)
    share = report["parameters"]["after"] / report["parameters"]["before"] - 1
    for shown in ("18.00", "12.00", "x 1.333", "x 1.500", "0.750", f"{share:+.1%}"):
        assert shown in text
    # It needs nothing else, and is small.
    assert len(text.encode()) < 1_000_000 and "<script" not in text
    targets = re.findall(r'<[^>]*(?:src|href)="([^"]*)', text)
    assert targets and all(target.startswith("data:") for target in targets)
    assert not re.search(r"url\((?!#)|@import", text)
    # What comes from a user is escaped.
    assert "<img" not in text and "<slim>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; $x$" in text


def test_what_was_not_recorded_is_not_there(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "few")
    report = json.loads((folder / "report.json").read_text())
    trained = json.loads((folder / "recovery_report.json").read_text())
    (tmp_path / "few" / "recovery_report.json").write_text(json.dumps({**trained, "kept_step": 0}))
    assert "pruning and training" in page(folder) and "pruning and training" not in page(tmp_path / "few")
    assert "no step was better than the pruned model, which is kept" in page(tmp_path / "few")
    report["perplexity"][HOSTILE]["after"] = None
    del report["model"]
    (tmp_path / "few" / "report.json").write_text(json.dumps(report))
    for name in ("evaluation.json", "recovery_report.json", "calibration_manifest.json"):
        (tmp_path / "few" / name).unlink()
    text = page(tmp_path / "few")
    for what in ("Measured later", "answers right", "Trained afterwards"):
        assert what not in text and what in (folder / PAGE_NAME).read_text()
    assert "DENSE is the dense model" in text and "DENSE" not in page(tmp_path / "few", dense="big")
    assert "Warning: a perplexity is infinite on" in text
    # Answers that were asked for later count in the verdict.
    answer = {"text": "", "right": True, "loops": False, "stopped": True}
    asked = {"kind": "", "prompt": "?", "answers": {"dense": answer, "model": answer}}
    (tmp_path / "few" / "evaluation.json").write_text(json.dumps({"answers": [asked]}))
    assert "not asked" in text and "not asked" not in (later := page(tmp_path / "few"))
    assert "1 of 1 right answers stay right" in later


def test_a_page_that_cannot_be_made_does_not_take_the_model_with_it(tmp_path, monkeypatch):
    pruner = StructPruner(config())
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    monkeypatch.setattr("optimum_structprune.saving.page.result_text", lambda *values: 1 / 0)
    pruner.save(model, tmp_path / "small")
    assert not (tmp_path / "small" / PAGE_NAME).exists(), "a save from Python leaves it to `write_report`"
    with pytest.warns(UserWarning, match="small gets no report.html: division by zero"):
        write_page_or_warn(tmp_path / "small")
    assert not (tmp_path / "small" / PAGE_NAME).exists()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as running:
        # The page is our own; as root, Chromium starts without its sandbox only.
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 400])
def test_a_browser_shows_all_of_it(width, scheme, folder, browser, tmp_path):
    tab, complaints = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    for event in ("console", "pageerror", "requestfailed"):
        tab.on(event, complaints.append)
    tab.goto((folder / PAGE_NAME).as_uri())
    assert complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(OVERFLOWING) == [] and tab.evaluate(EMPTY) == []
    assert [name for name in PARTS if not tab.get_by_role("heading", name=name).is_visible()] == []
    red = int(re.search(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red > 200) == (scheme == "light")
    assert len(tab.screenshot(path=tmp_path / "page.png", full_page=True)) > 20_000
    tab.close()
