"""Strictness and round trips of the config."""

import json
from itertools import islice, pairwise

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError
from optimum_structprune.arch.family import read_families
from optimum_structprune.config.fields import by_layer, parse_yaml, read_yaml
from optimum_structprune.record.plan import Plan


words = st.text("abcxyz_", min_size=1, max_size=8)
odd_words = words | st.sampled_from(
    ["yes", "~", "1_000", "a\nb", "é", "a: b", "1e3", "12e4567", ".5e3", "0100", "0o7", "2024-01-01"]
)
domains = st.lists(
    st.builds(DomainConfig, name=odd_words, source=odd_words, weight=st.floats(0.1, 10), revision=odd_words),
    min_size=1,
    max_size=4,
    unique_by=lambda domain: domain.name,
)
amounts = st.one_of(
    st.fixed_dictionaries({"sparsity": st.floats(1e-7, 0.99)}),
    st.fixed_dictionaries({"widths": st.dictionaries(words, st.integers(1, 9999), min_size=1, max_size=3)}),
)
others = st.fixed_dictionaries(
    {},
    optional={
        "targets": st.lists(words, min_size=1, max_size=3).map(tuple),
        "refit": st.sampled_from(["none", "least_squares"]),
        "rounds": st.integers(1, 9),
        "num_samples": st.integers(1, 999),
        "error_feedback": st.floats(0, 1),
        "skip_layers": st.lists(st.integers(0, 9)).map(tuple),
        "domains": domains,
        "seed": st.integers(0, 2**31),
    },
)
configs = st.tuples(amounts, others).map(lambda parts: StructPruneConfig(**parts[0], **parts[1]))


@pytest.mark.parametrize(("fields", "expected"), [
    ({"sparsity": 0.2}, ("mlp",)),
    ({"budget": {"parameters": 9}, "allocation": "search"}, ("mlp", "attention")),
    ({"budget": {"cache_bytes_per_token": 9}}, ("attention",)),
    ({"sparsity": 0.2, "targets": ["attention"]}, ("attention",)),
])  # fmt: skip
def test_the_ffn_shrinks_unless_losses_or_the_cache_decide(fields, expected):
    assert StructPruneConfig(**fields).targets_or_default == expected


@settings(max_examples=30)
@given(config=configs)
def test_round_trips(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    assert StructPruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(folder)
    assert (folder / "structprune_config.json").exists()
    assert StructPruneConfig.from_pretrained(folder) == config
    assert StructPruneConfig.from_dict(parse_yaml(json.dumps(config.to_dict()))) == config  # which YAML reads


@pytest.mark.parametrize("name", StructPruneConfig.gone)
def test_a_saved_config_that_names_what_is_gone_loads_where_nothing_else_was_asked_for(name):
    left = StructPruneConfig.gone[name]
    assert StructPruneConfig.from_dict({name: left, "sparsity": 0.2}) == StructPruneConfig(sparsity=0.2)
    with pytest.raises(StructPruneError, match=f"'{name}' is gone, only {left!r} is left, got 'other'"):
        StructPruneConfig.from_dict({name: "other", "sparsity": 0.2})


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "exactly one of sparsity, widths and budget .* got none; budget={'parameters': 0.8}"),
    ({"languages": ["en"]}, r"got none; targets=\['vocab'\], .* .--target vocab --budget parameters=0.8. keeps"),
    ({"sparsity": 0.2, "widths": {"mlp": 8}}, "exactly one of sparsity, widths and budget.*sparsity=0.2"),
    ({"sparsity": 0}, "'sparsity'.*between 0 and 1.*got 0"),
    ({"sparsity": 0.2, "num_samples": 10**400}, "'num_samples' has to be greater than 0, got 1000"),
    ({"widths": {}}, "widths has to name at least one space"),
    ({"widths": {"mlp": 0}}, r"widths\['mlp'\] has to be 1 or more, got 0"),
    ({"sparsity": 0.2, "rounds": "3"}, "'rounds'.*expected int, got str.*3"),
    ({"budget": {"parameter": 9}}, "no 'parameter'. Did you mean 'parameters'"),
    ({"budget": {"parameters": 0}}, "has to be greater than 0, got 0"),
    ({"budget": {}}, "names exactly one of parameters, bytes, cache_bytes_per_token"),
    ({"budget": {"parameters": 9, "bytes": 9}}, "names exactly one of"),
    ({"sparsity": 0.2, "seed": 2**32}, "'seed'.*between 0 and 4294967295"),
    ({"widths": {"mlp": [24, 32]}, "allocation": "search"}, "what every layer keeps, so allocation='search'"),
    ({"widths": {"mlp": 8}, "allocation": "search_uniform"}, "one shape of all layers"),
    ({"sparsity": 0.1, "allocation": "search_uniform", "skip_layers": [0]}, "choose allocation='search'"),
    ({"sparsity": 0.2, "targets": []}, "'targets'.*at least one"),
    ({"sparsity": 0.2, "languages": ["en,german"]}, r"no language 'german'. Did you mean 'de \(German\)'\? Known"),
    ({"sparsity": 0.2, "domains": []}, "domains has to name at least one domain"),
    ({"sparsity": 0.2, "domains": ["wiki"]}, "'domains'.*wiki"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": "x"}] * 2}, "two entries of the name 'a'; rename one"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": ""}]}, "'source'.*name something"),
    ({"sparsity": 0.2, "domains": [{"name": "a\udce9", "source": "x"}]}, "'name' holds half a character"),
    ({"sparsity": 0.2, "domains": [{"name": name, "source": "x", "weight": 1e308} for name in "ab"]}, "to infinity"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "sorce": "x"}]}, r"no field 'sorce'. Did you mean 'source'\?"),
])  # fmt: skip
def test_bad_values_name_the_field_and_the_value(fields, message):
    with pytest.raises(StructPruneError, match=message) as caught:
        StructPruneConfig.from_dict(fields)
    assert "\n" not in str(caught.value)


