"""The model card of a result agrees with its records, has snippets that run, and treats all other text as text."""

import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import results
import yaml
from helpers import ran
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from models import build, config, documents, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune import DomainConfig, StructPruner, dry_run, export_uniform
from optimum_structprune.commands.recover import result_lines
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.record.figures import (
    Answer,
    AnsweredQuestion,
    AnswersResult,
    SizeResult,
    TextResult,
    TrimResult,
)
from optimum_structprune.record.report import Evaluation, OriginalModel, Report, Speed, Spread, Timing
from optimum_structprune.record.table import escaped
from optimum_structprune.record.verdict import judge
from optimum_structprune.record.view import View
from optimum_structprune.saving.card import model_card
from optimum_structprune.system.written import LIST_NAME, replace_text, to_json, written_files


def tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of the table under each heading that has one."""
    rows_by_title = {}
    sections = re.split(r"^## (.*)$", text, flags=re.M)
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        rows = []
        for line in body.splitlines():
            if line.startswith("|"):
                rows.append([cell.strip() for cell in line.split("|")[1:-1]])
        if rows:
            rows_by_title[title] = rows
    return rows_by_title


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Save an original model with a card, and two pruned models: `slim`, and `uneven` with other widths by layer."""
    folder = tmp_path_factory.mktemp("cards")
    build("llama-tied").save_pretrained(folder / "original")
    (folder / "original" / "README.md").write_text("---\nlicense: other\nlicense_name: artistic\n---\nA model.\n")

    domains = [DomainConfig("a", documents(240)), DomainConfig("b", documents(240, seed=1), weight=3.0)]
    for name, fields in (("slim", {}), ("uneven", {"widths": {"mlp": [20, 30]}})):
        pruner = StructPruner(config(domains=domains, num_samples=240, **fields))
        pruned = pruner.prune_model(AutoModelForCausalLM.from_pretrained(folder / "original"), tokenizer())
        pruner.save(pruned, folder / name, tokenizer())
    return folder


def test_the_card_agrees_with_the_records(desk):
    card = ModelCard.load(desk / "slim" / "README.md")
    report = Report.load(desk / "slim" / "report.json")
    assert card.data.library_name == "transformers"
    assert "structured-pruning" in card.data.tags
    assert card.data.license == "other"
    assert card.data.license_name == "artistic"
    assert card.data.base_model is None

    rows = tables(card.text)
    original = report.original.parameters
    pruned = report.pruned.parameters
    assert rows["Size"][2] == ["FFN channels per layer", "40", "24", "-40.0%"]
    assert rows["Size"][3] == ["parameters", f"{original:,}", f"{pruned:,}", f"{pruned / original - 1:+.1%}"]
    assert "FFN channels: 40 → 24 (-40.0%) in each of 2 layers." in card.text

    loss_rows = []
    for row in View(report).losses[1:]:
        loss_rows.append([escaped(cell) for cell in row])
    assert rows["Losses"][2:] == loss_rows

    verdict = str(judge(report))
    assert f"**Verdict: {escaped(verdict[0].upper() + verdict[1:])}.**" in card.text
    assert [row[2] for row in rows["Calibration domains"][2:]] == ["0.25", "0.75"]
    assert "settings are in structprune\\_config.json." in card.text

    # Apart from code blocks, the card has no other code than the name of a program.
    prose = re.sub(r"```.*?```", "", card.text, flags=re.S)
    assert "`" not in prose.replace("`convert_hf_to_gguf.py`", "")


@pytest.fixture
def folder_of_report(desk, tmp_path):
    """Copy `slim` with data sets of all kinds and a short report, and return the folder with the report."""
    out = shutil.copytree(desk / "slim", tmp_path / "out")
    sources = ["owner/data", "imdb", "builtin:prose", "notes.jsonl", "memory:list", str(tmp_path), "self:code"]
    manifest = json.loads((out / "calibration_manifest.json").read_text())
    entry = manifest["domains"][0]
    manifest["domains"] = [entry | {"origin": {"source": source}} for source in sources]
    (out / "calibration_manifest.json").write_text(json.dumps(manifest))

    report = results.report({"a": inf})
    report.original = SizeResult(20, 10, 80)
    report.pruned = SizeResult(10, 5, 40)
    report.widths = {"mlp": {0: 3, 1: 4}}
    report.original_widths = {"mlp": 8}
    report.save(out / "report.json")
    return out, report


