"""Presets, chat templates, the samples that calibrate a model, and the manifest of its calibration text."""

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
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import CALIBRATED, JUDGED
from optimum_structprune.domains.packing import Domain, SampleFormat, document_hash, tokenised
from optimum_structprune.domains.sources import documents, presets, resolve
from optimum_structprune.domains.templates import DATES, chat_text, rendered
from optimum_structprune.evaluation.answers import read_questions
from optimum_structprune.method.layers import Batch, run_model
from optimum_structprune.steps.data import source_of


CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
MESSAGES = [
    {"role": "user", "content": " user? "},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "a longer answer "},
]
PRESETS_OF_ONE_DATASET = [name for name, entry in presets().items() if "mix" not in entry]
# The columns of the datasets behind the presets, as their pages on the Hub describe them.
TEXT_ROW = {"text": "t", "title": "T"}
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
# The text that a preset makes of its row. It is "t" for all other presets.
EXPECTED_TEXTS = {
    "math": "Question: q\nAnswer: a",
    "medicine": "Question: q\nAnswer: a",
    "multilingual": "q\na",
    "abstracts": "T\n\nt",
    "database": "c\n-- q\na",
}


def tokenizer_with_template(template):
    """Return the word tokenizer with a chat template."""
    chat_tokenizer = tokenizer()
    chat_tokenizer.chat_template = template
    return chat_tokenizer


# --- presets
@pytest.mark.parametrize("name", PRESETS_OF_ONE_DATASET)
def test_a_preset_streams_from_the_hub(name, monkeypatch):
    rows = datasets.Dataset.from_list([ROWS.get(name, TEXT_ROW)])
    load_dataset = Mock(return_value=rows.to_iterable_dataset())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = presets()[name]

    (domain,) = resolve([DomainConfig("mine", f"preset:{name}", weight=2)])
    texts = list(documents(domain, 0, tokenizer_with_template(CHATML)))

    expected = EXPECTED_TEXTS.get(name, "t")
    if domain.template == "chat":
        expected = "".join(f"<|{message['role']}|>{message['content']}</s>\n" for message in MESSAGES)
    assert texts == [expected]
    assert domain.name == "mine"
    assert domain.weight == 2
    assert entry["licence"]
    load_dataset.assert_called_once_with(
        entry["source"],
        entry.get("dataset_config"),
        split=entry.get("split", "train"),
        streaming=True,
        revision=None,
    )


@pytest.mark.parametrize("name", PRESETS_OF_ONE_DATASET)
def test_the_fields_of_a_domain_override_its_preset(name):
    fields = {"split": "test", "template": "{answer}", "revision": "abc"}

    (domain,) = resolve([DomainConfig("m", f"preset:{name}", **fields)])

    assert {field: getattr(domain, field) for field in fields} == fields


@pytest.mark.parametrize("name", ["hybrid", "general"])
def test_a_mix_of_presets_has_several_domains(name):
    assert len(resolve([DomainConfig("m", f"{PRESET}{name}")])) > 8