def test_a_value_of_another_kind_is_refused_in_a_short_line():
    with pytest.raises(StructPruneError, match=r"'domains' takes list\[DomainConfig\]; got \[{'name'") as caught:
        StructPruneConfig(sparsity=0.2, domains=[{"name": "a", "source": ["text"] * 1000}])
    assert len(str(caught.value)) < 160


def test_assignment_is_checked_too_and_sources_in_memory_are_named():
    config = StructPruneConfig(sparsity=0.2, domains=[DomainConfig(name="a", source=["text"])])
    with pytest.raises(StrictDataclassError, match="'sparsity'"):
        config.sparsity = 1.5
    assert config.to_dict()["domains"][0]["source"] == "memory:list"


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("-2.5E3", -2500.0), ("100", 100), ("a1e4", "a1e4"), ("0100", 100), ("0o17", 15), ("0x1f", 31),
    ("1:30", "1:30"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"),
])  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


def test_layers_are_named_by_numbers():
    assert by_layer({"0": 24, 3: 30}, "widths") == {0: 24, 3: 30}
    for wrong in ("x", None, "1.5", 0.5, True):
        with pytest.raises(StructPruneError, match=r"widths\['mlp'\] names layers by their numbers, each once, got"):
            StructPruneConfig(widths={"mlp": {wrong: 24}})
        with pytest.raises(StructPruneError, match="'mlp' names layers by their numbers, each once, got"):
            Plan.from_dict({"keep": {"mlp": {wrong: [0]}}})
    with pytest.raises(StructPruneError, match=r"each once, got \[0, '0'\]"):
        StructPruneConfig(widths={"mlp": {0: 24, "0": 30}})


def test_a_file_that_is_no_mapping_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    pairs = pairwise("abcdefghijklmnopqrstuvwxyz")
    lines = ["a: &a [x, x]", *(f"{new}: &{new} [*{old}, *{old}]" for old, new in pairs)]
    endless, deep, wrong = "\n".join(lines), "sparsity: " + "[" * 3000 + "]" * 3000, "sparsity: !!timestamp x"
    code = "!!python/object/apply:os.system ['true']"
    for content in ("- a\n- b\n", "sparsity: [0.2\n", "", code, endless, deep, wrong):
        path.write_text(content)
        for read in (read_yaml, read_families):
            with pytest.raises(StructPruneError, match="run.yaml"):
                read(path)
    with pytest.raises(StructPruneError, match="structprune_config.json"):
        StructPruneConfig.from_pretrained(tmp_path)


@given(items=st.lists(st.integers()), order=st.lists(st.integers(0, 2)))
def test_what_an_iterator_gives_is_read_again_and_no_further_than_it_is_needed(items, order):
    taken = []
    source = DomainConfig("a", (taken.append(item) or item for item in items)).source
    readings = [(iter(source), []) for _ in range(3)]
    for number in order:
        reading, read = readings[number]
        read += islice(reading, 1)
        assert taken == items[: len(taken)] and len(taken) == max(len(read) for _, read in readings)
    assert all([*read, *reading] == items for reading, read in readings) and [*source] == items
