"""Flags, and the configs that they become: each field of a config is a flag, with help from its docstring."""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from inspect import getdoc
from textwrap import dedent
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import StructPruneError, one_line


if TYPE_CHECKING:
    from ..config.pruning import RunOptions, StructPruneConfig
    from ..config.recovery import RecoveryConfig
    from .output import Result

# Shorter spellings of some flags, by field: a flag that is repeated names one thing at a time.
ALIASES = {
    "widths": "--width",
    "targets": "--target",
    "skip_layers": "--skip-layer",
    "domains": "--domain",
    "arch_file": "--arch",
}
# The fields that hold configs of their own, by the class of these.
PARTS = {"DomainConfig": "domains", "RecoveryConfig": "recovery"}
# The groups of the help of what prunes, flags and fields: what most people need first. All others are for experts.
GROUPS = {
    "most used": "--config sparsity widths targets domains num_samples --recover --dtype --device --overwrite",
    "how much goes": "budget rounds round_to --cost",
    "what goes": "allocation criterion skip_layers keep_tokens languages arch_file",
    "text": "seq_length general_share general_text seed",
    "training afterwards": "--recovery-tokens recovery",
    "output": "--gguf --resume --base-model --license --push-to-hub --private --no-save --json --quiet",
    "large models": "--offload batch_size checkpoint_dir",
    "for experts": "",
}
SOURCES = "A source is a file, glob, folder, builtin:…, preset:…, self:… or Hub dataset; {name: …, …} sets any field."
# What `add_argument` takes by the name of a flag, or its help alone.
Flags = Mapping[str, str | Mapping[str, Any]]


@dataclass(frozen=True)
class Command:
    """A command: its word, its help, the function that does it, and what `add_argument` takes; each field of `config`
    is a flag too, but those of `without`, and `models` are the arguments that name models. Where it `reads_text`,
    `datasets` may be imported; with `json_file`, `--json` can name a file.
    """

    name: str
    function: str
    help: str
    flags: Flags
    config: Literal["StructPruneConfig", "RecoveryConfig"] | None = None
    without: Collection[str] = ()
    models: Collection[str] = ("model",)
    reads_text: bool = True
    json_file: bool = False

    def run(self, args: Namespace) -> Result:
        """Do what the arguments say; the module of the function is imported now."""
        module, function = self.function.split(".")
        result: Result = getattr(import_module(f"{__package__}.{module}"), function)(args)
        return result

    def declare(self, parser: ArgumentParser) -> None:
        """Declare the arguments in a parser."""
        group = _groups(parser, self.config == "StructPruneConfig")
        if self.config is not None:
            import optimum_structprune

            text = f"A YAML file with fields of {self.config}; flags override it."
            group("--config").add_argument("--config", metavar="FILE", help=text)
            _declare_fields(group, getattr(optimum_structprune, self.config), self.without)
        if self.config == "StructPruneConfig":
            _declare_fields(group, optimum_structprune.RunOptions, self.without)
        for name, flag in self.flags.items():
            home: dict[str, Any] = {"type": os.path.expanduser} if name == "output" else {}
            place = group(name) if name.startswith("-") else parser
            place.add_argument(name, **home, **({"help": flag} if isinstance(flag, str) else flag))
        how: dict[str, Any] = {"action": "store_true"}
        text = "Print the result as one JSON document instead of text."
        if self.json_file:
            text += " With a FILE, write the document to it and print the text."
            group("--overwrite").add_argument("--overwrite", help="Replace a FILE that exists.", **how)
        file: dict[str, Any] = {"nargs": "?", "const": True, "metavar": "FILE"} if self.json_file else how
        group("--json").add_argument("--json", help=text, **file)
        group("--quiet").add_argument("--quiet", help="No progress bars and no notes; warnings stay.", **how)
        parser.set_defaults(command=self)


