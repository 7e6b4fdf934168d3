"""Test the checks and the round trips of the config."""

import json
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.arch.family import read_families
from optimum_structprune.config.fields import parse_yaml, read_yaml
from optimum_structprune.method.plan import Plan
from optimum_structprune.system.codec import by_layer


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
optional_fields = st.fixed_dictionaries(
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
configs = st.tuples(amounts, optional_fields).map(lambda parts: StructPruneConfig(**(parts[0] | parts[1])))


@pytest.mark.parametrize(("fields", "expected"), [
    ({"sparsity": 0.2}, ("mlp",)),
    ({"budget": {"parameters": 900}, "allocation": "sensitivity"}, ("mlp", "attention")),
    ({"budget": {"cache_bytes_per_token": 9}}, ("attention",)),
    ({"budget": {"cache_bytes_per_token": 9, "bytes": 900}}, ("mlp", "attention")),
    ({"sparsity": 0.2, "targets": ["attention"]}, ("attention",)),
])  # fmt: skip
def test_the_default_targets_depend_on_the_allocation_and_the_budget(fields, expected):
    assert StructPruneConfig(**fields).targets_or_default == expected


@settings(max_examples=30)
@given(config=configs)
def test_a_config_survives_a_round_trip(config, tmp_path_factory):
    text = json.dumps(config.to_dict())
    assert StructPruneConfig.from_dict(json.loads(text)) == config
    # JSON is valid YAML.
    assert StructPruneConfig.from_dict(parse_yaml(text)) == config

    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    assert (folder / "structprune_config.json").exists()
    assert StructPruneConfig.from_pretrained(folder) == config


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "Exactly one of `sparsity`, `widths` and `budget` .* got none. For example, budget={'parameters': 0.8}"),
    ({"languages": ["en"]}, r"got none. .*targets=\['vocab'\], .* .--target vocab --budget parameters=0.8. keeps"),
    ({"sparsity": 0.2, "widths": {"mlp": 8}}, "Exactly one of `sparsity`, `widths` and `budget`.*sparsity=0.2"),
    ({"sparsity": 0}, "`sparsity` must be greater than 0 and less than 1, got 0"),
    ({"sparsity": float("nan")}, "`sparsity` must be greater than 0 and less than 1, got nan"),
    ({"sparsity": True}, "`sparsity` must be a number, got True"),
    ({"sparsity": 0.2, "error_feedback": 1.5}, "`error_feedback` must be at least 0 and at most 1, got 1.5"),
    ({"sparsity": 10**400}, "`sparsity` must be greater than 0 and less than 1, got 1000"),
    ({"widths": {}}, "`widths` must name at least one space"),
    ({"widths": {"mlp": 0}}, "`widths` must be at least 1 for 'mlp', got 0"),
    ({"widths": {"mlp": 9.5}}, "`widths` must be a mapping to a whole number or a list of a whole"),
    ({"sparsity": 0.2, "rounds": "3"}, "`rounds` must be a whole number, got '3'"),
    ({"sparsity": 0.2, "rounds": 0}, "`rounds` must be at least 1, got 0"),
    ({"sparsity": 0.2, "rounds": []}, r"`rounds` must be a whole number, got \[\]"),
    ({"sparsity": 0.2, "refit": "ls"}, "`refit` must be a registered refit, got 'ls'. .*least_squares"),
    ({"sparsity": 0.2, "allocation": "even"}, "`allocation` must be 'uniform' or 'sensitivity', got 'even'"),
    ({"sparsity": 0.2, "round_to": "most"}, "`round_to` must be a whole number or 'auto', got 'most'"),
    ({"budget": {"parameter": 9}}, "no 'parameter'. Did you mean 'parameters'"),
    ({"budget": {"parameters": float("inf")}}, "finite for 'parameters', got inf"),
    ({"budget": {"parameters": 0}}, "must be greater than 0 and .* for 'parameters', got 0"),
    ({"budget": {}}, "must name at least one of parameters, active_parameters, bytes, cache_bytes_per_token"),
    ({"sparsity": 0.2, "seed": 2**32}, "`seed` must be from 0 to 4294967295"),
    ({"widths": {"mlp": [24, 32]}, "allocation": "sensitivity"}, "the width of every layer, so allocation='sens"),
    ({"sparsity": 0.2, "general_text": "builtin:general", "general_share": 0}, "has no effect"),
    ({"sparsity": 0.2, "targets": []}, "`targets` must not be empty"),
    ({"sparsity": 0.2, "languages": ["en,german"]}, r"no language 'german'. Did you mean 'de \(German\)'\? Known"),
    ({"sparsity": 0.2, "languages": ["de", False]}, "no language 'no', which YAML reads as false. Quote"),
    ({"sparsity": 0.2, "languages": ["de", "no"]}, "no language 'no'. .*Known: "),
    ({"sparsity": 0.2, "domains": []}, "`domains` must not be empty"),
    ({"sparsity": 0.2, "domains": ["wiki"]}, "DomainConfig must be a mapping of fields, got 'wiki'"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": "x"}] * 2}, "two entries of the name 'a'. Rename one"),
    ({"sparsity": 0.2, "domains": [{"name": "a"}]}, "DomainConfig needs the field `source`"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": ""}]}, "`source` must not be empty"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": 3}]}, "`source` must be a path, a name, .* got int"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": "x", "template": "{a b}"}]}, "'a b' .* not a column name"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": "x", "template": "text"}]}, "hold column names such as"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "source": "x", "weight": float("inf")}]}, "`weight` .* finite"),
    ({"sparsity": 0.2, "domains": [{"name": "a", "sorce": "x"}]}, r"no field 'sorce'. Did you mean 'source'\?"),
    ({"sparsity": 0.2, "recovery": {"lora": {"r": 2}, "train": "full"}}, "needs train='lora', got train='full'"),
])  # fmt: skip
def test_bad_values_name_the_field_and_the_value(fields, message):
    with pytest.raises(StructPruneError, match=message) as caught:
        StructPruneConfig.from_dict(fields)

    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_refused_with_the_nearest_field():
    with pytest.raises(StructPruneError, match="StructPruneConfig has no field 'sparsiti'. Did you mean 'sparsity'"):
        StructPruneConfig(sparsiti=0.2)


