"""The model card of a result: what it says, that its snippet runs, and whose it is."""

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

from optimum_structprune import DomainConfig, StructPruner, export_uniform
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.record.evaluation import Evaluation
from optimum_structprune.record.figures import (
    Answer,
    AnsweredQuestion,
    AnswersResult,
    DomainResult,
    SizeResult,
    TrimResult,
)
from optimum_structprune.record.report import DenseModel, Report
from optimum_structprune.record.speed import Speed, Spread, Timing
from optimum_structprune.record.summary import loss_table
from optimum_structprune.record.table import escaped
from optimum_structprune.record.verdict import judge
from optimum_structprune.saving.card import model_card
from optimum_structprune.written import LIST_NAME, replace_text, to_json, written_files


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of the table under each heading."""
    sections = re.split(r"^## (.*)$", text, flags=re.M)
    rows = {
        title: [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("|")]
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
    }
    return {title: found for title, found in rows.items() if found}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A dense model with a card, and what was pruned from it: `slim`, and `uneven` with widths of its own by layer."""
    folder = tmp_path_factory.mktemp("cards")
    build("llama-tied").save_pretrained(folder / "dense")
    (folder / "dense" / "README.md").write_text("---\nlicense: other\nlicense_name: artistic\n---\nA model.\n")
    domains = [DomainConfig("a", documents(240)), DomainConfig("b", documents(240, seed=1), weight=3.0)]
    for name, fields in (("slim", {}), ("uneven", {"widths": {"mlp": [20, 30]}})):
        pruner = StructPruner(config(domains=domains, num_samples=240, **fields))
        pruned = pruner.prune_model(AutoModelForCausalLM.from_pretrained(folder / "dense"), tokenizer())
        pruner.save(pruned, folder / name, tokenizer())
    return folder


def test_it_says_what_the_records_say(desk):
    card, report = ModelCard.load(desk / "slim" / "README.md"), Report.load(desk / "slim" / "report.json")
    assert card.data.library_name == "transformers" and "structured-pruning" in card.data.tags
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "artistic", None)
    found = tables(card.text)
    dense, pruned = report.dense.parameters, report.pruned.parameters
    assert found["Size"][2] == ["FFN channels per layer", "40", "24", "-40.0%"]
    assert found["Size"][3] == ["parameters", f"{dense:,}", f"{pruned:,}", f"{pruned / dense - 1:+.1%}"]
    assert "FFN channels: 40 → 24 (-40.0%) in each of 2 layers." in card.text
    assert found["Losses"][2:] == [[escaped(cell) for cell in row] for row in loss_table(report)[1:]]
    verdict = str(judge(report))
    assert f"**Verdict: {escaped(verdict[0].upper() + verdict[1:])}.**" in card.text
    assert [row[2] for row in found["Calibration domains"][2:]] == ["0.25", "0.75"]
    assert "settings are in structprune\\_config.json." in card.text
    assert "`" not in re.sub(r"```.*?```", "", card.text, flags=re.S).replace("`convert_hf_to_gguf.py`", "")


def test_licence_base_model_and_data_sets_come_from_where_they_are_known(desk, tmp_path, monkeypatch):
    out, slim = shutil.copytree(desk / "slim", tmp_path / "out"), AutoConfig.from_pretrained(desk / "slim")
    origins = ["owner/data", "imdb", "builtin:prose", "notes.jsonl", "memory:list", str(tmp_path), "self:code"]
    manifest = json.loads((out / "calibration_manifest.json").read_text())
    entries = [{**manifest["domains"][0], "origin": {"source": source}} for source in origins]
    (out / "calibration_manifest.json").write_text(json.dumps({**manifest, "domains": entries}))
    report = results.report({"a": inf})
    report.dense, report.pruned = SizeResult(20, 10, 80), SizeResult(10, 5, 40)
    report.widths, report.dense_widths = {"mlp": {0: 3, 1: 4}}, {"mlp": 8}
    report.save(out / "report.json")
    mit = ModelCard("---\nlicense: mit\n---\n")
    monkeypatch.setattr(ModelCard, "load", lambda name: mit if "/" in name else 1 / 0)
    card = ModelCard(model_card(out, "out", slim, "owner/model"))
    assert (card.data.base_model, card.data.license) == ("owner/model", "mit")
    assert card.data.datasets == ["imdb", "owner/data"]
    assert "This is owner/model, pruned. It has 50.0% fewer parameters" in card.text
    assert tables(card.text)["Size"][2][:3] == ["FFN channels per layer", "8", "3-4"]
    unknown = ModelCard(model_card(out, "out", slim, "gone"))
    assert unknown.data.license is None and "Unknown: the card of gone names no licence" in unknown.text
    report.model = DenseModel("owner/model", base_model="maker/model", license="mpl-2.0")
    report.save(out / "report.json")
    named = ModelCard(model_card(out, "out", slim))
    assert (named.data.base_model, named.data.license) == ("maker/model", "mpl-2.0")
    report.model = DenseModel()
    report.save(out / "report.json")
    cached = "/home/me/hub/models--owner--model/snapshots/0123"
    assert ModelCard(model_card(out, "out", slim, cached)).data.base_model == "owner/model"