def _groups(parser: ArgumentParser, grouped: bool) -> Callable[[str], Any]:
    """A function from a flag or field to where it is declared: in the parser itself, or in its group of the help."""
    if not grouped:
        return lambda name: parser
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    places = {name: groups[title] for title, names in GROUPS.items() for name in names.split()}
    return lambda name: places.get(name, groups["for experts"])


def _declare_fields(group: Callable[[str], Any], config_class: type, without: Collection[str]) -> None:
    """Declare one flag for each field of a config, but those that another flag takes the place of."""
    types, sentences = get_type_hints(config_class), first_sentences(config_class)
    for field in (field for field in fields(config_class) if field.name not in without):
        how = _how(field.name, types[field.name])
        default = "" if field.default in (MISSING, None, ()) else f"(default: {field.default})"
        text = " ".join(filter(None, (sentences.get(field.name), how.pop("help", ""), default)))
        name = f"--{field.name.replace('_', '-')}"
        # argparse fills in %(…)s, so a per cent sign of the text is doubled. Of two names the help has the short one.
        for flag, shown in {name: SUPPRESS, ALIASES.get(field.name, name): text.replace("%", "%%")}.items():
            group(field.name).add_argument(flag, dest=field.name, help=shown, default=SUPPRESS, **how)
        if field.name == "domains":
            text = "Your own text: files, each of which is a domain of its name. The short form of --domain."
            group("domains").add_argument("--text", dest="domains", help=text, default=SUPPRESS, **text_files())


def first_sentences(config_class: type) -> dict[str, str]:
    """The first sentence on each argument in the `Args` section of a class docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", getdoc(config_class) or "", re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", dedent(section[1]) if section else "", re.MULTILINE | re.DOTALL)
    return {name: re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0] for name, text in entries}


def _how(name: str, annotation: Any) -> dict[str, Any]:
    """Gives the arguments of `add_argument` for a field: how its value is read, and how the help shows it."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    members = tuple(member for member in members if member is not NoneType)
    kind, origin, inside = members[0], get_origin(members[0]), get_args(members[0])
    if origin is dict or is_dataclass(kind):
        names = [] if inside else [field.name for field in fields(kind)]
        text = f"NAME is {', '.join(names[:-1])} or {names[-1]}. Repeatable." if names else "Repeatable."
        return {"action": "append", "help": text, "type": setting, "metavar": "NAME=VALUE"}
    if origin in (list, tuple):
        repeated = {"action": "append", "help": "Repeatable."}
        if is_dataclass(inside[0]):
            return {**repeated, "help": f"Repeatable. {SOURCES}", "type": domain, "metavar": "NAME=SOURCE[@WEIGHT]"}
        return {**repeated, **_how(name, inside[0])}
    words = [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]
    if words:
        metavar = f"{{{','.join([*(['N'] if int in members else []), *words])}}}"
    else:
        metavar = "X" if float in members else "N" if kind is int else name.rpartition("_")[2].upper()
    return {"type": str if str in members else yaml_value, "metavar": metavar}


