"""Declare and parse the arguments of the commands. Each field of a config is a flag, with the help of its metadata."""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from ..system.codec import FieldError, field_types, members_of
from ..system.errors import StructPruneError


if TYPE_CHECKING:
    from ..config.pruning import RunOptions, StructPruneConfig
    from ..config.recovery import RecoveryConfig
    from .output import Result

# Shorter names of some flags, by field. A flag that is repeated has the name of one item.
ALIASES = {
    "widths": "--width",
    "targets": "--target",
    "skip_layers": "--skip-layer",
    "domains": "--domain",
    "arch_file": "--arch",
}
# The fields that hold other configs, by the class names of these configs.
PARTS = {"DomainConfig": "domains", "RecoveryConfig": "recovery"}
# The groups of flags and fields in the help of `prune` and `plan`. All others belong to the last group.
GROUPS = {
    "most used": "--config budget sparsity widths targets domains num_samples --recover --dtype --device --overwrite",
    "dry run": "--cost --tokens",
    "how much to remove": "speed_use rounds round_to tensor_parallel",
    "what to remove": "allocation criterion skip_layers keep_tokens languages arch_file",
    "text": "seq_length general_share general_text seed",
    "recovery": "--recovery-tokens recovery",
    "output": "measure gguf --resume --base-model --license --no-save --json --quiet",
    "loading the model": "--trust-remote-code --attn-implementation",
    "large models": "--offload batch_size checkpoint_dir",
    "method": "",
}
SOURCES = "A source is a file, glob, folder, builtin:…, preset:…, self:any or Hub dataset; {name: …} sets any field."
# The arguments of `add_argument` by the names of flags, or their help alone.
Flags = Mapping[str, str | Mapping[str, Any]]


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        name: The word on the command line.
        function: The module and the function that run it, such as `prune.prune`.
        help: One sentence for the help.
        flags: Its arguments without the fields of its config.
        examples: Command lines for the help.
        config: The config. Each of its fields is a flag too.
        without: The fields that are not flags.
        models: The arguments that name models.
        reads_text: Whether it may import `datasets`.
    """

    name: str
    function: str
    help: str
    flags: Flags
    examples: Sequence[str] = ()
    config: Literal["StructPruneConfig", "RecoveryConfig"] | None = None
    without: Collection[str] = ()
    models: Collection[str] = ("model",)
    reads_text: bool = True

    def run(self, args: Namespace) -> Result:
        """Import the module of the function, and call the function."""
        module_name, name = self.function.split(".")
        module = import_module(f"{__package__}.{module_name}")
        result: Result = getattr(module, name)(args)
        return result

    def declare(self, parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""
        group_of = _groups(parser) if self.config == "StructPruneConfig" else lambda name: parser
        if self.config is not None:
            self._declare_config(group_of)

        for name, flag in self.flags.items():
            group = group_of(name) if name.startswith("-") else parser
            group.add_argument(name, **_arguments_of_flag(name, flag))

        self._declare_json(group_of)
        text = "Print no progress bars and no notes, only warnings."
        group_of("--quiet").add_argument("--quiet", action="store_true", help=text)
        parser.set_defaults(command=self)

    def _declare_config(self, group_of: Callable[[str], Any]) -> None:
        """Add `--config`, and a flag for each field of the config."""
        import optimum_structprune

        text = f"A YAML file with fields of {self.config}; flags override it."
        group_of("--config").add_argument("--config", metavar="FILE", help=text)

        config_classes = [getattr(optimum_structprune, str(self.config))]
        if self.config == "StructPruneConfig":
            config_classes.append(optimum_structprune.RunOptions)
        for config_class in config_classes:
            declare_fields(group_of, config_class, self.without)

    def _declare_json(self, group_of: Callable[[str], Any]) -> None:
        """Add `--json`, and `--overwrite` unless the command has it."""
        text = (
            "Print the result as one JSON document instead of text. With a FILE, write the document to it and print "
            "the text."
        )
        group_of("--json").add_argument("--json", nargs="?", const=True, metavar="FILE", help=text)
        if "--overwrite" not in self.flags:
            text = "Replace a FILE that exists."
            group_of("--overwrite").add_argument("--overwrite", action="store_true", help=text)


def _arguments_of_flag(name: str, flag: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a flag of a command."""
    if isinstance(flag, str):
        arguments: dict[str, Any] = {"help": flag}
    else:
        arguments = dict(flag)

    if name == "output":
        arguments["type"] = os.path.expanduser
    return arguments


def _groups(parser: ArgumentParser) -> Callable[[str], Any]:
    """Add the groups of the help to a parser, and return a function from a flag or field to its group."""
    groups = {}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            groups[name] = group

    last_group = group
    return lambda name: groups.get(name, last_group)