@pytest.mark.slow
def test_the_snippets_run_without_this_package(desk):
    code = "import sys\nsys.modules['optimum_structprune'] = None\n"
    for name in ("slim", "uneven"):
        code += re.search(r"```python\n(.*?)```", (desk / name / "README.md").read_text(), re.S)[1]
    assert len(ran([sys.executable, "-c", code], cwd=desk).splitlines()) == 2


def test_a_non_uniform_result_says_what_it_needs_and_a_padded_one_that_it_needs_nothing(desk, tmp_path):
    slim, uneven = ((desk / name / "README.md").read_text() for name in ("slim", "uneven"))
    assert "trust_remote_code=True" in uneven and "structprune export" in uneven and "does not load" in uneven
    assert "trust_remote_code" not in slim.partition("## Size")[0] and "optimum-structprune is not needed" in slim
    assert "`convert_hf_to_gguf.py` works" in slim
    export_uniform(AutoModelForCausalLM.from_pretrained(desk / "uneven"), tmp_path / "padded")
    assert "README.md" in written_files(tmp_path / "padded")
    assert ModelCard.load(tmp_path / "padded" / "README.md").data.license_name == "artistic"
    padded = (tmp_path / "padded" / "README.md").read_text().partition("## Size")[0]
    assert "trust_remote_code=True" not in padded and "padded with zeros" in padded and "zeros" not in slim + uneven


ACTIVE = ("![t](https://e.vil/t.png)", "[win](javascript:alert(1))", "<b>bold</b>", "<https://e.vil>", "`` ` ```")
ACTIVE += ("\n```\n![x](y)\n", "\n\n# Title\n\n", "**a** ~~b~~ _c_", "&lt;b>", "\\", "|", "[a]: https://e.vil")
ACTIVE += ("www.e.vil", "me@e.vil", "ftp://e.vil")


def card_of(result, place, words):
    """The card of a result in which all that somebody else has named or said is these words."""
    name = f"of {words}".replace("/", ":").replace("\0", "")
    folder, dense = shutil.copytree(result, Path(place, name)), Path(place, f"dense {name}")
    dense.mkdir()
    licence = yaml.safe_dump({"license": "other", "license_name": words, "base_model": name})
    (dense / "README.md").write_text(f"---\n{licence}---\n")
    replace_text(dense / LIST_NAME, to_json({"files": {"README.md": ""}}))
    answer = Answer(words, right=True, loops=False, stopped=True)
    questions = [AnsweredQuestion(words, words, {"dense": answer, words: answer})]
    domains = {words: DomainResult(results.figure(1.5), tokens=9, documents=90)}

    report = Report.load(folder / "report.json")
    report.model.name = str(dense)
    report.answers = AnswersResult(questions)
    report.domains = domains
    report.trimmed = TrimResult(9, 0.1, {words: 3}, unreadable={words: 1}, scripts={words: 1})
    report.widths["vocab"], report.dense_widths["vocab"] = {-1: 5}, 14
    report.save(folder / "report.json")
    evaluation = Evaluation(words, words, prefix=words, domains=domains, calibrated=[], warnings=[words])
    evaluation.save(folder / "evaluation.json")
    timing = Timing([1.0], 1.0, Spread(1.0, 1.0, 1.0))
    timings = {words: {"dense": timing, words: timing}}
    memory = {words: {"dense": 2, words: 1}}
    Speed(timings, timings, memory, 1, 1, 1, words, words, words).save(folder / "speed.json")

    manifest = Manifest.load(folder)
    entry = replace(manifest.domains[0], name=words, origin={"source": words})
    replace(manifest, domains=[entry]).save(folder / "calibration_manifest.json")
    settings = json.loads((folder / "structprune_config.json").read_text())
    domain = {"name": words, "source": words, "weight": 1.0}
    settings = {**settings, "domains": [domain], "general_text": words}
    (folder / "structprune_config.json").write_text(json.dumps(settings))
    return model_card(folder, folder.name, AutoConfig.from_pretrained(folder))


