"""Documents from every kind of source, and their packing into samples."""

import itertools
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import datasets
import pytest
import render_texts
import torch
from helpers import put_into
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import table
from pyarrow.parquet import write_table
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError
from optimum_structprune.domains import sources
from optimum_structprune.domains.load import load_domains, num_heldout, split_samples
from optimum_structprune.domains.packing import prefix_token
from optimum_structprune.domains.sources import builtin_documents, documents, sections
from optimum_structprune.system.disk import used_paths


TEXTS = [f"text number {i}" for i in range(30)]
WORDS = [f"w{i}" for i in range(4000)]
BOS, EOS, CLS = 0, 1, 2
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def tokenizer(bos: bool = True, eos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word `w0`, `w1` …, so that a token tells which document it came from."""
    vocab = {"<s>": BOS, "</s>": EOS, "[CLS]": CLS, "<unk>": 3}
    vocab |= {word: len(vocab) + i for i, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    if template is not None:
        special = [("<s>", BOS), ("</s>", EOS), ("[CLS]", CLS)]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **names)


def numbered(count: int = 400, length: int = 10) -> list[str]:
    """Documents of which each has words of its own."""
    return [" ".join(WORDS[i * length : (i + 1) * length]) for i in range(count)]


def make(source, **fields) -> StructPruneConfig:
    """A small config with one domain."""
    return StructPruneConfig(
        domains=[DomainConfig("d", source)], **{"sparsity": 0.2, "num_samples": 8, "seq_length": 16, **fields}
    )


def read(source, seed: int = 0, **fields) -> list[str]:
    return list(documents(DomainConfig("d", source, **fields), seed))


def write(path: Path, texts: list[str]) -> Path:
    """A file of the kind that the suffix says; its rows have a number before the text."""
    rows = [{"n": i, "text": text} for i, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n\n".join(texts))
    return path


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Local text is read without the cache of `datasets`, which a user may not be able to write."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nope")


LEAST = {"code": 1_000_000, "math": 1_000_000, "prose": 600_000, "general": 400_000, "letters+news": 9}


@pytest.mark.parametrize("name", LEAST)
def test_builtin_text_is_plenty_and_distinct(name):
    assert any(size >= LEAST[name] for size in itertools.accumulate(map(len, builtin_documents(name))))
    first, again, other = ([*itertools.islice(builtin_documents(name, seed), 400)] for seed in (3, 3, 4))
    assert first == again != other
    if name in ("prose", "code", "math"):  # the others are made of parts of documents
        assert len(set(first)) == len(first)
        assert all(100 <= len(text) <= 2 * sources.SECTION_CHARACTERS for text in first)


def test_general_text_is_of_every_kind_that_there_is():
    files = [path.stem for path in sources.TEXTS.glob("*.txt")]
    assert set(sources.builtin_kinds("general")) == {"prose", "code", "math", "records", *files}
    assert set(sources.builtin_kinds("general-math-code")) == set(sources.builtin_kinds("general")) - {"math", "code"}
    about = (sources.TEXTS / "README.md").read_text()
    assert len(files) > 10 and all(f"{name}.txt" in about for name in ("countries", "prose", "code", "math"))
    assert sum(path.stat().st_size for path in sources.TEXTS.iterdir()) < 1_500_000
    for name in files:
        texts = list(builtin_documents(name))
        assert len(set(texts)) == len(texts) >= 8, name
        assert all(text == text.strip() and 100 < len(text) < 2 * sources.PART_CHARACTERS for text in texts)


def test_several_kinds_have_equal_shares_of_the_characters():
    names = ["letters", "countries", "math", "records"]
    whole = {name: "\n".join(itertools.islice(builtin_documents(name, 3), 200)) for name in names}
    given = dict.fromkeys(names, 0)
    for part in itertools.islice(builtin_documents("+".join(names), 3), 30):
        (kind,) = (name for name in names if part in whole[name])
        given[kind] += len(part)
    assert max(given.values()) - min(given.values()) <= 2 * sources.PART_CHARACTERS


def test_two_sections_of_a_document_lie_far_apart():
    order = list(builtin_documents("code", 1))
    places = [order.index(part) for part in sections(max(sources.read_kind("code"), key=len))]
    assert len(places) > 4 and min(b - a for a, b in itertools.pairwise(places)) > 10


@pytest.mark.parametrize("kind", ["math", "records"])
def test_what_is_made_by_rule_is_the_same_again(kind):
    assert list(dict.fromkeys(render_texts.KINDS[kind](random.Random(0)))) == sources.read_kind(kind)


def test_unknown_builtin_proposes_the_nearest():
    for name, wrong, near in (("prosa", "prosa", "prose"), ("letters+newz", "newz", "news")):
        with pytest.raises(StructPruneError, match=f"built-in text '{wrong}' does not exist. Did you mean '{near}'"):
            read(f"builtin:{name}")


@given(st.text(alphabet="ab \n", max_size=400), st.integers(2, 30))
def test_sections_keep_all_words_and_the_size(text, size):
    parts = list(sections(text, size))
    assert all(len(part) <= 2 * size for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


@pytest.mark.parametrize("source", [
    *(lambda folder, suffix=suffix: str(write(folder / f"a{suffix}", TEXTS)) for suffix in SUFFIXES),
    lambda folder: write(folder / "a.jsonl", TEXTS),
    lambda _: TEXTS,
    lambda _: tuple(TEXTS),
    lambda _: (text for text in TEXTS),
    lambda _: datasets.Dataset.from_dict({"text": TEXTS}),
    lambda _: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
], ids=[*SUFFIXES, "path", "list", "tuple", "generator", "dataset", "iterable-dataset"])  # fmt: skip
def test_a_source_gives_all_its_texts_in_an_order_of_the_seed(tmp_path, source, monkeypatch):
    monkeypatch.setattr(sources, "LOCAL_BUFFER_TEXTS", 20)  # fewer than there are
    assert sorted(read(source(tmp_path))) == sorted(TEXTS)
    assert read(source(tmp_path)) == read(source(tmp_path)) != TEXTS
    assert read(source(tmp_path), seed=1) != read(source(tmp_path))


def test_a_text_file_is_one_document_unless_it_is_large(tmp_path):
    assert read(str(write(tmp_path / "small.txt", TEXTS))) == ["\n\n".join(TEXTS)]
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(str(tmp_path / "windows.txt")) == ["one\ntwo"]
    paragraphs = [f"paragraph {i} " * 20 for i in range(400)]
    parts = read(str(write(tmp_path / "large.txt", paragraphs)))
    assert len(parts) > 10
    assert sorted(piece for part in parts for piece in part.split("\n\n")) == sorted(paragraphs)


@pytest.mark.parametrize("texts", [["2024-01-01", "2024-01-02"], ["12:30", "1e5"], ["true", "null"]])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_that_looks_like_dates_or_numbers_is_read_as_text(tmp_path, suffix, texts):
    assert sorted(read(write(tmp_path / f"a{suffix}", texts))) == sorted(texts)


def test_columns_other_than_the_text_do_no_harm(tmp_path):
    deep = "[" * 500 + "]" * 500
    lines = ['{"text": "one", "other": 1}', '{"other": "x"}', f'{{"text": "two", "deep": {deep}}}', '{"text": null}']
    put_into(tmp_path, {"a.jsonl": "\n\n".join(lines), "pretty.json": '\n [\n {"text": "one"},\n {"other": 2}\n ]'})
    assert sorted(read(tmp_path / "a.jsonl")) == ["one", "two"]
    assert read(tmp_path / "pretty.json") == ["one"]


@pytest.mark.parametrize("source", [
    lambda folder, texts: write(folder / "a.jsonl", texts),
    lambda folder, texts: write(folder / "a.csv", texts),
    lambda folder, texts: texts,
    lambda folder, texts: datasets.Dataset.from_dict({"text": texts}),
], ids=["jsonl", "csv", "list", "dataset"])  # fmt: skip
def test_a_long_row_is_cut_before_it_is_tokenized(tmp_path, source):
    words = " ".join(itertools.islice(itertools.cycle(WORDS), 100_000))
    parts = read(source(tmp_path, [*TEXTS, words]))
    assert len(parts) > 100 + len(TEXTS) and max(map(len, parts)) <= 2 * sources.SECTION_CHARACTERS
    cut = [part for part in parts if part not in TEXTS]
    assert sorted(" ".join(cut).split()) == sorted(words.split())


def test_globs_and_folders_read_all_kinds_and_nothing_else(tmp_path):
    folder = tmp_path / ".hidden" / "a[b]"
    blank = '{"n": 0, "text": null}\n{"n": 0, "text": ""}\n'
    put_into(folder, {"README.md": "not read", "deep/a.md": "not read", "empty.jsonl": "", "blank.jsonl": blank})
    put_into(folder, {".checkpoints/f.jsonl": '{"n": 0, "text": "hidden"}\n'})
    for i, name in enumerate(("a.jsonl", "b.csv", "deep/c.parquet", "deep/d.txt", "e.json")):
        write(folder / name, [f"document {i}"])
    write_table(table({"n": [1], "text": ["x"]})[:0], folder / "none.parquet")
    assert sorted(read(str(folder))) == sorted(read(f"{tmp_path}/.hidden/**/*")) == [f"document {i}" for i in range(5)]
    assert read(f"{tmp_path}/.hidden/*/*.jsonl") == ["document 0"] and read(str(folder / "empty.jsonl")) == []
    assert read(["", "  \n", "a"]) == ["a"]


def test_a_relative_path_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "name.jsonl", TEXTS)
    for source in (".", "name.jsonl", "~/name.jsonl"):
        assert sorted(read(source)) == sorted(TEXTS)
    monkeypatch.setattr(datasets, "load_dataset", None)  # a file that is not there is not looked for on the Hub
    for source in ("wiki.jsonl", "data/wiki.txt", "./wiki"):
        with pytest.raises(StructPruneError, match="does not exist"):
            read(source)


def test_a_folder_that_save_to_disk_wrote(tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    parts = {"train": rows.select(range(3)), "test": rows.select(range(3, len(TEXTS)))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    assert sorted(read(tmp_path / "one")) == sorted(TEXTS)
    assert read(tmp_path / "one") == read(rows) != read(tmp_path / "one", seed=1)
    assert sorted(read(tmp_path / "several")) == sorted(TEXTS[:3])
    assert sorted(read(tmp_path / "several", split="test")) == sorted(TEXTS[3:])
    assert not sources.endless(DomainConfig("d", tmp_path / "one"))
    with pytest.raises(StructPruneError, match="has no split 'valid'; it has train, test"):
        read(tmp_path / "several", split="valid")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(StructPruneError, match="'d': .*one cannot be read"):
        read(tmp_path / "one")


def test_a_hub_dataset(monkeypatch):
    hub = Mock(side_effect=lambda *_, **how: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset())
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert sorted(read("user/name", dataset_config="en", split="test", revision="abc")) == sorted(TEXTS)
    assert read("user/name", seed=1) != read("user/name", seed=2)
    assert hub.call_args_list[0] == call("user/name", "en", split="test", streaming=True, revision="abc")
    gone = datasets.exceptions.DatasetNotFoundError("gone")
    for error in (ConnectionError("no way out"), gone, ValueError("split")):
        hub.side_effect, message = error, f"'d': 'user/name' is not a local .* cannot be read: {error}"
        with pytest.raises(StructPruneError, match=message) as raised:
            read("user/name")
        assert raised.value.__cause__ is error


@pytest.mark.parametrize("name, message", [
    ("wikki.jsonl", "'d': the file or folder .* does not exist. Did you mean '.*wiki.jsonl'"),
    ("notes.md", "files like .*notes.md are not read. .*Known: .csv, .json, .jsonl, .parquet, .txt"),
    ("empty", "the folder .*empty contains no file of the kinds .txt, .jsonl"),
    ("other.jsonl", "Set `text_column` .--domain .*source: .*other.jsonl, text_column: ….* Known: body, id"),
    ("chat.jsonl", "Set `template` .--domain .*source: .*chat.jsonl, template: chat}.* Known: id, messages"),
    ("headless.csv", r"\A.*no column 'text'. Set `text_column`.* Known: One w1 w2 w3 .{47}\.\Z"),
    ("numbers.jsonl", "must contain strings, and the column 'text' holds the int 1"),
    ("broken.jsonl", "broken.jsonl cannot be read: line 2 is not JSON: Expecting value"),
    ("cut.jsonl", "cut.jsonl cannot be read: line 2 is not JSON: Unterminated string"),
    ("plain.jsonl", "plain.jsonl cannot be read: line 1 must be an object, such as .*, got 'text'"),
    ("list.json", "list.json cannot be read: item 2 must be an object, such as .*, got 'b'"),
    ("bottomless.jsonl", "bottomless.jsonl cannot be read: line 1 is nested too deeply"),
    ("long.csv", "long.csv cannot be read: line 2 has more fields than the header"),
    ("utf16.csv", "utf16.csv cannot be read: .*; save it as UTF-8"),
    ("link.jsonl", "'d': .*link.jsonl is not a regular file. Write its text to one"),
])  # fmt: skip
def test_files_that_will_not_do(tmp_path, name, message):
    write(tmp_path / "wiki.jsonl", TEXTS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "none.jsonl")
    put_into(
        tmp_path,
        {
            "notes.md": "notes",
            "other.jsonl": '{"id": 1, "body": "x"}\n',
            "numbers.jsonl": '{"text": 1}\n',
            "long.csv": "text\na,b\n",
        },
    )
    put_into(tmp_path, {"chat.jsonl": '{"id": 1, "messages": [{"role": "user", "content": "x"}]}\n'})
    put_into(tmp_path, {"headless.csv": '"One\n' + " ".join(f"w{i}" for i in range(1, 99)) + '"\ntwo\n'})
    put_into(tmp_path, {"cut.jsonl": '{"text": "a"}\n{"text": "b', "plain.jsonl": '"text"\n'})
    put_into(tmp_path, {"list.json": '[{"text": "a"}, "b"]', "bottomless.jsonl": '{"a": ' + "[" * 10**6})
    put_into(
        tmp_path, {"broken.jsonl": '{"text": "a"}\n{"text": broken', "utf16.csv": "text\ncafé\n".encode("utf-16")}
    )
    with pytest.raises(StructPruneError, match=message):
        read(str(tmp_path / name))


def test_patterns_of_a_shell_are_patterns_and_an_address_is_none(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b[1].jsonl"):
        write(tmp_path / name, [name])
    for pattern, found in (("a?.jsonl", 2), ("a[2-9].jsonl", 1), ("b[1].jsonl", 1), ("[ab]*.jsonl", 3)):
        assert len(read(str(tmp_path / pattern))) == found
        named = used_paths(make(str(tmp_path / pattern)))
        assert len(named) == found and all(map(os.path.exists, named)), "what a run reads is not replaced"
    with pytest.raises(StructPruneError, match="'d': s3://x/a is an address. Download it first"):
        read("s3://x/a")


def test_what_is_no_text():
    for source, message in ((["a", 3], "item 1 holds the int 3"), ([{"text": "a"}], "item 0 .* dict")):
        with pytest.raises(StructPruneError, match=f"'d' must contain strings, and {message}"):
            read(source)
    saved = DomainConfig("d", TEXTS).to_dict()
    with pytest.raises(StructPruneError, match="'d' was read from a list in memory.*Set its source again"):
        list(documents(DomainConfig.from_dict(saved), 0))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 200))
def test_samples_are_split_in_proportion(weights, extra):
    samples = len(weights) + extra
    counts = split_samples(samples, weights)
    quotas = [samples * weight / sum(weights) for weight in weights]
    assert sum(counts) == samples
    assert min(counts) >= 1
    if min(quotas) >= 1:
        assert all(abs(count - quota) < 1 + 1e-6 for count, quota in zip(counts, quotas, strict=True))
    heavier = sorted(zip(weights, counts, strict=True))
    assert all(a[1] <= b[1] or a[0] == b[0] for a, b in itertools.pairwise(heavier))
    assert split_samples(24, [2, 3, 19]) == [2, 3, 19]
    assert [num_heldout(*of) for of in ((1, 0.125), (16, 0.125), (43, 0.125), (100, 0.5))] == [2, 2, 5, 50]


@pytest.mark.parametrize("made, expected", [
    *(({"template": "<s> $A"}, BOS), ({"template": "[CLS] $A </s>"}, CLS), ({"template": "$A </s>"}, BOS)),
    *(({}, BOS), ({"bos": False}, EOS), ({"bos": False, "eos": False}, None)),
])  # fmt: skip
def test_prefix_token(made, expected):
    reader = tokenizer(**made)
    assert prefix_token(reader) == expected
    (domain,) = load_domains(make(numbered()), reader)
    assert domain.samples.shape == (8, 16)
    assert set(domain.samples[:, 0].tolist()) == {expected} if expected is not None else domain.samples.min() >= 4


def test_samples_have_shape_prefix_and_separators():
    (domain,) = load_domains(make(numbered()), tokenizer())
    assert domain.samples.shape == (8, 16)
    assert domain.heldout.shape == (10, 16), "two, and eight more that follow all others"
    assert domain.samples.dtype == domain.heldout.dtype == torch.int64
    for samples in (domain.samples, domain.heldout[:2], domain.heldout[2:]):
        assert (samples[:, 0] == BOS).all()
        text = samples[:, 1:].flatten().tolist()
        # Documents of ten tokens, so that every eleventh token ends one, across the samples' borders.
        assert [i for i, token in enumerate(text) if token == EOS] == list(range(10, len(text), 11))
        words = [token - 4 for token in text if token != EOS]
        assert all(b == a + 1 for a, b in itertools.pairwise(words) if b % 10)
    few, many = (load_domains(make(numbered(), num_samples=n), tokenizer())[0].heldout for n in (2, 16))
    assert torch.equal(few[:2], many[:2]), "whatever the number of samples"


def test_texts_longer_than_the_tokenizer_allows_are_packed_in_silence(caplog, recwarn):
    load_domains(make([" ".join(random.Random(seed).choices(WORDS, k=500)) for seed in range(4)]), tokenizer())
    assert not [record for record in caplog.records if "longer" in record.getMessage()]
    assert not [warning for warning in recwarn if "longer" in str(warning.message)]


@pytest.mark.parametrize(("fields", "message"), [
    ({"source": []}, "The domain 'd' is empty[.]"),
    ({"source": ["", " \n"]}, "The domain 'd' is empty[.]"),
    ({"source": iter(())}, "The domain 'd' is empty; a generator yields its text only once[.]"),
    ({"source": [" ".join(WORDS)]}, "4000 tokens in 1 documents.*only one of the two. Add documents"),
    ({"source": numbered(), "seq_length": 1}, "`seq_length` must be at least 2, got 1"),
    ({"domains": [DomainConfig(n, TEXTS) for n in "abc"], "num_samples": 2}, "=2` .* 3 domains.* at least 3[.]"),
], ids=["none", "blank", "spent", "one document", "prefix alone", "few samples"])  # fmt: skip
def test_text_that_makes_no_samples(fields, message):
    with pytest.raises(StructPruneError, match=message):
        load_domains(replace(make(fields.pop("source", TEXTS)), **fields), tokenizer())


@pytest.mark.parametrize(("asked", "needs"), [(60, "1020"), (10**12, r"\d{14}")])
@pytest.mark.parametrize("others", [[], [DomainConfig("b", numbered(), weight=3)]])
def test_too_little_text_names_what_would_do(asked, needs, others):
    config = make(TEXTS)
    config.domains = [DomainConfig("d", numbered(20)), *others]
    message = f"'d' has 200 tokens in 20 documents.* take {'' if others else needs}.*num_samples="
    with pytest.raises(StructPruneError, match=message) as raised:
        load_domains(replace(config, num_samples=asked), tokenizer())
    largest = int(re.search(r"Set `num_samples=(\d+)`", str(raised.value))[1])
    assert f"in a recovery `tokens={largest * config.seq_length}`." in str(raised.value)
    loaded = load_domains(replace(config, num_samples=largest), tokenizer())
    assert sum(len(domain.samples) for domain in loaded) == largest
    with pytest.raises(StructPruneError):
        load_domains(replace(config, num_samples=largest + 1 + 4 * len(others)), tokenizer())
