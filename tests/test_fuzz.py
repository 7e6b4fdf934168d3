"""About 800 random inputs: each returns a value or raises a `StructPruneError`. CI uses the same inputs each time."""

import json
import os
import warnings
from dataclasses import MISSING, fields
from itertools import islice

import datasets
import pytest
import torch
from helpers import same_weights
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import build, config

from optimum_structprune import DomainConfig, Plan, RecoveryConfig, StructPruneConfig, StructPruneError, prune_model
from optimum_structprune.arch.family import read_families
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.domains.sources import documents, resolve


CONFIGS = (StructPruneConfig, RecoveryConfig, DomainConfig)
FIELD_NAMES = set()
for config_class in CONFIGS:
    FIELD_NAMES.update(field.name for field in fields(config_class))
WORDS = sorted(FIELD_NAMES)
WORDS += ["mlp", "attention", "parameters", "bytes", "obs", "least_squares", "sensitivity", "none", "chat"]


def examples(number):
    """Return the settings of a test with a number of examples in the nightly profile, and a tenth in others."""
    if settings.get_current_profile_name() != "nightly":
        number = number // 10
    return settings(
        max_examples=number,
        derandomize="CI" in os.environ,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


words = st.sampled_from(WORDS) | st.text(max_size=6)
leaves = (
    st.none() | st.booleans() | st.integers(-3, 200) | st.integers() | st.floats() | words
    | st.sampled_from([0.5, 1, 1e-4, "builtin:prose", "preset:code", "{a}", "", float("nan")])
)  # fmt: skip


def containers(items):
    """Return a strategy of lists and mappings of items."""
    return st.one_of(st.lists(items, max_size=3), st.dictionaries(words, items, max_size=3))


values = st.recursive(leaves, containers, max_leaves=8)


def mappings(config):
    """Return a strategy of mappings whose keys are mostly fields of a config."""
    names = [field.name for field in fields(config)]
    keys = st.one_of(st.sampled_from(names), words)
    return st.dictionaries(keys, values, max_size=4)


def altered(node):
    """Return a strategy that replaces, removes or adds single values anywhere in a description."""
    if isinstance(node, list):
        parts = [altered(item) for item in node]
        strategy = st.tuples(*parts).map(list)
    elif isinstance(node, dict):
        strategy = altered_mapping(node)
    else:
        strategy = st.just(node)
    # One value in 21 is replaced.
    return st.one_of([strategy] * 20 + [values])


def altered_mapping(node):
    """Return a strategy that alters the values of a mapping, and sometimes drops or adds a key."""
    parts = st.fixed_dictionaries({key: altered(value) for key, value in node.items()})
    dropped_key = st.sampled_from(list(node) + [None] * 30)
    addition = st.one_of([st.just({})] * 20 + [st.dictionaries(words, values, max_size=1)])

    def combine(parts, dropped_key, addition):
        mapping = parts | addition
        mapping.pop(dropped_key, None)
        return mapping

    return st.builds(combine, parts, dropped_key, addition)


def value_or_refusal(call, *args, **kwargs):
    """Return the value of a call, or None if the call refuses the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*args, **kwargs)
        except StructPruneError as error:
            assert str(error)
            return None


@examples(3000)
@given(st.one_of([st.tuples(st.just(config), mappings(config)) for config in CONFIGS]), values)
def test_configs_accept_or_refuse_any_input(case, data):
    config, arguments = case
    built = value_or_refusal(config.from_dict, arguments)
    if built is not None:
        assert value_or_refusal(config.from_dict, built.to_dict()) is not None

    required = set()
    for field in fields(config):
        if field.default is MISSING and field.default_factory is MISSING:
            required.add(field.name)
    if required <= arguments.keys():
        value_or_refusal(config, **arguments)

    for config in CONFIGS:
        value_or_refusal(config.from_dict, data)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


PLAN = {
    "model_type": "llama", "keep": {"mlp": {"0": [0, 1], "1": [2]}, "layer": {"-1": [0]}},
    "sizes": {"mlp": 4, "layer": 2}, "dense": "0a",
}  # fmt: skip
ENTRY = {
    "name": "a", "origin": {"name": "a", "source": "x.txt"}, "weight": 0.5, "calibration_tokens": 5,
    "heldout_tokens": 2, "samples_sha256": "00", "heldout_sha256": "01", "documents": ["02"],
    "heldout_documents": ["03"],
}  # fmt: skip
MANIFEST = {
    "seed": 0, "seq_length": 8, "tokenizer": "", "versions": {"torch": "2"}, "domains": [ENTRY],
}  # fmt: skip
FAMILIES = [
    {
        "model_types": ["mine"],
        "layer_path": "layers",
        "layer_class": {"mine": "MineLayer"},
        "layer": {"size": "num_hidden_layers"},
        "hidden": {"size": "hidden_size", "embed": "e", "head": "h", "final": "n", "norms": ["n"],
                   "consumers": {"n": ["q"]}, "producers": ["o"]},
        "missing": {"expert": "why"},
        "spaces": {
            "mlp": {"size": "intermediate_size", "producers": {"up": "unit"}, "consumers": {"down": "unit"},
                    "also": ["g"]},
            "attention": {"size": "heads", "producers": {"q": ["q"]}, "consumers": {"o": "q"}, "requires": {"x": [1]}},
        },
    },
    {"model_types": ["other"], "text": "text_config"},
]  # fmt: skip


@pytest.mark.parametrize(("description", "load"), [
    (PLAN, Plan.load), (MANIFEST, Manifest.load), (FAMILIES, read_families),
], ids=["plan", "manifest", "families"])  # fmt: skip
@examples(900)
@given(drawn=st.data())
def test_files_are_read_or_refused(file, description, load, drawn):
    file.write_text(json.dumps(description))
    loaded = value_or_refusal(load, file)
    assert loaded is not None
    check_loaded(loaded, file)

    altered_description = drawn.draw(st.one_of(altered(description), values))
    file.write_text(json.dumps(altered_description, default=str))
    loaded = value_or_refusal(load, file)
    if loaded is not None:
        check_loaded(loaded, file)


def check_loaded(loaded, file):
    """Check that a loaded plan, manifest or list of families can be used."""
    if isinstance(loaded, Plan):
        loaded.widths()
        assert value_or_refusal(Plan.from_dict, loaded.to_dict()) == loaded
    elif isinstance(loaded, Manifest):
        loaded.overlaps(DomainConfig(name="b", source="x.txt"), ["03"])
        loaded.save(file)
        assert value_or_refusal(Manifest.load, file) is not None
    else:
        for family in loaded:
            for names in (family.model_types, family.layer_path, family.spaces):
                assert all(isinstance(name, str) for name in names)


sources = st.tuples(
    st.sampled_from(
        ["", "builtin:", "preset:", "self:", "memory:", "/", "~", "./", "**/", "no/where", "*.txt", "a/b"]
    ),
    st.sampled_from(["", "code", "math", "prose", "hybrid", "[", "\x00", "*", "é", "x" * 300, "..", "a.csv", "}"])
    | st.text(max_size=5),
).map("".join)


@examples(600)
@example(source="x" * 300, template=None, split="train")  # File systems do not allow names of this length.
@given(source=sources, template=st.none() | st.sampled_from(["chat", "{text}", "{a}: {b}"]), split=words)
def test_sources_are_read_or_refused(monkeypatch, tmp_path_factory, source, template, split):
    def load_nothing(*args, **kwargs):
        if args[:1] == ("json",) or "data_files" in kwargs:
            raise ValueError("files are read in test_domains.py")
        raise datasets.exceptions.DatasetNotFoundError("offline")

    def read_document(domain):
        return list(islice(documents(domain, 0), 1))

    monkeypatch.setattr(datasets, "load_dataset", load_nothing)
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    domain = value_or_refusal(DomainConfig, name="a", source=source, template=template, split=split)
    if domain is None:
        return
    # These sources would read every file of the disk.
    if source.startswith(("/", "~", "**", "..", "./")) and "no" not in source:
        return

    for resolved in value_or_refusal(resolve, [domain]) or []:
        value_or_refusal(read_document, resolved)


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 6, 8, 12, 70]), max_size=4) | st.sampled_from([[8, 12], [8, 3, 8, 8]])
dtypes = st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.complex64])
samples = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtypes)


@examples(300)
@given(st.sampled_from(["llama-tied", "gpt2-tied", "bert", "vit"]), st.dictionaries(st.text(), samples))
def test_inputs_prune_a_model_or_are_refused(case, inputs):
    model = build(case)
    settings = config(widths={"mlp": 16})  # The ViT has 24 channels.
    small = value_or_refusal(prune_model, model, settings, inputs=inputs)

    assert same_weights(model, build(case))
    if small is not None:
        assert small.num_parameters() < model.num_parameters()