def declare_fields(group_of: Callable[[str], Any], config_class: type, without: Collection[str]) -> None:
    """Add a flag for each field of a config class.

    Args:
        group_of: Returns the parser or the group of a field.
        config_class: The config class.
        without: The fields that are not flags.
    """
    types = field_types(config_class)
    from ..config.fields import field_help

    sentences = field_help(config_class)

    for field in fields(config_class):
        if field.name in without:
            continue

        arguments = _arguments_of(field.name, types[field.name])
        arguments["help"] = _help_of(field, sentences[field.name], arguments.get("help", ""))
        group = group_of(field.name)
        if field.name in ALIASES:
            group.add_argument(ALIASES[field.name], dest=field.name, default=SUPPRESS, **arguments)
            arguments["help"] = SUPPRESS
        group.add_argument(_flag_of(field.name), dest=field.name, default=SUPPRESS, **arguments)

        if field.name == "domains":
            text = "Files of your own text. Each file is a domain with its name. The short form of --domain."
            group.add_argument("--text", dest="domains", help=text, default=SUPPRESS, **text_files())


def _flag_of(name: str) -> str:
    """Return the flag with the name of a field."""
    return f"--{name.replace('_', '-')}"


def _help_of(field: Field[Any], sentence: str, note: str) -> str:
    """Return the help of a field: its first sentence, a note on the form of its values, and its default."""
    sentences = [sentence]
    if note:
        sentences.append(note)
    if field.default not in (MISSING, None, ()):
        sentences.append(f"(default: {field.default})")

    # argparse replaces `%(…)s`.
    return " ".join(sentences).replace("%", "%%")