def test_a_saved_config_with_fields_of_another_version_loads_with_a_warning(tmp_path):
    config = StructPruneConfig(sparsity=0.2, domains=[DomainConfig("a", "a.txt")], recovery=RecoveryConfig())
    values = config.to_dict()
    values["method"] = "iterative"
    values["recovery"]["merge"] = True
    values["domains"][0]["answers_only"] = False
    (tmp_path / "structprune_config.json").write_text(json.dumps(values))

    message = "fields that this version does not know: (method|merge|answers_only)"
    with pytest.warns(UserWarning, match=message) as warnings:
        assert StructPruneConfig.from_pretrained(tmp_path) == config

    assert len(warnings) == 3


def test_a_value_of_another_type_is_refused_in_a_short_line():
    with pytest.raises(StructPruneError, match=r"`domains` must be a list of DomainConfig, got \[{'name'") as caught:
        StructPruneConfig(sparsity=0.2, domains=[{"name": "a", "source": ["text"] * 1000}])

    assert len(str(caught.value)) < 160


def test_a_source_in_memory_is_saved_by_its_type():
    config = StructPruneConfig(sparsity=0.2, domains=[DomainConfig(name="a", source=["text"])])

    assert config.to_dict()["domains"][0]["source"] == "memory:list"


def test_an_assigned_value_is_checked_before_a_run():
    config = StructPruneConfig(sparsity=0.2, domains=[DomainConfig(name="a", source=["text"])])
    config.sparsity = 1.5

    with pytest.raises(StructPruneError, match="`sparsity` must be greater than 0 and less than 1, got 1.5"):
        StructPruner(config)


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("-2.5E3", -2500.0), (".5e3", 500.0), ("1e+2", 100.0), ("0.25", 0.25), ("100", 100),
    ("a1e4", "a1e4"), ("1e4a", "1e4a"), ("true", True), ("cosine", "cosine"),
])  # fmt: skip
def test_values_in_yaml_have_types(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(("text", "key", "lines"), [
    ("sparsity: 0.2\nseed: 1\nsparsity: 0.5\n", "sparsity", (1, 3)),
    ("widths:\n  mlp: {0: 24, 1: 32,\n    0: 8}\n", "0", (2, 3)),
    ("domains:\n  - name: a\n    source: x\n    name: b\n", "name", (2, 4)),
])  # fmt: skip
def test_a_repeated_key_is_refused_with_both_lines(text, key, lines, tmp_path):
    message = f"the key '{key}' is in line {lines[0]} and again in line {lines[1]}"
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)

    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(StructPruneError, match=f"run.yaml cannot be read: {message}"):
        read_yaml(tmp_path / "run.yaml")