def _divided(text: str, form: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not (name and value):
        raise ArgumentTypeError(f"expected {form}, got {text!r}")
    return name, value


def setting(text: str) -> tuple[str, Any]:
    """Reads `NAME=VALUE` as a pair, the value as YAML: `mlp=24`, `bf16=true`."""
    name, value = _divided(text, "NAME=VALUE, such as mlp=1024 or parameters=0.8")
    return name, yaml_value(value)


def whole(text: str) -> int:
    """A whole number, 1 or more."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def yaml_value(text: str) -> Any:
    """The value of a YAML document, such as a number or a word."""
    import yaml

    from ..config.fields import parse_yaml

    try:
        return parse_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentTypeError(f"{text!r} is not YAML: {one_line(error)}") from error


def domain(text: str) -> dict[str, Any]:
    """The fields of a domain from `NAME=SOURCE[@WEIGHT]`, or from a mapping in YAML: `{name: a, source: a.txt}`."""
    if text.startswith("{") and isinstance(mapping := yaml_value(text), dict):
        return mapping
    if "=" not in text:
        name = text_file(text)["name"]
        raise ArgumentTypeError(f"expected NAME=SOURCE[@WEIGHT], such as {name}={text}, got {text!r}")
    name, source = _divided(text, "NAME=SOURCE[@WEIGHT]")
    head, at, weight = source.rpartition("@")
    with suppress(ValueError):  # a name may hold an @ too
        if at:
            return {"name": name, "source": head, "weight": float(weight)}
    return {"name": name, "source": source}


def text_file(path: str) -> dict[str, Any]:
    """The fields of a domain that is a file, a glob or a folder, with its name; built-in text has one too."""
    place = os.path.basename(path.removeprefix("builtin:").rstrip("/"))
    name = re.sub(r"\W+", "-", place.partition(".")[0]).strip("-")
    return {"name": name or "text", "source": path}


def text_files() -> dict[str, Any]:
    """Gives the arguments of `add_argument` for `--text`."""
    return {"action": "extend", "nargs": "+", "type": text_file, "metavar": "FILE"}


def pruning_config(args: Namespace) -> StructPruneConfig:
    """The `StructPruneConfig` of the file, if any, with the flags laid over it."""
    from ..config.pruning import AMOUNTS, StructPruneConfig

    values = _file(args)
    if any(hasattr(args, name) for name in AMOUNTS):
        values = {name: value for name, value in values.items() if name not in AMOUNTS}
    values = _laid_over(values, args, StructPruneConfig)
    if getattr(args, "recover", False):
        values.setdefault("recovery", {})
    return StructPruneConfig.from_dict(values)


def run_options(args: Namespace) -> RunOptions:
    """The `RunOptions` of the file that holds the config, if any, with the flags laid over it."""
    from ..config.pruning import RunOptions

    names = {field.name for field in fields(RunOptions)}
    values = {name: value for name, value in _file(args).items() if name in names}
    return RunOptions.from_dict(_laid_over(values, args, RunOptions))


def tokens_config(args: Namespace, number: int) -> StructPruneConfig:
    """Gives the config of the flags for a model that keeps a number of tokens."""
    from ..config.pruning import AMOUNTS

    others = {name: value for name, value in vars(args).items() if name not in (*AMOUNTS, "targets")}
    return pruning_config(Namespace(**others, widths={"vocab": number}))


def recovery_config(args: Namespace) -> RecoveryConfig:
    """The `RecoveryConfig` of the file, if any, with the flags laid over it."""
    from ..config.recovery import RecoveryConfig

    return RecoveryConfig.from_dict(_laid_over(_file(args), args, RecoveryConfig))


def by_flag(error: StructPruneError, args: Namespace) -> str:
    """The text of an error; of what a field does not take, with the flag or the file in the place of the class."""
    from ..config.fields import FieldError

    if not isinstance(error, FieldError):
        return str(error).removeprefix(f"{args.command.config}: ")
    name, reason = error.field, error.reason
    if error.owner in PARTS and error.owner != args.command.config:
        name, reason = PARTS[error.owner], f"{name} {reason}"
    given = getattr(args, "config", None) is None or hasattr(args, name)
    return f"{ALIASES.get(name, f'--{name}').replace('_', '-') if given else f'{args.config}: {name}'} {reason}"


def _file(args: Namespace) -> dict[str, Any]:
    from ..config.fields import read_yaml

    return dict(read_yaml(args.config)) if args.config else {}


def _laid_over(values: Mapping[str, Any], args: Namespace, config_class: type) -> dict[str, Any]:
    """The values, with those of the flags in their place; a mapping replaces only the keys that it has."""
    merged = dict(values)
    for name in (field.name for field in fields(config_class) if hasattr(args, field.name)):
        value, below = getattr(args, name), merged.get(name)
        if isinstance(value, list) and isinstance(value[0], tuple):  # pairs of a flag that was repeated
            value = dict(value)
        merged[name] = {**below, **value} if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