def _arguments_of(name: str, annotation: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for the values of a field."""
    members = members_of(annotation)
    kind = members[0]
    origin = get_origin(kind)
    if origin is dict:
        return {"action": "append", "help": "Repeatable.", "type": setting, "metavar": "NAME=VALUE"}
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        text = f"NAME is {', '.join(names[:-1])} or {names[-1]}. Repeatable."
        return {"action": "append", "help": text, "type": setting, "metavar": "NAME=VALUE"}
    if origin in (list, tuple):
        return _arguments_of_list(name, get_args(kind)[0])

    parse = str if str in members else yaml_value
    return {"type": parse, "metavar": _metavar(name, members)}


def _arguments_of_list(name: str, item: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field that is a list of items of one type."""
    if is_dataclass(item):
        text = f"Repeatable. {SOURCES}"
        return {"action": "append", "help": text, "type": domain, "metavar": "NAME=SOURCE[@WEIGHT]"}

    arguments: dict[str, Any] = {"action": "append", "help": "Repeatable."}
    arguments.update(_arguments_of(name, item))
    return arguments


def _metavar(name: str, members: Sequence[Any]) -> str:
    """Return the name of a field's value in the help.

    Args:
        name: The name of the field.
        members: The types of the field, without None.
    """
    words: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            words += map(str, get_args(member))

    if words:
        if int in members:
            words.insert(0, "N")
        return f"{{{','.join(words)}}}"
    if float in members:
        return "X"
    if members[0] is int:
        return "N"
    return name.rpartition("_")[2].upper()


def _split_pair(text: str, form: str) -> tuple[str, str]:
    """Return the name and the value of `NAME=VALUE`, or raise an error that describes the form."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise ArgumentTypeError(f"expected {form}, got {text!r}")
    return name, value


def setting(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`, with the value as YAML: `mlp=24`, `bf16=true`."""
    name, value = _split_pair(text, "NAME=VALUE, such as mlp=1024 or parameters=0.8")
    return name, yaml_value(value)


def token_setting(text: str) -> tuple[str, Any]:
    """Parse the number of `--recovery-tokens`, and return it as a pair of `--recovery`."""
    return "tokens", yaml_value(text)


def positive_int(text: str) -> int:
    """Parse a whole number from 1."""
    if not re.fullmatch("0*[1-9][0-9]*", text):
        raise ArgumentTypeError(f"expected a whole number, 1 or more, got {text[:40]!r}")
    return int(text)


def yaml_value(text: str) -> Any:
    """Parse a YAML document, such as a number or a word."""
    from ..config.fields import parse_yaml

    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not YAML: {error}") from error


def domain(text: str) -> dict[str, Any]:
    """Parse `NAME=SOURCE[@WEIGHT]`, or a YAML mapping such as `{name: a, source: a.txt}`, as fields of a domain."""
    if text.startswith("{"):
        mapping = yaml_value(text)
        if isinstance(mapping, dict):
            return mapping

    if "=" not in text:
        name = text_file(text)["name"]
        raise ArgumentTypeError(f"expected NAME=SOURCE[@WEIGHT], such as {name}={text}, got {text!r}")

    name, source = _split_pair(text, "NAME=SOURCE[@WEIGHT]")
    head, at, tail = source.rpartition("@")
    if at:
        # The name of a source may contain an @ too.
        with suppress(ValueError):
            return {"name": name, "source": head, "weight": float(tail)}
    return {"name": name, "source": source}


def text_file(path: str) -> dict[str, Any]:
    """Return the fields of a domain for a file, a glob, a folder or built-in text. The domain has its name."""
    file = os.path.basename(path.removeprefix("builtin:").rstrip("/"))
    name = re.sub(r"\W+", "-", file.partition(".")[0]).strip("-")
    return {"name": name or "text", "source": path}


def text_source(text: str) -> dict[str, Any]:
    """Parse a file, or a YAML mapping with the fields of a domain, as fields of a domain."""
    if text.startswith("{"):
        return domain(text)
    return text_file(text)


def text_files() -> dict[str, Any]:
    """Return the arguments of `add_argument` for `--text`."""
    return {"action": "extend", "nargs": "+", "type": text_file, "metavar": "FILE"}


def pruning_config(args: Namespace) -> StructPruneConfig:
    """Return the `StructPruneConfig` of the config file, if there is one, and of the flags."""
    from ..config.pruning import AMOUNTS, RunOptions, StructPruneConfig

    values = _values_of_file(args)
    ignored = list(field_types(RunOptions))
    if any(hasattr(args, name) for name in AMOUNTS):
        ignored += AMOUNTS
    for name in ignored:
        values.pop(name, None)

    values = _with_flags(values, args, StructPruneConfig)
    if getattr(args, "recover", False):
        values.setdefault("recovery", {})
    return StructPruneConfig.from_dict(values)


def run_options(args: Namespace) -> RunOptions:
    """Return the `RunOptions` of the config file, if there is one, and of the flags."""
    from ..config.pruning import RunOptions

    names = field_types(RunOptions)
    values = {name: value for name, value in _values_of_file(args).items() if name in names}
    return RunOptions.from_dict(_with_flags(values, args, RunOptions))


def tokens_config(args: Namespace, number: int) -> StructPruneConfig:
    """Return the config of the flags for a model that keeps a number of tokens."""
    from ..config.pruning import AMOUNTS

    flags = {name: value for name, value in vars(args).items() if name != "targets" and name not in AMOUNTS}
    flags["widths"] = {"vocab": number}
    return pruning_config(Namespace(**flags))


def recovery_config(args: Namespace) -> RecoveryConfig:
    """Return the `RecoveryConfig` of the config file, if there is one, and of the flags."""
    from ..config.recovery import RecoveryConfig

    return RecoveryConfig.from_dict(_with_flags(_values_of_file(args), args, RecoveryConfig))


def by_flag(error: StructPruneError, args: Namespace) -> str:
    """Return the text of an error, with the flag or the config file in place of the name of a field."""
    if not isinstance(error, FieldError):
        return str(error).removeprefix(f"{args.command.config}: ")

    name = error.field
    reason = error.reason
    if error.owner in PARTS and error.owner != args.command.config:
        name = PARTS[error.owner]
        reason = f"`{error.field}` {reason}"

    if getattr(args, "config", None) is not None and not hasattr(args, name):
        return f"{args.config}: `{name}` {reason}."
    return f"{ALIASES.get(name, _flag_of(name))} {reason}."


def _values_of_file(args: Namespace) -> dict[str, Any]:
    """Return the fields of the config file, or none without a file."""
    from ..config.fields import read_yaml

    if not args.config:
        return {}
    return dict(read_yaml(args.config))


def _with_flags(values: Mapping[str, Any], args: Namespace, config_class: type) -> dict[str, Any]:
    """Return the values of a config file with the values of flags in their place.

    A mapping from flags replaces only the keys that it has.

    Args:
        values: The fields of the config file.
        args: The parsed flags.
        config_class: The config class.
    """
    merged = dict(values)

    for field in fields(config_class):
        name = field.name
        if not hasattr(args, name):
            continue

        value = getattr(args, name)
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            value = _mapping_of(value, ALIASES.get(name, _flag_of(name)))
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            items = dict(merged[name])
            items.update(value)
            value = items
        merged[name] = value

    return merged


def _mapping_of(pairs: list[tuple[str, Any]], flag: str) -> dict[str, Any]:
    """Return the pairs of a repeated flag as a mapping, or raise `StructPruneError` if a name is repeated."""
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise StructPruneError(f"{flag} has two values for {name!r}, {mapping[name]} and {value}. Pass one.")
        mapping[name] = value
    return mapping