def test_licence_base_model_and_data_sets_come_from_the_hub_or_the_report(desk, folder_of_report, monkeypatch):
    out, report = folder_of_report
    slim = AutoConfig.from_pretrained(desk / "slim")
    licensed_card = ModelCard("---\nlicense: mit\n---\n")

    def load(name):
        if "/" not in name:
            raise ConnectionError
        return licensed_card

    monkeypatch.setattr(ModelCard, "load", load)
    card = ModelCard(model_card(out, "out", slim, "owner/model"))
    assert card.data.base_model == "owner/model"
    assert card.data.license == "mit"
    assert card.data.datasets == ["imdb", "owner/data"]
    assert "This is owner/model, pruned. It has 50.0% fewer parameters" in card.text
    assert tables(card.text)["Size"][2][:3] == ["FFN channels per layer", "8", "3-4"]

    unlicensed = ModelCard(model_card(out, "out", slim, "gone"))
    assert unlicensed.data.license is None
    assert "Unknown: the card of gone names no licence" in unlicensed.text

    report.model = OriginalModel("owner/model", base_model="maker/model", license="mpl-2.0")
    report.save(out / "report.json")
    recorded = ModelCard(model_card(out, "out", slim))
    assert recorded.data.base_model == "maker/model"
    assert recorded.data.license == "mpl-2.0"

    report.model = OriginalModel()
    report.save(out / "report.json")
    cache_folder = "/home/me/hub/models--owner--model/snapshots/0123"
    cached = ModelCard(model_card(out, "out", slim, cache_folder))
    assert cached.data.base_model == "owner/model"


@pytest.mark.slow
def test_the_snippets_run_without_this_package(desk):
    code = "import sys\nsys.modules['optimum_structprune'] = None\n"
    for name in ("slim", "uneven"):
        card = (desk / name / "README.md").read_text()
        code += re.search(r"```python\n(.*?)```", card, re.S)[1]
    output = ran([sys.executable, "-c", code], cwd=desk)
    assert len(output.splitlines()) == 2


def test_the_card_names_the_needs_of_a_non_uniform_result_and_none_of_a_padded_result(desk, tmp_path):
    slim = (desk / "slim" / "README.md").read_text()
    assert "trust_remote_code" not in slim.partition("## Size")[0]
    assert "optimum-structprune is not needed" in slim
    assert "`convert_hf_to_gguf.py` works" in slim
    assert "zeros" not in slim

    uneven = (desk / "uneven" / "README.md").read_text()
    assert "trust_remote_code=True" in uneven
    assert "structprune export" in uneven
    assert "does not load" in uneven
    assert "zeros" not in uneven

    export_uniform(AutoModelForCausalLM.from_pretrained(desk / "uneven"), tmp_path / "padded")
    assert "README.md" in written_files(tmp_path / "padded")
    assert ModelCard.load(tmp_path / "padded" / "README.md").data.license_name == "artistic"
    padded = (tmp_path / "padded" / "README.md").read_text().partition("## Size")[0]
    assert "trust_remote_code=True" not in padded
    assert "padded with zeros" in padded


def test_a_uniform_result_of_a_config_with_values_for_single_layers_loads_without_this_package(tmp_path):
    """A stock config of Gemma 4 has such values."""
    model = build("gemma4_text")
    settings = config(widths={"mlp": 24})
    assert model.config.is_heterogeneous
    assert dry_run(model.config, settings).reload == ("plain transformers, AutoModelForCausalLM.from_pretrained",)

    StructPruner(settings).prune(model, tokenizer()).save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "differ in width" not in card

    (line, *_) = result_lines(str(tmp_path / "out"), model.config, None)
    assert "import optimum_structprune" not in line


MARKUP = (
    "![t](https://e.vil/t.png)",
    "[win](javascript:alert(1))",
    "<b>bold</b>",
    "<https://e.vil>",
    "`` ` ```",
    "\n```\n![x](y)\n",
    "\n\n# Title\n\n",
    "**a** ~~b~~ _c_",
    "&lt;b>",
    "\\",
    "|",
    "[a]: https://e.vil",
    "www.e.vil",
    "me@e.vil",
    "ftp://e.vil",
)


def card_of(result, place, words):
    """Return the card of a result in which some words replace every name and text from outside the package."""
    name = f"of {words}".replace("/", ":").replace("\0", "")
    folder = shutil.copytree(result, Path(place, name))
    original = Path(place, f"original {name}")
    original.mkdir()
    metadata = yaml.safe_dump({"license": "other", "license_name": words, "base_model": name})
    (original / "README.md").write_text(f"---\n{metadata}---\n")
    replace_text(original / LIST_NAME, to_json({"files": {"README.md": ""}}))

    answer = Answer(words, right=True, loops=False, stopped=True)
    questions = [AnsweredQuestion(words, words, {"original": answer, words: answer})]
    domains = {words: TextResult(results.figure(1.5), tokens=9, documents=90)}
    report = Report.load(folder / "report.json")
    report.model.name = str(original)
    report.answers = AnswersResult(questions)
    report.domains = domains
    report.trimmed = TrimResult(9, 0.1, {words: 3}, unreadable={words: 1}, scripts={words: 1})
    report.widths["vocab"] = {-1: 5}
    report.original_widths["vocab"] = 14
    report.save(folder / "report.json")

    evaluation = Evaluation(
        model=words, original=words, prefix=words, domains=domains, calibrated=[], warnings=[words]
    )
    evaluation.save(folder / "evaluation.json")

    timing = Timing([1.0], 1.0, Spread(1.0, 1.0, 1.0))
    timings = {words: {"original": timing, words: timing}}
    memory = {words: {"original": 2, words: 1}}
    Speed(timings, timings, memory, 1, 1, 1, words, words, words).save(folder / "speed.json")

    manifest = Manifest.load(folder)
    entry = replace(manifest.domains[0], name=words, origin={"source": words})
    replace(manifest, domains=[entry]).save(folder / "calibration_manifest.json")

    settings = json.loads((folder / "structprune_config.json").read_text())
    settings["domains"] = [{"name": words, "source": words, "weight": 1.0}]
    settings["general_text"] = words
    (folder / "structprune_config.json").write_text(json.dumps(settings))
    return model_card(folder, folder.name, AutoConfig.from_pretrained(folder))