def test_presets_are_read_from_a_file_of_the_user(tmp_path):
    texts = tmp_path / "a.jsonl"
    rows = [{"body": f"w{number} w{number + 1}"} for number in range(3, 80)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    presets_file = tmp_path / "own.yaml"
    own_presets = {"code": {"source": str(texts), "text_column": "body"}, "both": {"mix": ["code", "math"]}}
    presets_file.write_text(yaml.safe_dump(own_presets))

    mix = resolve([DomainConfig("x", f"preset:{presets_file}#both", weight=3)])
    assert [(domain.name, domain.weight, domain.source) for domain in mix] == [
        ("x-code", 1.5, str(texts)),
        ("x-math", 1.5, "openai/gsm8k"),
    ]

    settings = config(domains=[DomainConfig("x", f"preset:{presets_file}#code")], num_samples=2)
    (domain,) = load_domains(StructPruneConfig.from_dict(settings.to_dict()), tokenizer())
    assert domain.samples.shape == (2, 24)


@pytest.mark.parametrize(("entries", "source", "message"), [
    ({}, "preset:cod", "The preset 'cod' does not exist. Did you mean 'code'"),
    ({"a": {"mix": ["hybrid"]}}, "preset:a", "is a mix itself"),
    ({"a": {"mix": ["cod"]}}, "preset:a", "The preset 'cod' does not exist"),
    ({"a": {"licence": "MIT"}}, "preset:a", "'a' needs a source, or a mix"),
    ({"a": {"source": "x", "spilt": "y"}}, "preset:a", "no field 'spilt'. Did you mean 'split'"),
])  # fmt: skip
def test_invalid_presets_are_refused(tmp_path, entries, source, message):
    presets_file = tmp_path / "own.yaml"
    presets_file.write_text(yaml.safe_dump(entries))

    with pytest.raises(StructPruneError, match=message):
        resolve([DomainConfig("d", source.replace(":", f":{presets_file}#"))])


def test_a_mix_with_a_domain_of_the_same_name_is_refused():
    with pytest.raises(StructPruneError, match="Two domains are named 'd-code'"):
        resolve([DomainConfig("d", "preset:hybrid"), DomainConfig("d-code", "builtin:code")])


# --- templates
def test_a_text_template_is_filled_with_columns():
    rows = [{"q": "what {x}?", "a": "that"}, {"q": None, "a": "this"}]
    domain = DomainConfig("d", rows, template="Q: {q}\nA: {a} {{end}}")

    assert sorted(documents(domain, 0)) == ["Q: \nA: this {end}", "Q: what {x}?\nA: that {end}"]


@pytest.mark.parametrize("template", [CHATML, None])
def test_messages_are_rendered_with_the_chat_template(template):
    chat_tokenizer = tokenizer_with_template(template)
    domain = DomainConfig("d", [{"messages": MESSAGES}], template="chat")

    (text,) = documents(domain, 0, chat_tokenizer)

    if template is None:
        assert text.startswith("User:  user? \n\nAssistant: assistant\n\nUser: more")
    else:
        assert text == chat_tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_conversations_with_senders_are_read_and_empty_ones_are_skipped(tmp_path):
    conversation = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    rows = [conversation, conversation, {"conversations": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    domain = DomainConfig("d", str(tmp_path), template="chat")

    texts = list(documents(domain, 0, tokenizer_with_template(CHATML)))

    assert texts == ["<|user|>a</s>\n<|assistant|>b</s>\n"] * 2


def test_only_the_text_of_a_message_in_parts_is_read():
    parts = [{"type": "text", "text": "a"}, None, {"type": "image"}, "b", {"type": "text", "text": None}]
    message = {"role": "user", "content": parts}
    rows = [{"messages": [message]}, {"messages": message}]
    domain = DomainConfig("d", rows, template="chat")

    texts = list(documents(domain, 0, tokenizer_with_template(CHATML)))

    assert texts == ["<|user|>ab</s>\n"] * 2


def test_messages_without_content_are_rendered():
    tool_call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    silent = {"role": "assistant", "content": None}
    # OpenAI leaves out the content of a message with tool calls.
    short_tool_call = {"role": "assistant", "tool_calls": tool_call["tool_calls"]}
    tool_template = "{{ messages[0].tool_calls[0].function.name }}"

    for message, template, expected in (
        (tool_call, tool_template, "f"),
        (short_tool_call, tool_template, "f"),
        (short_tool_call, CHATML, "<|assistant|></s>\n"),
        (silent, CHATML, "<|assistant|></s>\n"),
    ):
        domain = DomainConfig("d", [{"messages": [message]}], template="chat")
        assert list(documents(domain, 0, tokenizer_with_template(template))) == [expected]


def test_reasoning_and_tools_are_rendered(tmp_path):
    template = (
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.content }}{% endfor %}"
        "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    )
    thought = {"messages": [{"role": "assistant", "content": "c", "reasoning_content": "r", "thinking": "t"}]}
    tools_of_rows = [[{"name": "f"}, {"name": "g"}], [], None, "f", ["f"]]
    rows = [thought | {"tools": tools} for tools in tools_of_rows]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows[0]))

    for source, expected in ((rows + [thought], ["rtc"] * 5 + ["rtc[f][g]"]), (str(path), ["rtc[f][g]"])):
        domain = DomainConfig("d", source, template="chat")
        assert sorted(documents(domain, 0, tokenizer_with_template(template))) == expected


def test_invalid_rows_and_templates_are_refused():
    invalid_message = "'d': a message needs a role and a text, got "

    for row, template, message in (
        ({"a": 1}, "chat", "no column of messages. Set `text_column`.* Known: a"),
        ({"messages": [{"role": "user"}]}, "chat", invalid_message + "{'role': 'user'}"),
        ({"messages": ["hello"]}, "chat", invalid_message + "'hello'"),
        ({"messages": 5}, "chat", invalid_message + "5"),
        (
            {"messages": [{"role": "user", "content": [3]}]},
            "chat",
            invalid_message + r"{'role': 'user', 'content': \[3",
        ),
        ({"q": "x"}, "{q} {answer}", "no column 'answer'. Set `template`"),
        ({"q": 3}, "{q}", r"the column 'q' holds the int 3\.$"),
        ({"q": []}, "{q}", r"the column 'q' holds the list \[\]. Use `template='chat'`"),
        (None, "no field", "'chat' or hold column names"),
        (None, "{a.b}", "field 'a.b' of the template .* is not a column name"),
        (None, "{a!r}", "is not a column name"),
    ):
        with pytest.raises(StructPruneError, match=message):
            domain = DomainConfig.from_dict({"name": "d", "source": "a.txt", "template": template})
            list(documents(replace(domain, source=[row]), 0, tokenizer_with_template(CHATML)))


