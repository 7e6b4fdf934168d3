"""The page about a result: complete, self-contained, escaped, and silent on what was not recorded."""

import json
import re
import shutil
from math import inf

import pytest
import results
from models import build, config, tokenizer

from optimum_structprune import Evaluation, StructPruner, write_report
from optimum_structprune.record.figures import AnswersResult, DomainResult
from optimum_structprune.record.report import CurvePoint, DenseModel, RecoveryReport, Report
from optimum_structprune.saving.page import PAGE_NAME, page, write_page_or_warn


PARTS = ("Losses by domain", "Losses", "Size", "Recovery", "Kept width by layer", "Reproduce")
HOSTILE = '<img src=x onerror=alert(1)> & $x$ `y` "z"'
# The first of them that is there draws the page; Debian's is called chromium.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Elements beyond the right edge of the window, but for those in a box that scrolls.
OVERFLOWING = """() => [...document.querySelectorAll("body *")]
    .filter(one => !one.parentElement.closest(".table, pre, svg"))
    .filter(one => one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.outerHTML.slice(0, 120))"""
EMPTY = """() => [...document.querySelectorAll("main > *")].filter(one => one.children.length)
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
    report.domains[HOSTILE] = report.domains.pop(next(iter(report.domains)))
    report.answers = AnswersResult([results.question({"dense": True, "pruned": False}, prompt=HOSTILE)])
    pruner.save(model, folder, tokenizer())
    curve = [CurvePoint(number, 1 / number) for number in (120, 240, 480)]
    trained = RecoveryReport(
        480, 20, 3.0, {HOSTILE: DomainResult(results.figure(1.8, 1.2))}, kept_step=20, curve=curve
    )
    trained.save(folder / "recovery_report.json")
    domains = {name: DomainResult(results.figure(1.5), documents=90) for name in ("far", "near")}
    found = Evaluation(str(folder), "dense", domains=domains, calibrated=[], shared=["near"])
    found.save(folder / "evaluation.json")
    write_report(folder)
    return folder


def test_every_part_is_there_with_its_tables_and_nothing_else_is_needed(folder):
    text = (folder / PAGE_NAME).read_text()
    assert [name for name in PARTS if f"<h2>{name}</h2>" not in text] == []
    report = Report.load(folder / "report.json")
    for shown in ("1.800×", "1.200×", "1.500×", f"{report.removed:.1%} fewer parameters"):
        assert shown in text
    assert '<div class="answer right"><b>original: right' in text and '<div class="answer"><b>pruned: wrong' in text
    assert "perplexity, near (calibration domain)" in text and "perplexity, far (unseen)" in text
    assert text.count("<svg") == 6, "three charts in two widths"
    # It needs nothing else, and is small.
    assert len(text.encode()) < 1_000_000 and "<script" not in text
    targets = re.findall(r'<[^>]*(?:src|href)="([^"]*)', text)
    assert targets and all(target.startswith("data:") for target in targets)
    assert not re.search(r"url\((?!#)|@import", text)
    # What comes from a user is escaped.
    assert "<img" not in text and "<slim>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; $x$" in text


def test_what_was_not_recorded_is_not_there(folder, tmp_path):
    few = shutil.copytree(folder, tmp_path / "few")
    trained = RecoveryReport.load(folder / "recovery_report.json")
    trained.kept_step = 0
    trained.save(few / "recovery_report.json")
    assert "pruned and recovered" in page(folder) and "pruned and recovered" not in page(few)
    assert "no checkpoint was better than the pruned model" in page(few)

    report = Report.load(folder / "report.json")
    report.domains[HOSTILE].perplexity = results.figure(inf)
    report.model = DenseModel()
    report.answers = None
    report.save(few / "report.json")
    for name in ("evaluation.json", "recovery_report.json", "calibration_manifest.json"):
        (few / name).unlink()
    text = page(few)
    for what in ("Measured later", "Recovery</h2>", "Answers</h2>", "Calibration domains</h2>"):
        assert what not in text and what in (folder / PAGE_NAME).read_text()
    assert "ORIGINAL is the original model" in text and "ORIGINAL" not in page(few, dense="big")
    assert "Warning: the perplexity is infinite on" in text

    # Answers that were collected later count in the verdict.
    Evaluation("few", answers=results.answers(kept=3, asked=4, correct=4)).save(few / "evaluation.json")
    assert "answers were not checked" in text and "answers were not checked" not in (later := page(few))
    assert "4 test questions: correct 4 → 3" in later


def test_a_report_of_an_earlier_version_gives_a_page_without_figures(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"format_version": 1, "perplexity": {"a": {"before": 1.0}}}))
    assert "This is a model, pruned." in page(tmp_path)


def test_a_page_that_cannot_be_made_does_not_take_the_model_with_it(tmp_path, monkeypatch):
    pruner = StructPruner(config())
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    monkeypatch.setattr("optimum_structprune.saving.page.view_of", lambda *values: 1 / 0)
    pruner.save(model, tmp_path / "small")
    assert not (tmp_path / "small" / PAGE_NAME).exists(), "a save from Python leaves it to `write_report`"
    with pytest.warns(UserWarning, match="report.html of .*small is missing: division by zero"):
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
        tab.on(event, lambda what: complaints.append(what))
    tab.goto((folder / PAGE_NAME).as_uri())
    assert complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(OVERFLOWING) == [] and tab.evaluate(EMPTY) == []
    assert [name for name in PARTS if not tab.get_by_role("heading", name=name, exact=True).is_visible()] == []
    red = int(re.search(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red > 200) == (scheme == "light")
    assert len(tab.screenshot(path=tmp_path / "page.png", full_page=True)) > 20_000
    tab.close()
