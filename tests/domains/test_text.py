"""Documents of every kind of source, and their packing into samples."""

import csv
import itertools
import json
import os
import random
import re
from dataclasses import replace
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
BOS, EOS, CLS, UNK = range(4)
SPECIAL_IDS = {"<s>": BOS, "</s>": EOS, "[CLS]": CLS, "<unk>": UNK}


def tokenizer(bos_token="<s>", eos_token="</s>", template=None):
    """Return a tokenizer with one token for each word of `WORDS`, so that a token identifies its document."""
    vocabulary = dict(SPECIAL_IDS)
    for number, word in enumerate(WORDS, start=len(SPECIAL_IDS)):
        vocabulary[word] = number

    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if template is not None:
        special_tokens = [("<s>", BOS), ("</s>", EOS), ("[CLS]", CLS)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=16,
        bos_token=bos_token,
        eos_token=eos_token,
        unk_token="<unk>",
    )


def numbered_documents(count=400, length=10):
    """Return documents that have no word in common."""
    return [" ".join(WORDS[i * length : (i + 1) * length]) for i in range(count)]


def config_of(source, **fields):
    """Return a small config with one domain."""
    defaults = {"sparsity": 0.2, "num_samples": 8, "seq_length": 16}
    return StructPruneConfig(domains=[DomainConfig("d", source)], **(defaults | fields))


def read(source, seed=0, **fields):
    """Return all documents of a source."""
    return list(documents(DomainConfig("d", source, **fields), seed))


