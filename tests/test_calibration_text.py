"""Documents from every kind of source, and their packing into blocks."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimum_structprune.calibration import builtin, sources
from optimum_structprune.calibration.blocks import load_domains, num_heldout, prefix_token, split_samples
from optimum_structprune.calibration.builtin import builtin_documents, sections
from optimum_structprune.calibration.sources import documents
from optimum_structprune.config import DomainConfig, StructPruneConfig
from optimum_structprune.errors import StructPruneError


STORIES = Path(os.environ.get("STRUCTPRUNE_SHARED", Path(__file__).parents[2] / "shared")) / "models" / "stories260K"
TEXTS = [f"text number {i}" for i in range(30)]
WORDS = [f"w{i}" for i in range(4000)]
BOS, EOS, CLS = 0, 1, 2


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
    return StructPruneConfig(domains=[DomainConfig("d", source)], **{"num_samples": 8, "seq_length": 16, **fields})


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
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` leaves lock files in its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# --- built-in text


@pytest.mark.parametrize("name, least", [("prose", 600_000), ("code", 1_000_000), ("math", 1_000_000)])
def test_builtin_text_is_plenty_and_distinct(name, least):
    texts, size = [], 0
    for text in builtin_documents(name):
        texts.append(text)
        size += len(text)
        if size >= least:
            break
    assert size >= least
    assert len(set(texts)) == len(texts)
    assert all(builtin.SHORTEST / 2 <= len(text) <= 2 * builtin.SECTION for text in texts)


@pytest.mark.parametrize("name", ["prose", "code", "math"])
def test_the_seed_decides_the_builtin_documents(name):
    def first(seed):
        return list(itertools.islice(builtin_documents(name, seed), 5))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_prose_reads_other_files_than_code():
    names = {name: list(itertools.islice(builtin_documents(name), 150)) for name in ("prose", "code")}
    code = " ".join(" ".join(names["code"]).split())
    paragraphs = [paragraph for text in names["prose"] for paragraph in text.split("\n\n")]
    assert sum(paragraph in code for paragraph in paragraphs) < 0.02 * len(paragraphs)
    assert not any("\n    def " in text or ">>>" in text for text in names["prose"])


def test_a_small_sample_of_code_is_of_many_files():
    heads = [text.split("\n", 1)[0] for text in itertools.islice(builtin_documents("code"), 40)]
    assert len(set(heads)) > 20


def test_unknown_builtin_proposes_the_nearest():
    with pytest.raises(StructPruneError, match="no built-in text 'prosa'. Did you mean 'prose'"):
        read("builtin:prosa")


def test_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(StructPruneError, match="has none. Use builtin:math"):
        builtin_documents("code")


EQUATION = re.compile(r"(?<![\w.(])([\d(][\d. ()+*/-]*[+*/-][\d. ()+*/-]*) = (\d+(?:\.\d+)?)")


def evaluate(expression: str) -> Fraction:
    exact = re.sub(r"\d+(?:\.\d+)?", lambda match: f"Fraction('{match[0]}')", expression)
    return eval(exact, {"Fraction": Fraction})


def test_every_sum_of_the_math_problems_is_right():
    for text in itertools.islice(builtin_documents("math"), 2000):
        steps = EQUATION.findall(text)
        assert steps, text
        assert text.count(" = ") == len(steps), text
        for expression, result in steps:
            assert evaluate(expression) == Fraction(result), text
        answer = re.search(r"(?:#### |answer is )([\d.]+?)\.?$", text)
        assert answer, text
        assert Fraction(answer[1]) == Fraction(steps[-1][1]), text


def test_answers_follow_from_the_questions():
    """The answers again, from the numbers of the question alone."""
    number = r"\$?(\d+(?:\.\d+)?)"
    solve = {
        f"has {number} and .*? {number} [^$]+ at {number} each and {number} [^$]+ at {number} each": (
            lambda cash, a, p, b, q: cash - a * p - b * q
        ),
        f"for {number} hours at {number} miles per hour and then for {number} hours at {number}": (
            lambda t, v, s, w: (t * v + s * w) / (t + s)
        ),
        f"scored {number}, {number} and {number} .* average of {number}\\?": lambda a, b, c, mean: (
            4 * mean - a - b - c
        ),
        f"counts {number} heads and {number} legs": lambda heads, legs: (legs - 2 * heads) / 2,
        f"saves? {number} in the first week, and every week {number} more .* after {number} weeks": (
            lambda a, d, n: sum(a + i * d for i in range(int(n)))
        ),
    }
    solved = dict.fromkeys(solve, 0)
    for text in itertools.islice(builtin_documents("math", 1), 1500):
        for pattern, answer in solve.items():
            if found := re.search(pattern, text.split("?")[0] + "?"):
                claimed = re.search(r"(?:#### |answer is )([\d.]+?)\.?$", text)
                assert answer(*map(Fraction, found.groups())) == Fraction(claimed[1]), text
                solved[pattern] += 1
    assert min(solved.values()) >= 5, solved


def test_math_has_a_dozen_kinds_of_problem_and_fills_every_blank():
    texts = list(itertools.islice(builtin_documents("math"), 500))
    assert len(builtin.PROBLEMS.strip().split("\n\n")) >= 12
    assert not any(re.search(r"[{}\[\]|_]", text) for text in texts)


# --- sections


@given(st.text(alphabet="ab \n", max_size=400), st.integers(2, 30))
def test_sections_keep_all_words_and_the_size(text, size):
    parts = list(sections(text, size))
    assert all(len(part) <= 2 * size for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_sections_cut_at_blank_lines():
    paragraphs = [f"{i} " * 20 for i in range(50)]
    parts = list(sections("\n\n".join(paragraphs), 200))
    assert len(parts) > 10
    assert [piece for part in parts for piece in part.split("\n\n")] == paragraphs


# --- sources


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file(tmp_path, suffix):
    path = str(write(tmp_path / f"a{suffix}", TEXTS))
    assert sorted(read(path)) == sorted(TEXTS)
    assert read(path) == read(path) != TEXTS
    assert read(path, seed=1) != read(path)


def test_a_text_file_is_one_document_unless_it_is_large(tmp_path):
    assert read(str(write(tmp_path / "small.txt", TEXTS))) == ["\n\n".join(TEXTS)]
    paragraphs = [f"paragraph {i} " * 20 for i in range(400)]
    parts = read(str(write(tmp_path / "large.txt", paragraphs)))
    assert len(parts) > 10
    assert sorted(piece for part in parts for piece in part.split("\n\n")) == sorted(paragraphs)


def test_globs_and_folders_read_all_kinds_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(("a.jsonl", "b.csv", "deep/c.parquet", "deep/d.txt", "e.json")):
        write(tmp_path / name, [f"document {i}"])
    (tmp_path / "README.md").write_text("not read")
    everything = [f"document {i}" for i in range(5)]
    assert sorted(read(str(tmp_path))) == everything
    assert sorted(read(f"{tmp_path}/**/*")) == everything
    assert read(f"{tmp_path}/*.jsonl") == ["document 0"]


def test_names_with_brackets_and_empty_files(tmp_path):
    folder = tmp_path / "a[b]"
    folder.mkdir()
    (folder / "empty.jsonl").write_text("")
    write(folder / "full.jsonl", TEXTS)
    assert sorted(read(str(folder))) == sorted(TEXTS)
    assert read(str(folder / "empty.jsonl")) == []


def test_a_relative_path_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    write(tmp_path / "user" / "name.jsonl", TEXTS)
    assert sorted(read("user")) == sorted(TEXTS)
    assert sorted(read("user/name.jsonl")) == sorted(TEXTS)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", TEXTS)
    assert sorted(read("~/a.jsonl")) == sorted(TEXTS)


@pytest.mark.parametrize(
    "source",
    [
        lambda: TEXTS,
        lambda: tuple(TEXTS),
        lambda: (text for text in TEXTS),
        lambda: datasets.Dataset.from_dict({"text": TEXTS}),
        lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ],
    ids=["list", "tuple", "generator", "dataset", "iterable-dataset"],
)
def test_objects_in_memory(source):
    assert sorted(read(source())) == sorted(TEXTS)
    assert read(source()) == read(source()) != TEXTS
    assert read(source(), seed=1) != read(source())


def test_a_column_of_another_name():
    rows = datasets.Dataset.from_dict({"id": [1, 2], "body": ["x", "y"]})
    assert sorted(read(rows, text_column="body")) == ["x", "y"]


def test_blank_and_missing_texts_are_skipped(tmp_path):
    assert read(["", "  \n", "a"]) == ["a"]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n')
    assert read(str(path)) == ["a"]


def test_an_endless_source_is_read_only_as_far_as_needed(monkeypatch):
    monkeypatch.setattr(sources, "LOCAL_BUFFER", 50)
    endless = (f"w{i % 4000} w5" for i in itertools.count())
    taken = list(itertools.islice(documents(DomainConfig("d", endless), 0), 100))
    assert len(set(taken)) == 100
    assert next(endless) == "w149 w5 "[:-1] or next(endless)


def test_a_buffer_smaller_than_the_source_loses_nothing(monkeypatch):
    monkeypatch.setattr(sources, "LOCAL_BUFFER", 7)
    assert sorted(read(TEXTS)) == sorted(TEXTS)


def test_a_hub_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sorted(read("user/name", dataset_config="en", split="test")) == sorted(TEXTS)
    assert read("user/name", seed=1) != read("user/name", seed=2)
    assert calls[0] == (("user/name", "en"), {"split": "test", "streaming": True})


def test_importing_does_not_import_datasets():
    code = "import sys, optimum_structprune.calibration.sources; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