# --- samples
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("case", ["llama-tied", "opt", "mixtral"])
def test_moments_include_only_batches_that_count(case, at_once):
    model = build(case)
    arch = describe(model)
    ids = token_ids(4, 12)
    space = next(space for space in arch.at(0) if space.experts is None)
    inputs = []
    with observe(model, [space.consumers[0].module], lambda _, x: inputs.append(x)), torch.no_grad():
        run_model(model, ids)
    # The first three of the four samples.
    expected = inputs[0].reshape(48, -1)[:36]

    context = nullcontext()
    if at_once:
        context = whole_model_at_once()
    with context:
        source = source_of(model, arch, [Batch(0, ids[:3]), Batch(0, ids[3:], counts=False)])

    ((moments,),) = source.moments(0, space, gram=True)
    assert moments.count == 36
    assert torch.allclose(moments.gram, expected.T @ expected / len(expected), atol=1e-5)
    assert torch.allclose(moments.mean.float(), expected.mean(0), atol=1e-5)

    expert_spaces = [space for space in arch.at(0) if space.experts is not None and space.inside]
    counts = [next(source.moments(0, space, gram=False))[0].count for space in expert_spaces]
    if expert_spaces:
        # Each token is routed to two of the experts.
        assert sum(counts) == 2 * 36


def test_packing_returns_the_documents_in_the_samples():
    texts = ["w3 w4 w5 w6 w7", "w10 w11 w12 w13 w14 w15 w16", "w20 w21 w22", "w30"]

    for max_samples, num_documents in ((1, 1), (2, 2), (3, 2), (4, 3), (100, 3)):
        samples, hashes = SampleFormat(5, 1, 2).pack(tokenised(iter(texts), tokenizer()), max_samples)

        words = {f"w{token}" for token in samples.flatten().tolist() if token > 2}
        texts_in_samples = [text for text in texts if not words.isdisjoint(text.split())]
        assert list(hashes) == [document_hash(text) for text in texts_in_samples]
        assert len(samples) == min(max_samples, 4)
        assert len(hashes) == num_documents


def test_samples_of_a_template_that_writes_bos_have_one_bos():
    texts = [f"<s> w{3 + i} w{4 + i} w{5 + i}" for i in range(4)]

    (document, *_) = tokenised(iter(texts), tokenizer())
    samples, _ = SampleFormat(9, 1, 2).pack(tokenised(iter(texts), tokenizer()), 100)

    assert document.ids == [3, 4, 5]
    assert samples[:, 0].tolist() == [1] * len(samples)
    assert (samples == 1).sum() == len(samples)