def write(path, texts):
    """Write texts to a file, in the format of its suffix, and return the path. Rows have a number before the text."""
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
    """Make the cache of `datasets` unusable, because a user may lack the right to write to it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nope")


# --- built-in text
MIN_CHARACTERS = {"code": 1_000_000, "math": 1_000_000, "prose": 600_000, "general": 400_000, "letters+news": 9}


@pytest.mark.parametrize("name", MIN_CHARACTERS)
def test_builtin_text_is_long_and_distinct(name):
    sizes = itertools.accumulate(map(len, builtin_documents(name)))
    assert any(size >= MIN_CHARACTERS[name] for size in sizes)

    texts = list(itertools.islice(builtin_documents(name, 3), 400))
    assert list(itertools.islice(builtin_documents(name, 3), 400)) == texts
    assert list(itertools.islice(builtin_documents(name, 4), 400)) != texts

    # Other names consist of parts of documents.
    if name in ("prose", "code", "math"):
        assert len(set(texts)) == len(texts)
        assert all(100 <= len(text) <= 2 * sources.SECTION_CHARACTERS for text in texts)


def test_general_text_has_all_kinds():
    plain_kinds = [path.stem for path in sources.TEXTS.glob("*.txt")]
    general_kinds = sources.builtin_kinds("general")

    assert len(plain_kinds) > 10
    assert set(general_kinds) == {"prose", "code", "math", "records"}.union(plain_kinds)
    assert set(sources.builtin_kinds("general-math-code")) == set(general_kinds) - {"math", "code"}


def test_builtin_files_are_small_and_documented():
    readme = (sources.TEXTS / "README.md").read_text()

    assert all(f"{name}.txt" in readme for name in ("countries", "prose", "code", "math"))
    assert sum(path.stat().st_size for path in sources.TEXTS.iterdir()) < 1_500_000


def test_documents_of_plain_builtin_files_are_distinct_and_short():
    for path in sources.TEXTS.glob("*.txt"):
        texts = list(builtin_documents(path.stem))
        assert len(texts) >= 8, path.stem
        assert len(set(texts)) == len(texts), path.stem
        assert all(text == text.strip() for text in texts)
        assert all(100 < len(text) < 2 * sources.PART_CHARACTERS for text in texts)


def test_several_kinds_have_equal_shares_of_the_characters():
    names = ["letters", "countries", "math", "records"]
    text_by_kind = {name: "\n".join(itertools.islice(builtin_documents(name, 3), 200)) for name in names}

    characters = dict.fromkeys(names, 0)
    for part in itertools.islice(builtin_documents("+".join(names), 3), 30):
        (kind,) = (name for name in names if part in text_by_kind[name])
        characters[kind] += len(part)

    assert max(characters.values()) - min(characters.values()) <= 2 * sources.PART_CHARACTERS


def test_sections_of_a_document_are_not_close_to_each_other():
    longest_document = max(sources.read_kind("code"), key=len)
    order = list(builtin_documents("code", 1))

    places = [order.index(part) for part in sections(longest_document)]

    assert len(places) > 4
    assert min(second - first for first, second in itertools.pairwise(places)) > 10


@pytest.mark.parametrize("kind", ["math", "records"])
def test_text_that_a_script_renders_is_reproducible(kind):
    texts = render_texts.KINDS[kind](random.Random(0))

    assert list(dict.fromkeys(texts)) == sources.read_kind(kind)


def test_an_unknown_builtin_name_suggests_the_nearest():
    for name, unknown, nearest in (("prosa", "prosa", "prose"), ("letters+newz", "newz", "news")):
        with pytest.raises(
            StructPruneError, match=f"built-in text '{unknown}' does not exist. Did you mean '{nearest}'"
        ):
            read(f"builtin:{name}")


@given(st.text(alphabet="ab \n", max_size=400), st.integers(2, 30))
def test_sections_contain_all_words_and_have_limited_size(text, size):
    parts = list(sections(text, size))

    assert all(len(part) <= 2 * size for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


# --- files, folders and objects in memory
SOURCES = {
    ".jsonl": lambda folder: str(write(folder / "a.jsonl", TEXTS)),
    ".json": lambda folder: str(write(folder / "a.json", TEXTS)),
    ".csv": lambda folder: str(write(folder / "a.csv", TEXTS)),
    ".parquet": lambda folder: str(write(folder / "a.parquet", TEXTS)),
    "path": lambda folder: write(folder / "a.jsonl", TEXTS),
    "list": lambda folder: TEXTS,
    "tuple": lambda folder: tuple(TEXTS),
    "generator": lambda folder: (text for text in TEXTS),
    "dataset": lambda folder: datasets.Dataset.from_dict({"text": TEXTS}),
    "iterable-dataset": lambda folder: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
}


@pytest.mark.parametrize("make_source", SOURCES.values(), ids=SOURCES.keys())
def test_all_texts_of_a_source_are_read_in_a_seeded_order(tmp_path, make_source, monkeypatch):
    # The buffer is smaller than the number of texts.
    monkeypatch.setattr(sources, "LOCAL_BUFFER_TEXTS", 20)

    texts = read(make_source(tmp_path))

    assert sorted(texts) == sorted(TEXTS)
    assert texts != TEXTS
    assert read(make_source(tmp_path)) == texts
    assert read(make_source(tmp_path), seed=1) != texts


def test_a_text_file_is_one_document_unless_it_is_large(tmp_path):
    small = write(tmp_path / "small.txt", TEXTS)
    assert read(str(small)) == ["\n\n".join(TEXTS)]

    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(str(windows)) == ["one\ntwo"]

    paragraphs = [f"paragraph {i} " * 20 for i in range(400)]
    large = write(tmp_path / "large.txt", paragraphs)
    parts = read(str(large))
    assert len(parts) > 10
    assert sorted("\n\n".join(parts).split("\n\n")) == sorted(paragraphs)


@pytest.mark.parametrize("texts", [["2024-01-01", "2024-01-02"], ["12:30", "1e5"], ["true", "null"]])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_that_looks_like_dates_or_numbers_is_read_as_text(tmp_path, suffix, texts):
    assert sorted(read(write(tmp_path / f"a{suffix}", texts))) == sorted(texts)


def test_columns_other_than_the_text_are_ignored(tmp_path):
    deep = "[" * 500 + "]" * 500
    lines = [
        '{"text": "one", "other": 1}',
        '{"other": "x"}',
        f'{{"text": "two", "deep": {deep}}}',
        '{"text": null}',
    ]
    pretty = '\n [\n {"text": "one"},\n {"other": 2}\n ]'
    put_into(tmp_path, {"a.jsonl": "\n\n".join(lines), "pretty.json": pretty})

    assert sorted(read(tmp_path / "a.jsonl")) == ["one", "two"]
    assert read(tmp_path / "pretty.json") == ["one"]


@pytest.mark.parametrize("make_source", [
    lambda folder, texts: write(folder / "a.jsonl", texts),
    lambda folder, texts: write(folder / "a.csv", texts),
    lambda folder, texts: texts,
    lambda folder, texts: datasets.Dataset.from_dict({"text": texts}),
], ids=["jsonl", "csv", "list", "dataset"])  # fmt: skip
def test_a_long_row_is_cut_before_it_is_tokenized(tmp_path, make_source):
    long_text = " ".join(itertools.islice(itertools.cycle(WORDS), 100_000))
    field_size_limit = csv.field_size_limit()

    parts = read(make_source(tmp_path, TEXTS + [long_text]))
    assert csv.field_size_limit() == field_size_limit

    assert len(parts) > 100 + len(TEXTS)
    assert max(map(len, parts)) <= 2 * sources.SECTION_CHARACTERS
    long_parts = [part for part in parts if part not in TEXTS]
    assert sorted(" ".join(long_parts).split()) == sorted(long_text.split())


def test_globs_and_folders_read_only_files_of_known_formats(tmp_path):
    folder = tmp_path / ".hidden" / "a[b]"
    ignored_files = {
        "README.md": "not read",
        "deep/a.md": "not read",
        "empty.jsonl": "",
        "blank.jsonl": '{"n": 0, "text": null}\n{"n": 0, "text": ""}\n',
        ".checkpoints/f.jsonl": '{"n": 0, "text": "hidden"}\n',
    }
    put_into(folder, ignored_files)
    write_table(table({"n": [1], "text": ["x"]})[:0], folder / "none.parquet")
    texts = []
    for name in ("a.jsonl", "b.csv", "deep/c.parquet", "deep/d.txt", "e.json"):
        text = f"document of {name}"
        write(folder / name, [text])
        texts.append(text)

    assert sorted(read(str(folder))) == sorted(texts)
    assert sorted(read(f"{tmp_path}/.hidden/**/*")) == sorted(texts)
    assert read(f"{tmp_path}/.hidden/*/*.jsonl") == ["document of a.jsonl"]
    assert read(str(folder / "empty.jsonl")) == []


def test_blank_texts_are_skipped():
    assert read(["", "  \n", "a"]) == ["a"]


def test_a_relative_path_takes_precedence_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "name.jsonl", TEXTS)

    for source in (".", "name.jsonl", "~/name.jsonl"):
        assert sorted(read(source)) == sorted(TEXTS)


def test_a_missing_file_is_not_searched_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)

    for source in ("wiki.jsonl", "data/wiki.txt", "./wiki"):
        with pytest.raises(StructPruneError, match="does not exist"):
            read(source)


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    texts = read(tmp_path / "one")

    assert sorted(texts) == sorted(TEXTS)
    assert texts == read(rows)
    assert texts != read(tmp_path / "one", seed=1)
    assert not sources.endless(DomainConfig("d", tmp_path / "one"))

    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(StructPruneError, match="'d': .*one cannot be read"):
        read(tmp_path / "one")


def test_one_split_of_a_folder_of_save_to_disk_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    splits = {"train": rows.select(range(3)), "test": rows.select(range(3, len(TEXTS)))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")

    assert sorted(read(tmp_path / "several")) == sorted(TEXTS[:3])
    assert sorted(read(tmp_path / "several", split="test")) == sorted(TEXTS[3:])
    with pytest.raises(StructPruneError, match="has no split 'valid'. It has train, test"):
        read(tmp_path / "several", split="valid")


def test_a_dataset_is_streamed_from_the_hub(monkeypatch):
    def stream(*args, **options):
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    load_dataset = Mock(side_effect=stream)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert sorted(read("user/name", dataset_config="en", split="test", revision="abc")) == sorted(TEXTS)
    assert load_dataset.call_args_list[0] == call("user/name", "en", split="test", streaming=True, revision="abc")
    assert read("user/name", seed=1) != read("user/name", seed=2)


def test_an_error_of_the_hub_names_the_domain(monkeypatch):
    for error in (
        ConnectionError("no way out"),
        datasets.exceptions.DatasetNotFoundError("gone"),
        ValueError("split"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
        message = f"'d': 'user/name' is not a local .* cannot be read: {error}"
        with pytest.raises(StructPruneError, match=message) as raised:
            read("user/name")
        assert raised.value.__cause__ is error


# --- text that cannot be read
INVALID_FILES = {
    "notes.md": "notes",
    "other.jsonl": '{"id": 1, "body": "x"}\n',
    "numbers.jsonl": '{"text": 1}\n',
    "long.csv": "text\na,b\n",
    "chat.jsonl": '{"id": 1, "messages": [{"role": "user", "content": "x"}]}\n',
    "headless.csv": '"One\n' + " ".join(f"w{i}" for i in range(1, 99)) + '"\ntwo\n',
    "cut.jsonl": '{"text": "a"}\n{"text": "b',
    "plain.jsonl": '"text"\n',
    "list.json": '[{"text": "a"}, "b"]',
    "broken.jsonl": '{"text": "a"}\n{"text": broken',
    "utf16.csv": "text\ncafé\n".encode("utf-16"),
}


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
    ("long.csv", "long.csv cannot be read: line 2 has more fields than the header"),
    ("utf16.csv", "utf16.csv cannot be read: .*; save it as UTF-8"),
])  # fmt: skip
def test_invalid_files_are_refused(tmp_path, name, message):
    put_into(tmp_path, INVALID_FILES)
    write(tmp_path / "wiki.jsonl", TEXTS)
    (tmp_path / "empty").mkdir()

    with pytest.raises(StructPruneError, match=message):
        read(str(tmp_path / name))


def test_glob_patterns_are_expanded(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b[1].jsonl"):
        write(tmp_path / name, [name])

    for pattern, count in (("a?.jsonl", 2), ("a[2-9].jsonl", 1), ("b[1].jsonl", 1), ("[ab]*.jsonl", 3)):
        assert len(read(str(tmp_path / pattern))) == count

        # Files that a run reads are protected from its output.
        protected_paths = used_paths(config_of(str(tmp_path / pattern)))
        assert len(protected_paths) == count
        assert all(map(os.path.exists, protected_paths))


def test_an_address_is_refused():
    with pytest.raises(StructPruneError, match="'d': s3://x/a is an address. Download it first"):
        read("s3://x/a")


def test_items_that_are_not_strings_are_refused():
    for source, message in (
        (["a", 3], "item 1 holds the int 3"),
        ([{"text": "a"}], "item 0 .* dict"),
    ):
        with pytest.raises(StructPruneError, match=f"'d' must contain strings, and {message}"):
            read(source)


def test_a_saved_config_lacks_a_source_in_memory():
    saved = DomainConfig("d", TEXTS).to_dict()

    with pytest.raises(StructPruneError, match="'d' was read from a list in memory.*Set its source again"):
        list(documents(DomainConfig.from_dict(saved), 0))


# --- samples
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 200))
def test_samples_are_split_in_proportion(weights, extra):
    num_samples = len(weights) + extra

    counts = split_samples(num_samples, weights)

    assert sum(counts) == num_samples
    assert min(counts) >= 1
    quotas = [num_samples * weight / sum(weights) for weight in weights]
    if min(quotas) >= 1:
        assert all(abs(count - quota) < 1 + 1e-6 for count, quota in zip(counts, quotas, strict=True))

    by_weight = sorted(zip(weights, counts, strict=True))
    for (weight, count), (next_weight, next_count) in itertools.pairwise(by_weight):
        assert count <= next_count or weight == next_weight


def test_whole_quotas_are_the_number_of_samples():
    assert split_samples(24, [2, 3, 19]) == [2, 3, 19]


def test_at_least_two_samples_are_held_out():
    assert num_heldout(1, 0.125) == 2
    assert num_heldout(16, 0.125) == 2
    assert num_heldout(43, 0.125) == 5
    assert num_heldout(100, 0.5) == 50


@pytest.mark.parametrize(("options", "expected"), [
    ({"template": "<s> $A"}, BOS),
    ({"template": "[CLS] $A </s>"}, CLS),
    ({"template": "$A </s>"}, BOS),
    ({}, BOS),
    ({"bos_token": None}, EOS),
    ({"bos_token": None, "eos_token": None}, None),
])  # fmt: skip
def test_samples_begin_with_the_prefix_token(options, expected):
    word_tokenizer = tokenizer(**options)

    (domain,) = load_domains(config_of(numbered_documents()), word_tokenizer)

    assert prefix_token(word_tokenizer) == expected
    assert domain.samples.shape == (8, 16)
    if expected is None:
        assert domain.samples.min() >= len(SPECIAL_IDS)
    else:
        assert set(domain.samples[:, 0].tolist()) == {expected}


def test_samples_have_shape_prefix_and_separators():
    (domain,) = load_domains(config_of(numbered_documents()), tokenizer())

    assert domain.samples.shape == (8, 16)
    assert domain.heldout.shape == (10, 16), "two, and eight more after all other samples"
    assert domain.samples.dtype == torch.int64
    assert domain.heldout.dtype == torch.int64
    for samples in (domain.samples, domain.heldout[:2], domain.heldout[2:]):
        assert (samples[:, 0] == BOS).all()
        tokens = samples[:, 1:].flatten().tolist()
        # Documents have ten tokens and continue in the next sample, so every eleventh token is a separator.
        assert [i for i, token in enumerate(tokens) if token == EOS] == list(range(10, len(tokens), 11))

        word_numbers = [token - len(SPECIAL_IDS) for token in tokens if token != EOS]
        for number, next_number in itertools.pairwise(word_numbers):
            assert next_number == number + 1 or next_number % 10 == 0


def test_held_out_samples_do_not_depend_on_the_number_of_samples():
    (small,) = load_domains(config_of(numbered_documents(), num_samples=2), tokenizer())
    (large,) = load_domains(config_of(numbered_documents(), num_samples=16), tokenizer())

    assert torch.equal(small.heldout[:2], large.heldout[:2])


def test_texts_longer_than_the_maximum_of_the_tokenizer_cause_no_warning(caplog, recwarn):
    texts = [" ".join(random.Random(seed).choices(WORDS, k=500)) for seed in range(4)]

    load_domains(config_of(texts), tokenizer())

    assert not [record for record in caplog.records if "longer" in record.getMessage()]
    assert not [warning for warning in recwarn if "longer" in str(warning.message)]


@pytest.mark.parametrize(("fields", "message"), [
    ({"source": []}, "The domain 'd' is empty[.]"),
    ({"source": ["", " \n"]}, "The domain 'd' is empty[.]"),
    ({"source": iter(())}, "The domain 'd' is empty; a generator yields its text only once[.]"),
    ({"source": [" ".join(WORDS)]}, "`seq_length` is .* 4000 tokens in 1 documents.*only one of the two. Add"),
    ({"source": numbered_documents(), "seq_length": 1}, "`seq_length` must be at least 2, got 1"),
    ({"domains": [DomainConfig(n, TEXTS) for n in "abc"], "num_samples": 2}, "=2` .* 3 domains.* at least 3[.]"),
], ids=["none", "blank", "spent", "one document", "prefix alone", "few samples"])  # fmt: skip
def test_text_without_samples_is_refused(fields, message):
    with pytest.raises(StructPruneError, match=message):
        load_domains(replace(config_of(fields.pop("source", TEXTS)), **fields), tokenizer())


@pytest.mark.parametrize(("num_samples", "other_domains"), [
    (60, []),
    (10**9, []),
    (60, [DomainConfig("b", numbered_documents(), weight=3)]),
])  # fmt: skip
def test_a_domain_with_too_little_text_has_fewer_samples_and_its_weight(num_samples, other_domains):
    domains = [DomainConfig("d", numbered_documents(20)), *other_domains]
    settings = replace(config_of(TEXTS), domains=domains, num_samples=num_samples)
    with pytest.warns(UserWarning, match="The domain 'd' has 200 tokens in 20 documents, which are") as warnings:
        small, *others = load_domains(settings, tokenizer())

    count = int(re.search(r"which are (\d+) calibration samples", str(warnings[0].message))[1])
    assert len(small.samples) == count > 1
    assert small.weight == (0.25 if others else 1)
    documents = set(small.documents) | set(small.heldout_documents)
    assert len(documents) == len(small.documents) + len(small.heldout_documents) <= 20

    # One more sample is not possible.
    if not others:
        with pytest.warns(UserWarning, match=f"which are {count} calibration samples instead of {count + 1}"):
            load_domains(replace(settings, num_samples=count + 1), tokenizer())
    else:
        assert len(others[0].samples) == 45
