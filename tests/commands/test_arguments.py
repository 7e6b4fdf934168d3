"""Test the flags that commands derive from the fields of the configs."""

import re
from argparse import ArgumentParser, ArgumentTypeError
from contextlib import suppress
from dataclasses import fields, is_dataclass
from shlex import split
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from optimum_structprune import DomainConfig, RecoveryConfig, RunOptions, StructPruneConfig, StructPruneError
from optimum_structprune.arch.spec import WHOLE_MODEL
from optimum_structprune.commands.arguments import (
    GROUPS,
    domain,
    pruning_config,
    recovery_config,
    run_options,
    setting,
)
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.flags import COMMANDS as ALL_COMMANDS
from optimum_structprune.config.fields import field_help
from optimum_structprune.criteria.registry import CRITERIA


DECLARE = {command.name: command.declare for command in ALL_COMMANDS}
AMOUNT_FLAGS = ("--sparsity", "--widths", "--budget")
# The name of a command, its positional arguments, its config, and the function that reads the config.
COMMANDS = [
    ("prune", ["m", "o"], StructPruneConfig, pruning_config),
    ("plan", ["m"], StructPruneConfig, pruning_config),
    ("recover", ["m", "o"], RecoveryConfig, recovery_config),
]
DOMAIN_WORDS = ["a=a.txt@2", "{name: b, source: b.txt, split: test}"]
DOMAIN_VALUES = [
    {"name": "a", "source": "a.txt", "weight": 2.0},
    {"name": "b", "source": "b.txt", "split": "test"},
]


def parse(command, arguments):
    parser = ArgumentParser(prog="structprune")
    DECLARE[command](parser)
    return parser.parse_args(arguments)


def flag_of(field):
    return f"--{field.name.replace('_', '-')}"


def sample_words(annotation):
    """Return words of a command line for a field of this type, and the value that the words stand for."""
    members = (annotation,)
    if get_origin(annotation) in (Union, UnionType):
        members = get_args(annotation)
    kind = next(member for member in members if member is not NoneType)
    origin = get_origin(kind)
    inner_types = get_args(kind)

    if origin is Literal:
        choice = inner_types[-1]
        return [str(choice)], choice
    if origin in (list, tuple):
        if inner_types[0] is DomainConfig:
            return DOMAIN_WORDS, DOMAIN_VALUES
        words, value = sample_words(inner_types[0])
        return words * 2, [value] * 2
    if origin is dict:
        words, value = sample_words(inner_types[1])
        return [f"a={words[0]}"], {"a": value}
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return [f"{name}=[1, b]" for name in names], {name: [1, "b"] for name in names}

    if float in members:
        return ["0.25"], 0.25
    if kind is int:
        return ["3"], 3
    if kind is str:
        return ["word"], "word"
    return ["[1, b]"], [1, "b"]


@pytest.mark.parametrize(("command", "paths", "config_class", "read_config"), COMMANDS)
def test_every_field_has_a_flag_and_an_omitted_flag_sets_nothing(
    command, paths, config_class, read_config, monkeypatch
):
    # Single values may contradict other fields, so the config itself is not built.
    monkeypatch.setattr(config_class, "from_dict", dict)
    types = get_type_hints(config_class)

    assert read_config(parse(command, paths)) == {}

    for field in fields(config_class):
        words, expected = sample_words(types[field.name])
        arguments = list(paths)
        for word in words:
            arguments += [flag_of(field), word]

        values = read_config(parse(command, arguments))

        assert values == {field.name: expected}
        assert type(values[field.name]) is type(expected), field.name


@pytest.mark.parametrize("config_class", [StructPruneConfig, RecoveryConfig, RunOptions, DomainConfig])
def test_every_field_has_a_help_and_an_entry_in_the_docstring(config_class):
    docstring = config_class.__doc__.partition("Raises:")[0]
    entries = re.findall(r"^        (\w+): ", docstring, re.M)
    assert entries == [field.name for field in fields(config_class)]

    sentences = field_help(config_class)
    for name in entries:
        assert re.fullmatch("[A-Z].*[.]", sentences[name]), name