def test_keys_that_a_merge_overrides_are_not_repeated():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_layers_are_named_by_numbers():
    assert by_layer({"0": 24, 3: 30}, "widths") == {0: 24, 3: 30}

    message = "'mlp' must have layer indices as keys, each once, got"
    for key in ("x", None, "1.5", 0.5, True):
        with pytest.raises(StructPruneError, match=f"`widths` of {message}"):
            StructPruneConfig(widths={"mlp": {key: 24}})
        with pytest.raises(StructPruneError, match=message):
            Plan.from_dict({"keep": {"mlp": {key: [0]}}})

    with pytest.raises(StructPruneError, match=r"each once, got \[0, '0'\]"):
        StructPruneConfig(widths={"mlp": {0: 24, "0": 30}})


def test_a_file_without_a_mapping_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    sequence = "- a\n- b\n"
    unclosed = "sparsity: [0.2\n"
    code = "!!python/object/apply:os.system ['true']"
    no_timestamp = "sparsity: !!timestamp x"
    for content in (sequence, unclosed, "", code, no_timestamp):
        path.write_text(content)
        for read_file in (read_yaml, read_families):
            with pytest.raises(StructPruneError, match="run.yaml"):
                read_file(path)

    with pytest.raises(StructPruneError, match="structprune_config.json"):
        StructPruneConfig.from_pretrained(tmp_path)


def test_an_exponential_value_of_aliases_is_refused_at_once():
    """Every line repeats the value of the line before twice, so the last value expands to 2 ** 26 words."""
    lines = ["seed: &a [x, x]"]
    for old, new in pairwise("abcdefghijklmnopqrstuvwxyz"):
        lines.append(f"{new}: &{new} [*{old}, *{old}]")
    lines.append("sparsity: *z")
    values = parse_yaml("\n".join(lines))

    with pytest.raises(StructPruneError, match=r"`sparsity` must be a number, got \[\["):
        StructPruneConfig(sparsity=values["sparsity"])


@given(items=st.lists(st.integers()), order=st.lists(st.integers(0, 2)))
def test_an_iterator_is_consumed_on_demand_and_can_be_read_several_times(items, order):
    consumed = []

    def generate():
        for item in items:
            consumed.append(item)
            yield item

    source = DomainConfig("a", generate()).source
    readers = [iter(source) for _ in range(3)]
    results = [[] for _ in range(3)]
    for number in order:
        results[number] += islice(readers[number], 1)
        assert consumed == items[: len(consumed)]
        assert len(consumed) == max(len(result) for result in results)

    for reader, result in zip(readers, results, strict=True):
        assert result + list(reader) == items
    assert list(source) == items


@pytest.mark.parametrize(("text", "expected"), [
    ("160MB", 160_000_000), ("1.5GB", 1_500_000_000), ("1.5 gb", 1_500_000_000), ("2MiB", 2 * 2**20),
    ("900kB", 900_000),
])  # fmt: skip
def test_a_limit_in_bytes_may_have_a_unit(text, expected):
    for name in ("file", "bytes", "cache_bytes_per_token"):
        assert StructPruneConfig(budget={name: text}).budget == {name: expected}


@pytest.mark.parametrize(("budget", "message"), [
    ({"file": "160 parsecs"}, "such as 160MB or 1.5GB for 'file', got '160 parsecs'"),
    ({"file": "MB"}, "such as 160MB"),
    ({"file": 160}, "such as 160MB for 'file', or a share below 1, got 160"),
    ({"parameters": "100MB"}, "without a unit for 'parameters', got '100MB'"),
    ({"file": "0MB"}, "greater than 0"),
])  # fmt: skip
def test_a_limit_with_a_wrong_unit_is_refused(budget, message):
    with pytest.raises(StructPruneError, match=message):
        StructPruneConfig(budget=budget)
