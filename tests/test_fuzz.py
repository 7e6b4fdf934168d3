"""About 800 odd inputs, in CI the same in every run: each comes out as a value or as a `StructPruneError`."""

import dataclasses
import json
import os
import warnings
from dataclasses import fields
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
NAMES = sorted({field.name for config in CONFIGS for field in fields(config)})
WORDS = [*NAMES, "mlp", "attention", "parameters", "bytes", "obs", "least_squares", "sensitivity", "none", "chat"]


def examples(number):
    return settings(
        max_examples=number if settings.get_current_profile_name() == "nightly" else number // 10,
        derandomize="CI" in os.environ,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


words = st.sampled_from(WORDS) | st.text(max_size=6)
leaves = (
    st.none() | st.booleans() | st.integers(-3, 200) | st.integers() | st.floats() | words
    | st.sampled_from([0.5, 1, 1e-4, "builtin:prose", "preset:code", "{a}", "", float("nan")])
)  # fmt: skip
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)


def mappings(config):
    """Mappings whose keys are mostly fields of a config."""
    names = st.sampled_from([field.name for field in fields(config)]) | words
    return st.dictionaries(names, values, max_size=4)


def altered(node):
    """A whole description in which single values, anywhere, are replaced, left out or added."""
    same = st.just(node)
    if isinstance(node, list):
        same = st.tuples(*map(altered, node)).map(list)
    elif isinstance(node, dict):
        dropped = st.sampled_from([*node, *[None] * 30])
        added = st.one_of(*[st.just({})] * 20, st.dictionaries(words, values, max_size=1))
        parts = st.fixed_dictionaries({key: altered(value) for key, value in node.items()})
        same = st.builds(
            lambda parts, dropped, added: {key: value for key, value in (parts | added).items() if key != dropped},
            *(parts, dropped, added),
        )
    return st.one_of(*[same] * 20, values)


def handled(call, *args, **kwargs):
    """What a call gives; None where it refuses the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*args, **kwargs)
        except StructPruneError as error:
            assert str(error)
            return None


@examples(3000)
@given(st.one_of(*(st.tuples(st.just(config), mappings(config)) for config in CONFIGS)), values)
def test_configs_from_mappings_arguments_and_anything(case, data):
    config, fields = case
    built = handled(config.from_dict, fields)
    if built is not None:
        assert handled(config.from_dict, built.to_dict()) is not None
    required = {field.name for field in dataclasses.fields(config) if field.default is field.default_factory}
    if required <= fields.keys():
        handled(config, **fields)
    for config in CONFIGS:
        handled(config.from_dict, data)


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


@pytest.mark.parametrize(("whole", "load"), [
    (PLAN, Plan.load), (MANIFEST, Manifest.load), (FAMILIES, read_families),
], ids=["plan", "manifest", "families"])  # fmt: skip
@examples(900)
@given(drawn=st.data())
def test_files(file, whole, load, drawn):
    for data in (whole, drawn.draw(altered(whole) | values)):
        file.write_text(json.dumps(data, default=str))
        loaded = handled(load, file)
        assert loaded is not None or data is not whole, "what is altered is right before"
        if isinstance(loaded, Plan):
            loaded.widths()
            assert handled(Plan.from_dict, loaded.to_dict()) == loaded
        elif isinstance(loaded, Manifest):
            loaded.overlaps(DomainConfig(name="b", source="x.txt"), ["03"])
            loaded.save(file)
            assert handled(Manifest.load, file) is not None
        for family in loaded if isinstance(loaded, list) else ():
            assert all(isinstance(name, str) for name in (*family.model_types, *family.layer_path, *family.spaces))


sources = st.tuples(
    st.sampled_from(
        ["", "builtin:", "preset:", "self:", "memory:", "/", "~", "./", "**/", "no/where", "*.txt", "a/b"]
    ),
    st.sampled_from(["", "code", "math", "prose", "hybrid", "[", "\x00", "*", "é", "x" * 300, "..", "a.csv", "}"])
    | st.text(max_size=5),
).map("".join)


@examples(600)
@example(source="x" * 300, template=None, split="train")  # longer than a file system allows a name to be
@given(source=sources, template=st.none() | st.sampled_from(["chat", "{text}", "{a}: {b}"]), split=words)
def test_sources(monkeypatch, tmp_path_factory, source, template, split):
    def no_hub(*args, **kwargs):
        if args[:1] == ("json",) or "data_files" in kwargs:
            raise ValueError("files are read in test_domains.py")
        raise datasets.exceptions.DatasetNotFoundError("offline")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    domain = handled(DomainConfig, name="a", source=source, template=template, split=split)
    if domain is None or source.startswith(("/", "~", "**", "..", "./")) and "no" not in source:
        return  # the whole disk is no text
    for resolved in handled(resolve, [domain]) or []:
        handled(lambda domain: list(islice(documents(domain, 0), 1)), resolved)


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 6, 8, 12, 70]), max_size=4) | st.sampled_from([[8, 12], [8, 3, 8, 8]])
dtypes = st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.complex64])
samples = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtypes)


@examples(300)
@given(st.sampled_from(["llama-tied", "gpt2-tied", "bert", "vit"]), st.dictionaries(st.text(), samples))
def test_inputs(case, inputs):
    model = build(case)
    small = handled(prune_model, model, config(widths={"mlp": 16}), inputs=inputs)  # the ViT has 24 channels
    assert same_weights(model, build(case)) and (small is None or small.num_parameters() < model.num_parameters())