@pytest.mark.parametrize(("line", "message"), [
    ("--width mlp=24 --width mlp=8", "--width has two values for 'mlp', 24 and 8. Pass one."),
    ("--sparsity 0.2 --recovery tokens=5 --recovery tokens=6", "--recovery has two values for 'tokens', 5 and 6."),
    ("--sparsity 0.2 --recovery tokens=5 --recovery-tokens 6", "--recovery has two values for 'tokens', 5 and 6."),
    ("--width 'mlp={0: 24, 1: 32, 0: 8}'", "the key '0' is in line 1 and again in line 1"),
])  # fmt: skip
def test_a_repeated_name_is_refused(line, message, capsys):
    with pytest.raises((StructPruneError, SystemExit)) as refusal:
        pruning_config(parse("prune", split(f"m o {line}")))

    assert message in str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize("value", ["[]", "999999999999999999999", "-1", ".nan", "{}"])
def test_an_odd_value_of_any_flag_is_accepted_or_refused_in_a_sentence(value):
    """A flag may accept a number of 21 digits, because a budget or a file name can be such a number."""
    for command, paths, config_class, read_config in COMMANDS:
        for field in fields(config_class):
            flag = flag_of(field)
            arguments = list(paths)
            if command != "recover" and flag not in AMOUNT_FLAGS:
                arguments += ["--sparsity", "0.2"]

            for text in (value, f"a={value}"):
                with suppress(StructPruneError, SystemExit):
                    read_config(parse(command, arguments + [f"{flag}={text}"]))


def help_of(name):
    return field_help(StructPruneConfig)[name]


def test_the_help_is_grouped_and_quotes_the_help_of_the_fields():
    parser = ArgumentParser(prog="structprune")
    DECLARE["prune"](parser)
    output = parser.format_help()
    one_line = " ".join(output.split())

    parts = re.split(r"\n([a-z ]+):\n", output)
    titles = parts[1::2]
    texts = parts[2::2]
    flags = {title: re.findall(r"^  (--[\w-]+)", text, re.M) for title, text in zip(titles, texts, strict=True)}

    titles = [title for title in GROUPS if title != "dry run"]
    assert list(flags)[2:] == titles
    assert len(flags["most used"]) == 12
    assert {"--budget", "--width"} <= set(flags["most used"])
    assert flags["loading the model"] == ["--trust-remote-code", "--attn-implementation"]
    assert flags["method"] == ["--refit", "--error-feedback"]
    assert "--widths" not in output
    assert help_of("error_feedback") in one_line
    assert "(default: 0.5)" in one_line

    names = [field.name for field in fields(RecoveryConfig)]
    assert f"NAME is {', '.join(names[:-1])} or {names[-1]}. Repeatable." in one_line


def test_the_help_of_spaces_and_criteria_names_the_legal_values():
    words = set(re.findall(r"`(\w+)`", help_of("criterion")))
    assert words == set(CRITERIA.names())

    kinds = {"mlp", "attention", *WHOLE_MODEL}
    assert set(re.findall(r"`(\w+)`", help_of("targets"))) == kinds | {"sparsity", "budget"}


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: command.name)
def test_the_help_of_a_command_shows_its_examples(command, capsys):
    """`tests/test_docs.py` runs the examples."""
    with pytest.raises(SystemExit) as end:
        main([command.name, "--help"])

    assert not end.value.code
    printed = capsys.readouterr().out
    assert command.examples
    for example in command.examples:
        assert f"\n  {example}\n" in printed