# --- manifests
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a saved pruning and its pruner."""
    folder = tmp_path_factory.mktemp("manifest")
    texts = [f"w{3 + i % 90} w{3 + i % 7} w{3 + i % 11} w{3 + i % 13}" for i in range(200)]
    write_texts(folder / "a.jsonl", texts)
    domains = [DomainConfig("a", str(folder / "a.jsonl")), DomainConfig("b", texts[::2])]

    pruner = StructPruner(config(domains=domains))
    pruned = pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.save(pruned, folder / "out")
    return folder, pruner


def test_a_manifest_is_saved_with_the_model(saved):
    folder, pruner = saved

    manifest = Manifest.load(folder / "out")

    assert manifest == Manifest.load(folder / "out" / "calibration_manifest.json")
    assert manifest.uses() == pruner.result.manifest.uses()
    assert manifest.versions == pruner.result.manifest.versions
    assert [entry.name for entry in manifest.with_use(CALIBRATED)] == ["a", "b"]
    assert manifest.domains[0].origin["source"] == "a.jsonl", "records name files without their folders"
    assert manifest.domains[1].origin["source"] == "memory:list"


def test_a_manifest_is_reproducible_and_depends_on_the_seed(saved):
    folder, pruner = saved
    manifest = Manifest.load(folder / "out")
    manifests = []
    for seed in (0, 1):
        settings = replace(pruner.config, seed=seed)
        manifests.append(Manifest.of(settings, load_domains(settings, tokenizer()), tokenizer()))

    assert manifests[0] == replace(manifest, domains=manifest.with_use(CALIBRATED))
    assert manifests[1].domains[0].samples_sha256 != manifest.domains[0].samples_sha256


def test_shared_documents_are_an_overlap(saved):
    _, pruner = saved
    manifest = pruner.result.manifest
    entry = manifest.domains[0]

    assert manifest.overlaps("elsewhere", [document_hash("new")]) == []

    sentence = manifest.overlaps("elsewhere", [entry.documents[0], document_hash("new")])[0]
    assert sentence.startswith("1 of 2 documents were calibrated on, in the calibration domain 'a'")

    heldout_only = [name for name in entry.heldout_documents if name not in manifest.domains[1].documents]
    assert "1 of 1 documents were held out" in manifest.overlaps("elsewhere", heldout_only[:1])[0]


def test_a_shared_name_or_source_is_an_overlap(saved, monkeypatch):
    folder, pruner = saved
    manifest = pruner.result.manifest
    monkeypatch.chdir(folder)

    for source in ("a", "a.jsonl", str(folder / "a.jsonl"), DomainConfig("z", "a.jsonl")):
        assert "has the name or the source" in manifest.overlaps(source)[0]

    judged_entry = replace(manifest.domains[0], use=JUDGED, documents=[])
    assert manifest.with_entries([judged_entry]).overlaps("a") == manifest.overlaps("a"), "no sentence is repeated"


def test_another_split_is_not_an_overlap():
    (origin,) = resolve([DomainConfig("m", "preset:math")])
    samples = token_ids(2, 12)
    manifest = Manifest.of(config(), [Domain("m", 1.0, samples, samples, origin=origin)], None)

    assert manifest.overlaps(DomainConfig("x", "openai/gsm8k", dataset_config="main", split="train"))
    assert not manifest.overlaps(DomainConfig("x", "openai/gsm8k", dataset_config="main", split="test"))


# --- errors and dates in chat templates
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
    "{% import 'file' as library %}",
    "{{ ''.__class__.__mro__ }}",
    "{% for number in range(10**9) %}{% endfor %}",
    {"rag": PLAIN, "tool_use": PLAIN},
])  # fmt: skip
def test_an_error_in_a_chat_template_is_one_line_that_names_the_tokenizer(template):
    _, chat_tokenizer = real_text_model()
    chat_tokenizer.chat_template = template
    chat_tokenizer.name_or_path = "some/model"

    for render in (
        lambda: chat_text(chat_tokenizer, CHAT),
        lambda: rendered({"messages": CHAT}, DOMAIN, chat_tokenizer),
        lambda: read_questions()[0].ids(chat_tokenizer),
    ):
        with pytest.raises(StructPruneError, match="chat template of 'some/model' does not accept") as raised:
            render()
        assert "\n" not in str(raised.value)
        assert ".. " not in str(raised.value)
        assert "Set `tokenizer.chat_template`" in str(raised.value)


@pytest.mark.parametrize("template", [
    "\n {% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}\n" + PLAIN,
    "{%- macro day(form) %}{{ strftime_now(form) }}{% endmacro %}{% set form = '%A, %-d %b %y' %}{{ day(form) }}"
    + PLAIN,
    "{{ strftime_now(\"%H:%M:%S\") }}{{ strftime_now('%Y') | int + 1 }}\n" + PLAIN,
    "  {%-if true %}\n{{ strftime_now('%F') }}\n  {%- endif %}" + PLAIN,
    "{{ strftime_now(format='%A') }}\n" + PLAIN,
])  # fmt: skip
def test_a_chat_template_uses_the_passed_date_instead_of_the_clock(template, monkeypatch):
    chat_tokenizer = tokenizer_with_template(template)

    for date in (DATES[0], datetime(2026, 9, 3, 14, 5)):
        today_is(monkeypatch, date)
        expected = chat_tokenizer.apply_chat_template(CHAT, tokenize=False)
        today_is(monkeypatch, datetime(1999, 1, 1, 9))
        assert chat_text(chat_tokenizer, CHAT, date=date) == expected

    assert rendered({"messages": CHAT}, DOMAIN, chat_tokenizer) == chat_text(chat_tokenizer, CHAT)


def test_the_dates_have_every_month_and_every_day_of_the_week():
    assert {date.month for date in DATES} == set(range(1, 13))
    assert {date.weekday() for date in DATES} == set(range(7))
