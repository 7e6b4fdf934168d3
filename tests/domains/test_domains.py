"""Presets, templates, masks, and the manifest of what was calibrated on."""

import json
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from unittest.mock import Mock

import datasets
import pytest
import torch
import yaml
from helpers import today_is, whole_model_at_once, write_texts
from models import build, config, real_text_model, token_ids, tokenizer

from optimum_structprune import DomainConfig, Manifest, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.arch.hooks import observe
from optimum_structprune.arch.load import describe
from optimum_structprune.config.domains import PRESET
from optimum_structprune.domains.generated import self_documents
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import CALIBRATED, JUDGED
from optimum_structprune.domains.packing import Domain, SampleFormat, document_hash, tokenised
from optimum_structprune.domains.sources import documents, presets, resolve
from optimum_structprune.domains.templates import DATES, chat_text, rendered
from optimum_structprune.evaluation.answers import read_questions
from optimum_structprune.method.layers import Batch, run_model
from optimum_structprune.sources.data import source_of


CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
MESSAGES = [
    {"role": "user", "content": " user? "},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "a longer answer "},
]
# The columns of the data sets behind the presets, as their pages on the Hub describe them, where they are not texts.
ROWS = {
    "code": {"repo_name": "r", "path": "p", "content": "t", "license": "mit"},
    "math": {"question": "q", "answer": "a"},
    "dialogue": {"prompt": "user?", "prompt_id": "0", "messages": MESSAGES},
    "instruction": {"messages": MESSAGES, "source": "s"},
    "medicine": {"pubid": 1, "question": "q", "context": {"contexts": ["c"]}, "long_answer": "a"},
    "multilingual": {"inputs": "q", "targets": "a", "language": "French", "language_code": "fra"},
    "abstracts": {"id": "1", "title": "T", "abstract": "t", "categories": ["c"]},
    "database": {"answer": "a", "question": "q", "context": "c"},
}
TEXT = dict.fromkeys(("math", "medicine"), "Question: q\nAnswer: a")
TEXT |= {"multilingual": "q\na", "abstracts": "T\n\nt", "database": "c\n-- q\na"}


def chatty(template: str | None):
    reader = tokenizer()
    reader.chat_template = template
    return reader


@pytest.mark.parametrize("name", [name for name, entry in presets().items() if "mix" not in entry])
def test_a_preset_streams_from_the_hub(name, monkeypatch):
    rows = datasets.Dataset.from_list([ROWS.get(name, {"text": "t", "title": "T"})])
    hub = Mock(return_value=rows.to_iterable_dataset())
    monkeypatch.setattr(datasets, "load_dataset", hub)
    (domain,) = resolve([DomainConfig("mine", f"preset:{name}", weight=2)])
    chat = "".join(f"<|{m['role']}|>{m['content']}</s>\n" for m in MESSAGES)
    assert list(documents(domain, 0, chatty(CHATML))) == [chat if domain.template == "chat" else TEXT.get(name, "t")]
    fields = {"split": "test", "template": "{answer}", "revision": "abc"}
    (other,) = resolve([DomainConfig("m", f"preset:{name}", **fields)])
    assert {name: getattr(other, name) for name in fields} == fields, "a domain's own fields go before the preset's"
    entry = presets()[name]
    assert (domain.name, domain.weight) == ("mine", 2) and entry["licence"]
    where = (entry["source"], entry.get("dataset_config"))
    hub.assert_called_once_with(*where, split=entry.get("split", "train"), streaming=True, revision=None)