def count_markup(card):
    """Count the Markdown elements of each kind in a card, and the addresses that websites turn into links."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("text_join")
    body = re.split("^---$", card, maxsplit=2, flags=re.M)[2]
    tokens = []
    for block in reader.parse(body):
        tokens.append(block)
        tokens += block.children or ()

    counts = Counter(token.type for token in tokens if token.type not in ("text", "text_special", "softbreak"))
    num_addresses = 0
    for token in tokens:
        if token.type == "text":
            num_addresses += len(re.findall(r"(?i)(https?|ftp)://|www\.|\w@\w", token.content))
    counts["bare"] = num_addresses
    return counts


@pytest.fixture(scope="module")
def markup_of_plain_words(desk, tmp_path_factory):
    card = card_of(desk / "slim", tmp_path_factory.mktemp("harmless"), "some words")
    return count_markup(card)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(MARKUP) | st.text(max_size=6), min_size=1, max_size=4).map("".join).filter(str.strip))
@example("\n```\n![x](y)\n")
@example("".join(MARKUP))
def test_markup_in_names_and_texts_of_others_is_escaped(desk, markup_of_plain_words, words):
    with tempfile.TemporaryDirectory() as place:
        assert count_markup(card_of(desk / "slim", place, words)) == markup_of_plain_words


@pytest.fixture
def card_with_metadata(desk, tmp_path):
    """Return a function that makes the card of a result whose original model has this YAML in its card."""
    out = shutil.copytree(desk / "slim", tmp_path / "out")
    report = Report.load(out / "report.json")
    report.model.name = str(tmp_path)
    report.save(out / "report.json")

    def make(metadata):
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
        return model_card(out, 'odd"\\name', AutoConfig.from_pretrained(out))

    return make


def test_lists_in_the_card_of_the_original_model_are_copied(card_with_metadata):
    card = ModelCard(card_with_metadata("license: [mit, apache-2.0]\nlanguage: [de, en]"))
    assert card.data.language == ["de", "en"]
    assert card.data.license == ["mit", "apache-2.0"]
    assert "mit, apache-2.0" in card.text
    snippet = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    compile(snippet, "snippet", "exec")


def test_a_short_original_card_with_nested_references_makes_no_long_card(card_with_metadata):
    # Each line of the YAML names the previous line nine times.
    lines = ["x0: &x0 [a]"]
    for number in range(1, 8):
        references = ", ".join([f"*x{number - 1}"] * 9)
        lines.append(f"x{number}: &x{number} [{references}]")
    lines += ["license: *x7", "language: *x7"]
    assert len(card_with_metadata("\n".join(lines))) < 100_000


def test_a_result_of_sentence_transformers_is_listed_and_loaded_as_one(desk, tmp_path):
    metadata = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["feature-extraction"],
    }
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n")
    out = shutil.copytree(desk / "slim", tmp_path / "out")
    (out / "modules.json").write_text("[]")
    report = Report.load(out / "report.json")
    report.model.name = str(tmp_path)
    report.save(out / "report.json")

    for model_type, class_name in (
        (None, "SentenceTransformer"),
        ("SparseEncoder", "SparseEncoder"),
        ("CrossEncoder", "CrossEncoder"),
        ("x; y", "SentenceTransformer"),
    ):
        (out / "config_sentence_transformers.json").write_text(json.dumps({"model_type": model_type}))
        card = ModelCard(model_card(out, "out", AutoConfig.from_pretrained(out)))
        assert f"from sentence_transformers import {class_name}\n" in card.text
        assert f"model = {class_name}(name)" in card.text
        assert card.data.library_name == "sentence-transformers"
        assert card.data.pipeline_tag == "sentence-similarity"
        assert {"feature-extraction", "structured-pruning"}.issubset(card.data.tags)

    (out / "modules.json").unlink()
    plain_card = ModelCard(model_card(out, "out", AutoConfig.from_pretrained(out)))
    assert plain_card.data.library_name == "transformers"
    assert "feature-extraction" not in plain_card.data.tags
