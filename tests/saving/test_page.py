"""The page about a result is complete, self-contained and escaped, and omits everything that was not recorded."""

import re
import shutil
from math import inf

import pytest
import results
from models import build, config, tokenizer

from optimum_structprune import Evaluation, StructPruner, write_report
from optimum_structprune.record.figures import AnswersResult, TextResult
from optimum_structprune.record.report import CurvePoint, OriginalModel, RecoveryReport, Report
from optimum_structprune.saving.page import PAGE_NAME, page, write_page_or_warn


PARTS = ("Losses", "Size", "Recovery", "Reproduce")
HOSTILE = '<img src=x onerror=alert(1)> & $x$ `y` "z"'
# The first installed browser opens the page. On Debian, it is called chromium.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Elements beyond the right edge of the window, except elements in a box that scrolls.
OVERFLOWING = """() => [...document.querySelectorAll("body *")]
    .filter(element => !element.parentElement.closest(".table"))
    .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
    .map(element => element.outerHTML.slice(0, 120))"""
# Tables that are wider than their box.
CUT = """() => [...document.querySelectorAll(".table")].filter(box => box.scrollWidth > box.clientWidth)
    .filter(element => element.getClientRects().length).map(element => element.outerHTML.slice(0, 120))"""
EMPTY = """() => [...document.querySelectorAll("main > *")].filter(element => element.children.length)
    .filter(element => element.getBoundingClientRect().width < 20 || element.getBoundingClientRect().height < 20)
    .map(element => element.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a result with every kind of record, and with a hostile name for a domain."""
    folder = tmp_path_factory.mktemp("page") / "small & <slim>"
    fields = {"widths": None, "sparsity": 0.25, "allocation": "sensitivity", "round_to": 1, "rounds": 2}
    pruner = StructPruner(config(**fields))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    report = pruner.result.report
    report.domains[HOSTILE] = report.domains.pop(next(iter(report.domains)))
    report.answers = AnswersResult([results.question({"original": True, "pruned": False}, prompt=HOSTILE)])
    pruner.save(model, folder, tokenizer())

    curve = [CurvePoint(number, 1 / number) for number in (120_000, 240_000, 480_000)]
    domains = {HOSTILE: TextResult(results.figure(1.8, 1.2))}
    recovery = RecoveryReport(
        tokens=480_000, steps=20, seconds=3.0, domains=domains, kept_step=20, curve=curve, answers=report.answers
    )
    recovery.save(folder / "recovery_report.json")

    domains = {name: TextResult(results.figure(1.5), documents=90) for name in ("far", "near")}
    evaluation = Evaluation(model=str(folder), original="big", domains=domains, calibrated=[], shared=["near"])
    evaluation.save(folder / "evaluation.json")
    write_report(folder)
    return folder


def test_the_page_has_every_part_with_its_tables(folder):
    text = (folder / PAGE_NAME).read_text()
    assert [name for name in PARTS if f"<h2>{name}</h2>" not in text] == []

    report = Report.load(folder / "report.json")
    for figure in ("1.800×", "1.200×", "1.500×", f"{report.removed:.1%} fewer parameters"):
        assert figure in text
    assert '<div class="answer right"><b>original: right' in text
    assert '<div class="answer"><b>pruned: wrong' in text
    assert "perplexity, near (calibration domain)" in text
    assert "perplexity, far (unseen)" in text


def test_the_page_needs_no_other_file_and_is_small(folder):
    text = (folder / PAGE_NAME).read_text()
    assert len(text.encode()) < 1_000_000
    assert "<script" not in text

    targets = re.findall(r'<[^>]*(?:src|href)="([^"]*)', text)
    assert targets
    assert all(target.startswith("data:") for target in targets)
    assert not re.search(r"url\((?!#)|@import", text)


def test_names_and_texts_of_users_are_escaped(folder):
    text = (folder / PAGE_NAME).read_text()
    assert "<img" not in text
    assert "<slim>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; $x$" in text


def test_the_page_says_if_no_checkpoint_of_the_recovery_was_kept(folder, tmp_path):
    unrecovered = shutil.copytree(folder, tmp_path / "unrecovered")
    recovery = RecoveryReport.load(folder / "recovery_report.json")
    recovery.kept_step = 0
    recovery.save(unrecovered / "recovery_report.json")

    assert "pruned and recovered" in page(folder)
    assert "pruned and recovered" not in page(unrecovered)
    assert "no checkpoint was better than the pruned model" in page(unrecovered)


@pytest.fixture
def sparse_folder(folder, tmp_path):
    """Return a copy of the result with few records and an infinite perplexity."""
    sparse_folder = shutil.copytree(folder, tmp_path / "few")
    report = Report.load(folder / "report.json")
    report.domains[HOSTILE].perplexity = results.figure(inf)
    report.model = OriginalModel()
    report.answers = None
    report.save(sparse_folder / "report.json")
    for name in ("evaluation.json", "recovery_report.json", "calibration_manifest.json"):
        (sparse_folder / name).unlink()
    return sparse_folder


def test_the_page_omits_everything_that_was_not_recorded(folder, sparse_folder):
    text = page(sparse_folder)
    for part in ("Measured later", "Recovery</h2>", "Answers</h2>", "Calibration domains</h2>"):
        assert part not in text
        assert part in (folder / PAGE_NAME).read_text()

    assert "This is big, pruned" in page(sparse_folder, original="big")
    assert "Warning: the perplexity is infinite on" in text


def test_answers_of_a_later_evaluation_count_in_the_verdict(sparse_folder):
    assert "answers were not checked" in page(sparse_folder)

    evaluation = Evaluation(model="few", answers=results.answers(kept=3, asked=4, correct=4))
    evaluation.save(sparse_folder / "evaluation.json")
    text = page(sparse_folder)
    assert "answers were not checked" not in text
    assert "4 test questions: correct 4 → 3" in text


def test_an_error_in_the_page_is_a_warning_and_the_model_is_saved(tmp_path, monkeypatch):
    out = tmp_path / "small"
    pruner = StructPruner(config())
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    monkeypatch.setattr("optimum_structprune.saving.page.content", lambda *values: 1 / 0)
    pruner.save(model, out)
    assert not (out / PAGE_NAME).exists(), "only `write_report` writes the page of a save from Python"

    with pytest.warns(UserWarning, match="report.html of .*small is missing: division by zero"):
        write_page_or_warn(out)
    assert not (out / PAGE_NAME).exists()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    paths = [shutil.which(name) for name in BROWSERS if shutil.which(name)]
    if not paths:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")

    with sync_api.sync_playwright() as playwright:
        # Chromium starts as root only without its sandbox. The page is from this package, so this is safe.
        browser = playwright.chromium.launch(executable_path=paths[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_shows_the_whole_page(width, scheme, folder, browser, tmp_path):
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints = []
    for event in ("console", "pageerror", "requestfailed"):
        tab.on(event, lambda message: complaints.append(message))
    tab.goto((folder / PAGE_NAME).as_uri())
    assert complaints == []

    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(OVERFLOWING) == []
    assert tab.evaluate(CUT) == []
    assert tab.evaluate(EMPTY) == []
    for name in PARTS:
        assert tab.get_by_role("heading", name=name, exact=True).is_visible(), name

    color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", color)[0])
    assert (red > 200) == (scheme == "light")
    assert len(tab.screenshot(path=tmp_path / "page.png", full_page=True)) > 20_000
    tab.close()