def test_presets_of_ones_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"w{i} w{i + 1}"}) + "\n" for i in range(3, 80)))
    own = {"code": {"source": str(tmp_path / "a.jsonl"), "text_column": "body"}, "both": {"mix": ["code", "math"]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    both = resolve([DomainConfig("x", f"preset:{tmp_path / 'own.yaml'}#both", weight=3)])
    assert all(len(resolve([DomainConfig("m", f"{PRESET}{name}")])) > 8 for name in ("hybrid", "general"))
    sources = [("x-code", 1.5, str(tmp_path / "a.jsonl")), ("x-math", 1.5, "openai/gsm8k")]
    assert [(part.name, part.weight, part.source) for part in both] == sources
    asked = config(domains=[DomainConfig("x", f"preset:{tmp_path / 'own.yaml'}#code")], num_samples=2)
    (domain,) = load_domains(StructPruneConfig.from_dict(asked.to_dict()), tokenizer())
    assert domain.samples.shape == (2, 24)


@pytest.mark.parametrize(("entries", "source", "message"), [
    ({}, "preset:cod", "The preset 'cod' does not exist. Did you mean 'code'"),
    ({"a": {"mix": ["hybrid"]}}, "preset:a", "is a mix itself"),
    ({"a": {"mix": ["cod"]}}, "preset:a", "The preset 'cod' does not exist"),
    ({"a": {"licence": "MIT"}}, "preset:a", "'a' needs a source, or a mix"),
    ({"a": {"source": "x", "spilt": "y"}}, "preset:a", "no field 'spilt'. Did you mean 'split'"),
])  # fmt: skip
def test_presets_that_will_not_do(tmp_path, entries, source, message):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(StructPruneError, match=message):
        resolve([DomainConfig("d", source.replace(":", f":{tmp_path / 'own.yaml'}#"))])
    with pytest.raises(StructPruneError, match="Two domains are named 'd-code'"):
        resolve([DomainConfig("d", "preset:hybrid"), DomainConfig("d-code", "builtin:code")])


def test_a_text_template_is_filled_with_columns():
    rows = [{"q": "what {x}?", "a": "that"}, {"q": None, "a": "this"}]
    found = sorted(documents(DomainConfig("d", rows, template="Q: {q}\nA: {a} {{end}}"), 0))
    assert found == ["Q: \nA: this {end}", "Q: what {x}?\nA: that {end}"]


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_chat_template_is_followed(template):
    reader = chatty(template)
    (text,) = documents(DomainConfig("d", [{"messages": MESSAGES}], template="chat"), 0, reader)
    if template is None:
        assert text.startswith("User:  user? \n\nAssistant: assistant\n\nUser: more")
    else:
        assert text == reader.apply_chat_template(MESSAGES, tokenize=False)


def test_conversations_of_every_form(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2
    rows.append({"conversations": []})  # which is skipped
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [{"type": "text", "text": "a"}, None, {"type": "image"}, "b", {"type": "text", "text": None}]
    said = {"role": "user", "content": parts}
    in_memory = [{"messages": [said]}, {"messages": said}]
    for source, text in ((str(tmp_path), "<|user|>a</s>\n<|assistant|>b</s>\n"), (in_memory, "<|user|>ab</s>\n")):
        assert [*documents(DomainConfig("d", source, template="chat"), 0, chatty(CHATML))] == [text] * 2
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    silent, calls = {"role": "assistant", "content": None}, "{{ messages[0].tool_calls[0].function.name }}"
    for message, template, text in ((called, calls, "f"), (silent, CHATML, "<|assistant|></s>\n")):
        domain = DomainConfig("d", [{"messages": [message]}], template="chat")
        assert [*documents(domain, 0, chatty(template))] == [text]


def test_rows_and_fields_that_will_not_do():
    needs = "'d': a message needs a role and a text, got "
    for row, template, message in (
        ({"a": 1}, "chat", "no column of messages. Set `text_column`.* Known: a"),
        ({"messages": [{"role": "user"}]}, "chat", needs + "{'role': 'user'}"),
        ({"messages": ["hello"]}, "chat", needs + "'hello'"),
        ({"messages": 5}, "chat", needs + "5"),
        ({"messages": [{"role": "user", "content": [3]}]}, "chat", needs + r"{'role': 'user', 'content': \[3"),
        ({"q": "x"}, "{q} {answer}", "no column 'answer'. Set `template`"),
        ({"q": 3}, "{q}", r"the column 'q' holds the int 3\.$"),
        ({"q": []}, "{q}", r"the column 'q' holds the list \[\]. Use `template='chat'`"),
        (None, "no field", "'chat' or hold column names"),
        (None, "{a.b}", "field 'a.b' of the template .* is not a column name"),
        (None, "{a!r}", "is not a column name"),
    ):
        with pytest.raises(StructPruneError, match=message):
            domain = DomainConfig.from_dict({"name": "d", "source": "a.txt", "template": template})
            list(documents(replace(domain, source=[row]), 0, chatty(CHATML)))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("case", ["llama-tied", "opt", "mixtral"])
def test_moments_are_of_the_batches_that_count(case, at_once):
    model = build(case)
    arch = describe(model)
    ids = token_ids(4, 12)
    space = next(space for space in arch.at(0) if space.experts is None)
    seen = []
    with observe(model, [space.consumers[0].module], lambda _, x: seen.append(x)), torch.no_grad():
        run_model(model, ids)
    wanted = seen[0].reshape(48, -1)[:36]
    with whole_model_at_once() if at_once else nullcontext():
        source = source_of(model, arch, [Batch(0, ids[:3]), Batch(0, ids[3:], counts=False)])
    ((found,),) = source.moments(0, space, gram=True)
    assert found.count == 36
    assert torch.allclose(found.gram, wanted.T @ wanted / len(wanted), atol=1e-5)
    assert torch.allclose(found.mean.float(), wanted.mean(0), atol=1e-5)
    inner = [space for space in arch.at(0) if space.experts is not None and space.inside]
    # Two of the experts see each token.
    assert sum([next(source.moments(0, space, gram=False))[0].count for space in inner]) == 2 * 36 * bool(inner)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    texts = [f"w{3 + i % 90} w{3 + i % 7} w{3 + i % 11} w{3 + i % 13}" for i in range(200)]
    write_texts(folder / "a.jsonl", texts)
    asked = config(domains=[DomainConfig("a", str(folder / "a.jsonl")), DomainConfig("b", texts[::2])])
    pruner = StructPruner(asked)
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder / "out")
    return folder, pruner


def test_a_manifest_is_saved_with_the_model_and_read_back(saved):
    folder, pruner = saved
    manifest = Manifest.load(folder / "out")
    assert manifest == Manifest.load(folder / "out" / "calibration_manifest.json")
    assert manifest.uses() == pruner.manifest.uses() and manifest.versions == pruner.manifest.versions
    assert manifest.domains[0].origin["source"] == "a.jsonl", "records name files without their folders"
    assert [entry.name for entry in manifest.of_use(CALIBRATED)] == ["a", "b"]
    assert manifest.domains[1].origin["source"] == "memory:list"
    same, other = (replace(pruner.config, seed=seed) for seed in (0, 1))
    read_again = Manifest.of(same, load_domains(same, tokenizer()), tokenizer())
    assert read_again == replace(manifest, domains=manifest.of_use(CALIBRATED))
    other = Manifest.of(other, load_domains(other, tokenizer()), tokenizer())
    assert other.domains[0].samples_sha256 != manifest.domains[0].samples_sha256


def test_overlaps_by_document_by_source_and_by_name(saved, monkeypatch):
    folder, pruner = saved
    manifest, entry = pruner.manifest, pruner.manifest.domains[0]
    assert manifest.overlaps("elsewhere", [document_hash("new")]) == []
    (one,) = manifest.overlaps("elsewhere", [entry.documents[0], document_hash("new")])[:1]
    assert one.startswith("1 of 2 documents were calibrated on, in the calibration domain 'a'")
    unused = [name for name in entry.heldout_documents if name not in pruner.manifest.domains[1].documents]
    assert "1 of 1 documents were held out" in manifest.overlaps("elsewhere", unused[:1])[0]
    monkeypatch.chdir(folder)
    for source in ("a", "a.jsonl", str(folder / "a.jsonl"), DomainConfig("z", "a.jsonl")):
        assert "has the name or the source" in manifest.overlaps(source)[0]
    judged = replace(entry, use=JUDGED, documents=[])
    assert manifest.with_entries([judged]).overlaps("a") == manifest.overlaps("a"), "nothing is said twice"
    (origin,), samples = resolve([DomainConfig("m", "preset:math")]), token_ids(2, 12)
    manifest = Manifest.of(config(), [Domain("m", 1.0, samples, samples, origin=origin)], None)
    train, test = (DomainConfig("x", "openai/gsm8k", dataset_config="main", split=s) for s in ("train", "test"))
    assert manifest.overlaps(train) and not manifest.overlaps(test), "another split is no overlap"


def test_a_frame_tells_which_documents_its_samples_hold():
    texts = ["w3 w4 w5 w6 w7", "w10 w11 w12 w13 w14 w15 w16", "w20 w21 w22", "w30"]
    for most, used in ((1, 1), (2, 2), (3, 2), (4, 3), (100, 3)):
        samples, hashes = SampleFormat(5, 1, 2).pack(tokenised(iter(texts), tokenizer()), most)
        words = {f"w{token}" for token in samples.flatten().tolist() if token > 2}
        assert [document_hash(text) for text in texts if words & set(text.split())] == [*hashes]
        assert (len(samples), len(hashes)) == (min(most, 4), used)


# --- what a chat template raises is one line that names it, and no day changes what it writes
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
DOMAIN = DomainConfig("d", [], template="chat")


@pytest.mark.parametrize("template", [
    "{{ raise_exception('system\nfirst') }}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ messages | unknown }}",
    "{% if %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    {"rag": PLAIN, "tool_use": PLAIN},
])  # fmt: skip
def test_whatever_a_template_raises_is_one_line_that_names_it(template):
    model, reader = real_text_model()
    reader.chat_template, reader.name_or_path = template, "some/model"
    for render in (
        lambda: chat_text(reader, CHAT),
        lambda: rendered({"messages": CHAT}, DOMAIN, reader),
        lambda: next(self_documents(model, reader, "dialogue", 0, tokens=64)),
        lambda: read_questions()[0].ids(reader),
    ):
        with pytest.raises(StructPruneError, match="chat template of 'some/model' does not accept") as caught:
            render()
        assert "\n" not in str(caught.value) and "Set `tokenizer.chat_template`" in str(caught.value)


@pytest.mark.parametrize("template", [
    "\n {% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}\n" + PLAIN,
    "{%- macro day(form) %}{{ strftime_now(form) }}{% endmacro %}{% set form = '%A, %-d %b %y' %}{{ day(form) }}"
    + PLAIN,
    "{{ strftime_now(\"%H:%M:%S\") }}{{ strftime_now('%Y') | int + 1 }}\n" + PLAIN,
    "  {%-if true %}\n{{ strftime_now('%F') }}\n  {%- endif %}" + PLAIN,
])  # fmt: skip
def test_a_template_writes_what_it_would_on_the_date_and_never_asks_the_clock(template, monkeypatch):
    reader = tokenizer()
    reader.chat_template = template
    for date in (DATES[0], datetime(2026, 9, 3, 14, 5)):
        today_is(monkeypatch, date)
        expected = reader.apply_chat_template(CHAT, tokenize=False)
        today_is(monkeypatch, datetime(1999, 1, 1, 9))
        assert chat_text(reader, CHAT, date=date) == expected
    assert rendered({"messages": CHAT}, DOMAIN, reader) == chat_text(reader, CHAT)


def test_the_dates_have_every_month_and_every_day_of_the_week():
    assert {date.month for date in DATES} == {*range(1, 13)} and {date.weekday() for date in DATES} == {*range(7)}