SHORT_SPELLINGS = [
    ("--width mlp=8", {"widths": {"mlp": 8}}),
    ("--widths mlp=8", {"widths": {"mlp": 8}}),
    ("--target mlp --target attention", {"targets": ["mlp", "attention"]}),
    ("--skip-layer 0", {"skip_layers": [0]}),
    ("--budget parameters=110e6", {"budget": {"parameters": 110e6}}),
    ("--arch mine.yaml", {"arch_file": "mine.yaml"}),
    ("--recover", {"recovery": {}}),
    ("--recovery-tokens 9", {"recovery": {"tokens": 9}}),
    ("--recovery-tokens 9 --recovery 'lora={r: 2}' --recover", {"recovery": {"tokens": 9, "lora": {"r": 2}}}),
    ("--domain a=x@y.txt@0.5", {"domains": [{"name": "a", "source": "x@y.txt", "weight": 0.5}]}),
    ("--domain b=c@d.txt", {"domains": [{"name": "b", "source": "c@d.txt"}]}),
]


def test_short_spellings_set_the_fields(monkeypatch):
    monkeypatch.setattr(StructPruneConfig, "from_dict", dict)

    for spelling, values in SHORT_SPELLINGS:
        assert pruning_config(parse("prune", split(f"m o {spelling}"))) == values


def test_flags_of_prune_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    values = {
        "batch_size": 8,
        "checkpoint_dir": "here",
        "sparsity": 0.4,
        "criterion": "flap",
        "rounds": 3,
        "recovery": {"tokens": 900, "answer_share": 0.25},
    }
    file.write_text(yaml.safe_dump(values))
    line = ["m", "o", "--config", str(file)]

    options = run_options(parse("prune", line + ["--batch-size", "9"]))
    assert options == RunOptions(batch_size=9, checkpoint_dir="here")

    flags = ["--width", "mlp=8", "--rounds", "2", "--recovery", "tokens=500"]
    config = pruning_config(parse("prune", line + flags))
    assert config.sparsity is None
    assert config.widths == {"mlp": 8}
    assert config.rounds == 2
    assert config.criterion == "flap"
    assert config.recovery.tokens == 500
    assert config.recovery.answer_share == 0.25


def test_an_amount_by_flag_replaces_all_widths_of_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("widths: {mlp: 8, attention: 2}\n")
    line = ["m", "o", "--config", str(file)]

    config = pruning_config(parse("prune", line + ["--seed", "1"]))
    assert config.widths == {"mlp": 8, "attention": 2}

    config = pruning_config(parse("prune", line + ["--width", "mlp=9"]))
    assert config.widths == {"mlp": 9}


def test_flags_of_recover_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tokens: 5\nlora: {r: 4, lora_alpha: 8}\n")
    line = ["m", "o", "--config", str(file), "--tokens", "7", "--lora", "r=2"]
    line += ["--training", "bf16=true", "--answer-share", "0"]

    config = recovery_config(parse("recover", line))

    assert config.tokens == 7
    assert config.lora == {"r": 2, "lora_alpha": 8}
    assert config.training == {"bf16": True}
    assert config.answer_share == 0


def test_settings_have_types():
    for text, value in {"1e-4": 1e-4, "true": True, "3": 3, "cosine": "cosine", "[q, v]": ["q", "v"]}.items():
        assert setting(f"a={text}") == ("a", value)
        assert type(setting(f"a={text}")[1]) is type(value)


def test_malformed_settings_and_domains_are_refused():
    for text in ("a", "=3", "a=", "a=[3"):
        with pytest.raises(ArgumentTypeError):
            setting(text)

    with pytest.raises(ArgumentTypeError):
        domain("{name: qa")


def test_text_flags_name_domains_after_their_files():
    line = ["m", "o", "--sparsity", "0.2"]
    text_flags = ["--text", "notes.jsonl", "in/my letters.txt", "--domain", "a=b.txt", "--text", "c/"]

    config = pruning_config(parse("prune", line + text_flags))
    domains = [(domain_config.name, domain_config.source) for domain_config in config.domains]
    assert domains == [("notes", "notes.jsonl"), ("my-letters", "in/my letters.txt"), ("a", "b.txt"), ("c", "c/")]

    config = pruning_config(parse("prune", line + ["--text", "*.txt"]))
    assert config.domains[0].name == "text"
