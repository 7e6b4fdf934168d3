"""The model card of a result: what it says, that its snippet runs, and whose it is."""

import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from math import nan
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from helpers import ran
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from models import build, config, documents, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune import DomainConfig, StructPruner, export_uniform
from optimum_structprune.record.remarks import verdict
from optimum_structprune.record.table import escaped, quality_rows
from optimum_structprune.saving.card import chart, model_card
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
    card, report = ModelCard.load(desk / "slim" / "README.md"), json.loads((desk / "slim/report.json").read_text())
    assert card.data.library_name == "transformers" and "structured-pruning" in card.data.tags
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "artistic", None)
    found = tables(card.text)
    counts = report["parameters"]
    change = f"{counts['after'] / counts['before'] - 1:+.1%}"
    assert found["Size"][3] == ["parameters", f"{counts['before']:,}", f"{counts['after']:,}", change]
    assert found["Size"][2] == ["width mlp", "40", "24", "-40.0%"]
    assert "16 of 40 FFN channels (40 %) in each of 2 layers are gone" in card.text
    rows = [row.cells()[:4] for row in quality_rows(report) if row.cells()[0].startswith("perplexity")]
    assert found["What it loses and gains"][2:4] == rows[:2]
    *figures, advice = map(escaped, verdict(report))
    assert f"{figures[0]}." in card.text and f"**{advice[0].upper()}{advice[1:]}.**" in card.text
    assert [row[2] for row in found["Calibrated on"][2:]] == ["0.25", "0.75"]
    assert "settings are in `structprune_config.json`." in card.text


def test_licence_base_model_and_data_sets_come_from_where_they_are_known(desk, tmp_path, monkeypatch):
    out, slim = shutil.copytree(desk / "slim", tmp_path / "out"), AutoConfig.from_pretrained(desk / "slim")
    origins = ["owner/data", "imdb", "builtin:prose", "notes.jsonl", "memory:list", str(tmp_path), "self:code"]
    manifest = json.loads((out / "calibration_manifest.json").read_text())
    entries = [{**manifest["domains"][0], "origin": {"source": source}} for source in origins]
    (out / "calibration_manifest.json").write_text(json.dumps({**manifest, "domains": entries}))
    report = {"model_type": "llama", "criterion": "wanda", "perplexity": {"a": {"before": 2.0, "after": None}}}
    report |= {"parameters": {"before": 20, "after": 10}, "layer_parameters": {"before": 10, "after": 5}}
    report |= {"widths": {"mlp": {"0": 3, "1": 4}}, "dense_widths": {"mlp": 8}}
    (out / "report.json").write_text(json.dumps(report))
    mit = ModelCard("---\nlicense: mit\n---\n")
    monkeypatch.setattr(ModelCard, "load", lambda name: mit if "/" in name else 1 / 0)
    card = ModelCard(model_card(out, "out", slim, "owner/model"))
    assert (card.data.base_model, card.data.license) == ("owner/model", "mit")
    assert card.data.datasets == ["imdb", "owner/data"]
    assert "This is owner/model after" in card.text and "(-50.0%)" in card.text
    assert tables(card.text)["Size"][2][:3] == ["width mlp", "8", "3-4"]
    unknown = ModelCard(model_card(out, "out", slim, "gone"))
    assert unknown.data.license is None and "Unknown: the card of gone names no licence" in unknown.text
    told = {"name": "owner/model", "base_model": "maker/model", "license": "mpl-2.0"}
    (out / "report.json").write_text(json.dumps({**report, "model": told}))
    named = ModelCard(model_card(out, "out", slim))
    assert (named.data.base_model, named.data.license) == ("maker/model", "mpl-2.0")
    (out / "report.json").write_text(json.dumps(report))
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
    assert "trust_remote_code=True" not in padded and "filled up with zeros" in padded and "zeros" not in slim + uneven


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
    answer = {"text": words, "right": True, "loops": False, "stopped": True}
    item = {"kind": words, "prompt": words, "answers": {"dense": answer, words: answer}}
    time = {"tokens_per_second": 1.0, "speedup": {"median": 1.0, "low": 1.0, "high": 1.0}}
    speeds = {words: {"dense": time, words: time}}
    how = dict.fromkeys(("device", "threads", "clock", "repeats", "new_tokens", "memory_is"), words)
    domain, ratio = {"name": words, "source": words, "weight": 1.0}, {"dense": 2.0, "model": 3.0}
    report = {"answers": [item], "scripts": {words: 1}, "model": {"name": str(dense)}}
    for record, values in {
        "report.json": {**report, "perplexity": {words: {"before": 2.0, "after": 3.0}}},
        "structprune_config.json": {"domains": [domain], "general_text": words},
        "calibration_manifest.json": {"domains": [{"calibration_tokens": 9, **domain, "origin": domain}]},
        "evaluation.json": {"perplexity": {words: ratio}, "figures": {"model": {words: 0.5}}, "tasks": {words: {}}},
        "speed.json": {"prefill": speeds, "run_memory": {words: {"dense": 2, words: 1}}, **how},
    }.items():
        path = folder / record
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
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
    report = {**json.loads((out / "report.json").read_text()), "model": {"name": str(tmp_path)}}
    (out / "report.json").write_text(json.dumps(report))

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
    report = {**json.loads((out / "report.json").read_text()), "model": {"name": str(tmp_path)}}
    (out / "report.json").write_text(json.dumps(report))
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