def parsed(card):
    """How often each thing that Markdown knows stands in a card, and addresses that GitHub and the Hub link to."""
    reader, tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("text_join"), []
    for block in reader.parse(re.split("^---$", card, maxsplit=2, flags=re.M)[2]):
        tokens += [block, *(block.children or ())]
    texts = [token.content for token in tokens if token.type == "text"]
    bare = sum(len(re.findall(r"(?i)(https?|ftp)://|www\.|\w@\w", text)) for text in texts)
    kinds = Counter(token.type for token in tokens if token.type not in ("text", "text_special", "softbreak"))
    return {**kinds, "bare": bare}


@pytest.fixture(scope="module")
def harmless(desk, tmp_path_factory):
    return parsed(card_of(desk / "slim", tmp_path_factory.mktemp("harmless"), "some words"))


@settings(max_examples=40)
@given(st.lists(st.sampled_from(ACTIVE) | st.text(max_size=6), min_size=1, max_size=4).map("".join).filter(str.strip))
@example("\n```\n![x](y)\n")
@example("".join(ACTIVE))
def test_what_others_have_named_and_said_is_nothing_but_text(desk, harmless, words):
    with tempfile.TemporaryDirectory() as place:
        assert parsed(card_of(desk / "slim", place, words)) == harmless


def test_lists_of_a_dense_card_are_taken_over_and_a_short_one_makes_no_long_one(desk, tmp_path):
    out = shutil.copytree(desk / "slim", tmp_path / "out")
    report = Report.load(out / "report.json")
    report.model.name = str(tmp_path)
    report.save(out / "report.json")

    def made(head):
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
        return model_card(out, 'odd"\\name', AutoConfig.from_pretrained(out))

    card = ModelCard(made("license: [mit, apache-2.0]\nlanguage: [de, en]"))
    assert (card.data.language, card.data.license) == (["de", "en"], ["mit", "apache-2.0"])
    assert "mit, apache-2.0" in card.text
    compile(re.search(r"```python\n(.*?)```", card.text, re.S)[1], "snippet", "exec")
    # Each line of its YAML names the one before nine times.
    lines = ["x0: &x0 [a]", *(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 8))]
    assert len(made("\n".join([*lines, "license: *x7", "language: *x7"]))) < 100_000


def test_a_result_of_sentence_transformers_is_found_and_loaded_as_one(desk, tmp_path):
    out = shutil.copytree(desk / "slim", tmp_path / "out")
    (out / "modules.json").write_text("[]")
    about = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    about |= {"tags": ["feature-extraction"]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(about)}---\n")
    report = Report.load(out / "report.json")
    report.model.name = str(tmp_path)
    report.save(out / "report.json")
    kinds = {None: "SentenceTransformer", "SparseEncoder": "SparseEncoder", "CrossEncoder": "CrossEncoder"}
    for kind, loads in {**kinds, "x; y": "SentenceTransformer"}.items():
        (out / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
        card = ModelCard(model_card(out, "out", AutoConfig.from_pretrained(out)))
        assert f"from sentence_transformers import {loads}\n" in card.text and f"model = {loads}(name)" in card.text
        assert (card.data.library_name, card.data.pipeline_tag) == (about["library_name"], about["pipeline_tag"])
        assert {"feature-extraction", "structured-pruning"} <= {*card.data.tags}
    (out / "modules.json").unlink()
    plain = ModelCard(model_card(out, "out", AutoConfig.from_pretrained(out)))
    assert plain.data.library_name == "transformers" and "feature-extraction" not in plain.data.tags
