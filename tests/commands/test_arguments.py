"""Flags are made of the configs' fields: each field is there, has a type and a help, and is laid over the file."""

import re
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import fields, is_dataclass
from shlex import split
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from optimum_structprune import DomainConfig, RecoveryConfig, RunOptions, StructPruneConfig, StructPruneError
from optimum_structprune.commands.arguments import (
    GROUPS,
    domain,
    pruning_config,
    recovery_config,
    run_options,
    setting,
)
from optimum_structprune.commands.flags import COMMANDS as ALL


DECLARE = {command.name: command.declare for command in ALL}
AMOUNT_FLAGS = ("--sparsity", "--widths", "--budget")
COMMANDS = [
    ("prune", ["m", "o"], StructPruneConfig, pruning_config),
    ("plan", ["m"], StructPruneConfig, pruning_config),
    ("recover", ["m", "o"], RecoveryConfig, recovery_config),
]


def parsed(command, *arguments):
    parser = ArgumentParser(prog="structprune")
    DECLARE[command](parser)
    return parser.parse_args([*arguments])


def samples(annotation):
    """Words of a command line, and the value that they stand for, for a field of this type."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kind = next(member for member in members if member is not NoneType)
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(inside[-1])], inside[-1]
    if kind is DomainConfig:
        return ["a=a.txt@2", "{name: b, source: b.txt, split: test}"], None
    if origin in (list, tuple):
        words, value = samples(inside[0])
        if value is None:
            both = [{"name": "a", "source": "a.txt", "weight": 2.0}, {"name": "b", "source": "b.txt", "split": "test"}]
            return words, both
        return words * 2, [value] * 2
    if origin is dict:
        words, value = samples(inside[1])
        return [f"a={words[0]}"], {"a": value}
    if is_dataclass(kind):
        return [f"{field.name}=[1, b]" for field in fields(kind)], {field.name: [1, "b"] for field in fields(kind)}
    if float in members:
        return ["0.25"], 0.25
    return {int: (["3"], 3), str: (["word"], "word")}.get(kind, (["[1, b]"], [1, "b"]))


@pytest.mark.parametrize(("command", "paths", "config_class", "read"), COMMANDS)
def test_every_field_has_a_flag_and_what_is_not_given_is_left_to_the_file(
    command, paths, config_class, read, monkeypatch
):
    monkeypatch.setattr(config_class, "from_dict", dict)  # the values, also those that other fields contradict
    assert read(parsed(command, *paths)) == {}
    for field in fields(config_class):
        name, flag = field.name, f"--{field.name.replace('_', '-')}"
        words, value = samples(get_type_hints(config_class)[name])
        given = read(parsed(command, *paths, *(part for word in words for part in (flag, word))))
        assert given == {name: value} and type(given[name]) is type(value), name


@pytest.mark.parametrize("config_class", [StructPruneConfig, RecoveryConfig, RunOptions, DomainConfig])
def test_every_field_has_a_help_and_an_entry_in_the_docstring(config_class):
    arguments = config_class.__doc__.partition("Raises:")[0]
    entries = re.findall(r"^        (\w+): ", arguments, re.M)
    assert entries == [field.name for field in fields(config_class)]
    for field in fields(config_class):
        assert re.fullmatch("[A-Z].*[.]", field.metadata["help"]), field.name


@pytest.mark.parametrize(("line", "message"), [
    ("--width mlp=24 --width mlp=8", "--width has two values for 'mlp', 24 and 8. Pass one."),
    ("--sparsity 0.2 --recovery tokens=5 --recovery tokens=6", "--recovery has two values for 'tokens', 5 and 6."),
    ("--sparsity 0.2 --recovery tokens=5 --recovery-tokens 6", "--recovery has two values for 'tokens', 5 and 6."),
    ("--width 'mlp={0: 24, 1: 32, 0: 8}'", "the key '0' is in line 1 and again in line 1"),
])  # fmt: skip
def test_a_repeated_name_is_refused(line, message, capsys):
    with pytest.raises((StructPruneError, SystemExit)) as refused:
        pruning_config(parsed("prune", "m", "o", *split(line)))
    assert message in str(refused.value) + capsys.readouterr().err


def flags_of(config_class):
    return [f"--{field.name.replace('_', '-')}" for field in fields(config_class)]


@pytest.mark.parametrize("value", ["[]", "999999999999999999999", "-1", ".nan", "{}"])
def test_an_odd_value_of_any_flag_is_refused_in_a_sentence_or_read(value):
    """A number of 21 digits may be a legal budget or the name of a file; it never raises another error."""
    for command, paths, config_class, read in COMMANDS:
        for flag in flags_of(config_class):
            amount = ["--sparsity", "0.2"] if command != "recover" and flag not in AMOUNT_FLAGS else []
            for text in (value, f"a={value}"):
                try:
                    read(parsed(command, *paths, *amount, f"{flag}={text}"))
                except (StructPruneError, SystemExit):
                    continue


def help_of(name):
    return next(field.metadata["help"] for field in fields(StructPruneConfig) if field.name == name)


def test_help_comes_from_the_fields_and_begins_with_what_most_people_need():
    parser = ArgumentParser(prog="structprune")
    DECLARE["prune"](parser)
    shown = parser.format_help()
    parts, words = re.split(r"\n([a-z ]+):\n", shown), " ".join(shown.split())
    titled = zip(parts[1::2], parts[2::2], strict=True)
    flags = {title: re.findall(r"^  (--[\w-]+)", text, re.M) for title, text in titled}
    assert [*flags][2:] == [*GROUPS] and len(flags["most used"]) == 11 and "--width" in flags["most used"]
    assert {"--error-feedback", "--refit"} <= {*flags["for experts"]} and "--widths" not in shown
    assert help_of("error_feedback") in words and "(default: 0.5)" in words
    *names, last = (field.name for field in fields(RecoveryConfig))
    assert f"NAME is {', '.join(names)} or {last}. Repeatable." in words


def test_short_spellings(monkeypatch):
    monkeypatch.setattr(StructPruneConfig, "from_dict", dict)
    for spelling, field in (
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
    ):
        assert pruning_config(parsed("prune", "m", "o", *split(spelling))) == field


def test_flags_override_the_file(tmp_path):
    text = {"batch_size": 8, "checkpoint_dir": "here"}
    text |= {"sparsity": 0.4, "criterion": "flap", "rounds": 3}
    text |= {"recovery": {"tokens": 900, "answer_share": 0.25}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(text))
    flags = ["--width", "mlp=8", "--rounds", "2", "--recovery", "tokens=500"]
    line = ["prune", "m", "o", "--config", str(tmp_path / "run.yaml")]
    assert run_options(parsed(*line, "--batch-size", "9")) == RunOptions(batch_size=9, checkpoint_dir="here")
    config = pruning_config(parsed(*line, *flags))
    assert (config.sparsity, config.widths, config.rounds, config.criterion) == (None, {"mlp": 8}, 2, "flap")
    assert (config.recovery.tokens, config.recovery.answer_share) == (500, 0.25)
    (tmp_path / "run.yaml").write_text("widths: {mlp: 8, attention: 2}\n")  # all of which another amount replaces
    for amount, widths in ((["--seed", "1"], {"mlp": 8, "attention": 2}), (["--width", "mlp=9"], {"mlp": 9})):
        assert pruning_config(parsed(*line, *amount)).widths == widths
    (tmp_path / "run.yaml").write_text("tokens: 5\nlora: {r: 4, lora_alpha: 8}\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--tokens", "7", "--lora", "r=2", "--training", "bf16=true"]
    config = recovery_config(parsed("recover", "m", "o", *flags, "--answer-share", "0"))
    assert (config.tokens, config.lora, config.training) == (7, {"r": 2, "lora_alpha": 8}, {"bf16": True})
    assert config.answer_share == 0


def test_settings_have_types():
    for text, value in {"1e-4": 1e-4, "true": True, "3": 3, "cosine": "cosine", "[q, v]": ["q", "v"]}.items():
        assert setting(f"a={text}") == ("a", value) and type(setting(f"a={text}")[1]) is type(value)
    for read, wrong in (*((setting, text) for text in ("a", "=3", "a=", "a=[3")), (domain, "{name: qa")):
        with pytest.raises(ArgumentTypeError):
            read(wrong)


def test_text_is_the_short_form_of_domains_named_after_their_files():
    line, text = ["prune", "m", "o", "--sparsity", "0.2"], ["--text", "notes.jsonl", "in/my letters.txt"]
    args = parsed(*line, *text, "--domain", "a=b.txt", "--text", "c/")
    expected = [("notes", "notes.jsonl"), ("my-letters", "in/my letters.txt"), ("a", "b.txt"), ("c", "c/")]
    assert [(of.name, of.source) for of in pruning_config(args).domains] == expected
    assert pruning_config(parsed(*line, "--text", "*.txt")).domains[0].name == "text"