# --- the picture: each kind of text and language where it stands, as XML that nothing runs in
def report(ratios: dict[str, float], margin: float | None = 0.1, other: float | None = None) -> dict:
    """A report of perplexities that grew from 10 by these factors."""
    grown = {name: {"before": 10.0, "after": 10.0 * ratio} for name, ratio in ratios.items()}
    margins = {name: {"ratio": margin} for name in ratios}
    found = {"parameters": {"before": 9, "after": 8}, "perplexity": grown, "perplexity_margin": margins}
    if other is not None:
        text = {"source": "model-written", "tokens": 9, "documents": 9, "margin": {"ratio": margin}}
        found["other"] = {**text, "perplexity": {"before": 10.0, "after": 10.0 * other}}
    return found


def drawn(svg: str) -> list[tuple[str, float, str]]:
    """The colour, the place from the left, and the number of each value, from top to bottom."""
    parts = [*ElementTree.fromstring(svg)]
    circles = [place for place, part in enumerate(parts) if part.tag.endswith("}circle")]
    return [(parts[place].get("fill"), float(parts[place].get("cx")), parts[place + 1].text) for place in circles]


@given(
    st.dictionaries(st.text(min_size=1, max_size=30, alphabet="a<&é \"'"), st.floats(0.5, 9), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.0, nan, None]),
    st.floats(0.5, 9),
)
@example({"other text, a": 1.0}, None, 2.0)
def test_what_loses_more_stands_farther_right_and_other_text_has_its_own_colour(ratios, margin, other):
    svg = chart(report(ratios, margin, other))
    marks = drawn(svg)
    assert "<script" not in svg and "href" not in svg and "prefers-color-scheme:dark" in svg
    values = [*ratios.values(), other]
    assert len(marks) == len(values) and len({colour for colour, *_ in marks}) == 2
    assert marks[-1][0] != marks[0][0] and all(100 < place < 260 for _, place, _ in marks)
    by_value = sorted(zip(values, (place for _, place, _ in marks), strict=True))
    assert [place for _, place in by_value] == sorted(place for _, place in by_value)
    assert all(("±" in number) == bool(margin and margin == margin) for *_, number in marks)


LANGUAGES = {code: {"before": 1.0, "after": after, "wanted": False} for code, after in (("de", 1.2), ("fr", 1.0))}
COSINES = {
    code: {"before": 9, "after": 9, "wanted": True, "cosine": value, "cosine_margin": 0.01}
    for code, value in {"de": 0.9, "ru": 0.7}.items()
}
VECTORS = {"a": {"before": {}, "after": {"cosine": 0.99, "cosine_margin": 0.002}}}
TRAINED = {"perplexity": {"a": {"dense": 10.0, "pruned": 15.0, "recovered": 11.0}}}


@pytest.mark.parametrize(("record", "names", "numbers"), [
    ({**report({"a": 1.0}), "languages": LANGUAGES}, ["a", "German"], None),
    ({"embeddings": VECTORS, "languages": COSINES, "parameters": report({})["parameters"]}, ["a", "Russian", "German"],
     ["0.990 ± 0.002", "0.70 ± 0.01", "0.90 ± 0.01"]),
    ({**report({"a": 1.5}, other=2.0), "recovery": TRAINED}, ["a"], ["1.10"]),
    (report({"customer_support_tickets": 1.0, "a\x1b\0b": 1.0}), ["customer_suppo…", "a\ufffd\ufffdb"], None),
], ids=["languages that lose", "cosines of an encoder", "after a training", "odd names"])  # fmt: skip
def test_what_is_drawn(record, names, numbers):
    svg = chart(record)
    assert all(name in svg for name in names) and "French" not in svg and len(drawn(svg)) == len(names)
    assert numbers in (None, [number for *_, number in drawn(svg)])
    assert "" == chart({}) == chart(report({})) == chart(report({"a": float("inf")}))
