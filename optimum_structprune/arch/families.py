"""Reads `families.yaml`, and refuses unknown keys, because a key that nothing reads would change nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..config.fields import parse_yaml
from ..errors import StructPruneError
from ..registry import did_you_mean


BUILTIN = Path(__file__).with_name("families.yaml")
UNITS = ("unit", "pair", "heads", "kv", "q", "q_gate")
# Reasons why layers may not differ that no entry has to repeat.
TEXT_ONLY = "only a text model by itself is built layer by layer"
UNDESCRIBED = "its description names no layer_class"
SUMMED_KEYS = re.compile(r"\w+_dim(\+\w+_dim)*")  # config keys, added up


# Families from `arch_file`s that this process has read: their models can then be built where no file is given.
_OWN: dict[str, Family] = {}


@dataclass(frozen=True)
class Template:
    """One space of a family, with names relative to a layer; `families.yaml` says what the fields mean."""

    size: str
    out: Mapping[str, list[str]] = field(default_factory=dict)
    into: Mapping[str, list[str]] = field(default_factory=dict)
    along: Mapping[str, list[str]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    bias: str | None = None
    transposed: bool = False
    experts: str | None = None
    router: str | None = None
    least: str | None = None
    times: str | None = None
    requires: Mapping[str, list[Any]] = field(default_factory=dict)
    within: str | None = None
    uniform: str = ""
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResidualTemplate:
    """The residual stream of a family; `families.yaml` says what the fields mean."""

    size: str
    embed: str
    head: str
    final: str
    norms: tuple[str, ...]
    into: Mapping[str, list[str]]
    out: tuple[str, ...]
    pin: tuple[str, ...] = ()
    plus: float = 0.0
    scaled: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture that one or more model types share."""

    model_types: tuple[str, ...]
    layer_paths: tuple[str, ...] = ()
    spaces: Mapping[str, Template] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    causal: bool = True
    text: str | None = None
    layer: Template | None = None
    hidden: ResidualTemplate | None = None
    layer_class: Mapping[str, str] = field(default_factory=dict)
    uniform: str = ""


def _only(entry: Mapping[str, Any], required: Iterable[str], optional: Iterable[str], where: str) -> None:
    required, optional = set(required), set(optional)
    for key in entry:
        if key not in required | optional:
            raise StructPruneError(f"{where}: unknown key {key!r}.{did_you_mean(key, required | optional)}")
    if absent := sorted(required - set(entry)):
        raise StructPruneError(f"{where}: {absent[0]!r} is missing.")


def _parts(entry: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    parts = {name: units if isinstance(units, list) else [units] for name, units in entry.items()}
    for name, units in parts.items():
        for unit in units:
            if unit not in UNITS and not SUMMED_KEYS.fullmatch(str(unit)):
                raise StructPruneError(f"{where}.{name}: unknown unit {unit!r}.{did_you_mean(str(unit), UNITS)}")
    return parts


def _template(entry: Mapping[str, Any], where: str, transposed: bool) -> Template:
    optional = {
        "also",
        "pin",
        "bias",
        "with",
        "transposed",
        "experts",
        "least",
        "times",
        "requires",
        "within",
        "uniform",
    }
    if "router" in entry:
        _only(entry, ("size", "router", "experts"), optional, where)
    else:
        _only(entry, ("size", "out", "in"), optional, where)
    return Template(
        size=entry["size"],
        out=_parts(entry.get("out", {}), f"{where}.out"),
        into=_parts(entry.get("in", {}), f"{where}.in"),
        along=_parts(entry.get("with", {}), f"{where}.with"),
        also=_names(entry.get("also", ())),
        pin=_names(entry.get("pin", ())),
        bias=entry.get("bias"),
        transposed=entry.get("transposed", transposed),
        experts=entry.get("experts"),
        router=entry.get("router"),
        least=entry.get("least"),
        times=entry.get("times"),
        requires=entry.get("requires", {}),
        within=entry.get("within"),
        uniform=entry.get("uniform", ""),
    )


def read_families(path: str | Path) -> list[Family]:
    """The families of a YAML file of the form of `families.yaml`."""
    try:
        entries = parse_yaml(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StructPruneError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise StructPruneError(f"{path} has to hold a list of families, each with model_types, layer_path and spaces.")
    families = []
    for number, entry in enumerate(entries):
        try:
            families.append(_family(entry, Path(path).name))
            _check_types(families[-1], Family)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, StructPruneError):
                raise
            name = entry.get("model_types", f"entry {number}")
            raise StructPruneError(f"{Path(path).name}: {name} does not describe a family: {error}.") from error
    return families


def _check_types(value: Any, annotation: Any) -> None:
    """Check a value, and what is in it, against the type that it is declared with."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return
    if origin in (Union, UnionType):
        kinds = [kind for kind in inner if kind is not NoneType]
        if value is not None:
            _check_types(value, kinds[0])
    elif is_dataclass(annotation):
        for name, kind in get_type_hints(annotation).items():
            try:
                _check_types(getattr(value, name), kind)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from error
    elif annotation is float:
        _check_types(value, int) if not isinstance(value, float) else None
    elif not isinstance(value, origin or annotation) or (isinstance(value, bool) and annotation is int):
        raise TypeError(f"{value!r} is a {type(value).__name__} and not a {(origin or annotation).__name__}")
    elif origin in (list, tuple):
        for item in value:
            _check_types(item, inner[0])
    elif origin is Mapping:
        for key, item in value.items():
            _check_types(key, inner[0])
            _check_types(item, inner[1])


def _names(value: Any) -> tuple[Any, ...]:
    """A list as a tuple; a single text would become its letters."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} has to be a list")
    return tuple(value)


def _family(entry: Mapping[str, Any], file: str) -> Family:
    where = f"{file}: {', '.join(map(str, _names(entry.get('model_types', ['?']))))}"
    if "text" in entry:
        _only(entry, ("model_types", "text"), (), where)
        return Family(model_types=_names(entry["model_types"]), text=entry["text"])
    optional = ("transposed", "missing", "causal", "layer_class", "uniform", "layer", "hidden")
    _only(entry, ("model_types", "layer_path", "spaces"), optional, where)
    path = entry["layer_path"]
    return Family(
        model_types=_names(entry["model_types"]),
        layer_paths=(path,) if isinstance(path, str) else _names(path),
        spaces={
            name: _template(space, f"{where}.{name}", entry.get("transposed", False))
            for name, space in entry["spaces"].items()
        },
        missing=entry.get("missing", {}),
        causal=entry.get("causal", True),
        layer=_depth(entry["layer"], f"{where}.layer") if "layer" in entry else None,
        hidden=_residual(entry["hidden"], f"{where}.hidden") if "hidden" in entry else None,
        layer_class=entry.get("layer_class", {}),
        uniform=entry.get("uniform", ""),
    )


def _depth(entry: Mapping[str, Any], where: str) -> Template:
    _only(entry, ("size",), ("requires", "kinds"), where)
    return Template(size=entry["size"], requires=entry.get("requires", {}), kinds=_names(entry.get("kinds", ())))


def _residual(entry: Mapping[str, Any], where: str) -> ResidualTemplate:
    required = ("size", "embed", "head", "final", "norms", "in", "out")
    _only(entry, required, ("pin", "plus", "scaled", "transposed"), where)
    return ResidualTemplate(
        size=entry["size"],
        embed=entry["embed"],
        head=entry["head"],
        final=entry["final"],
        norms=_names(entry["norms"]),
        into=entry["in"],
        out=_names(entry["out"]),
        pin=_names(entry.get("pin", ())),
        plus=entry.get("plus", 0.0),
        scaled=entry.get("scaled", False),
        transposed=entry.get("transposed", False),
    )


@lru_cache
def builtin_families() -> dict[str, Family]:
    """The families that the package knows, by model type."""
    return {name: family for family in read_families(BUILTIN) for name in family.model_types}


def family_of(model_type: str, arch_file: str | Path | None = None) -> Family:
    """The family of a model type."""
    own = own_families(arch_file) if arch_file else {}
    known = {**builtin_families(), **own}
    if model_type not in known:
        raise StructPruneError(
            f"The model type {model_type!r} is not described in families.yaml.{did_you_mean(model_type, known)} "
            "`structprune inspect MODEL --stub` prints a description to check and to pass as --arch."
        )
    return known[model_type]


def own_families(arch_file: str | Path) -> dict[str, Family]:
    """The families of a user's file, by model type; `layer_class_name` knows them from then on."""
    own = {name: family for family in read_families(arch_file) for name in family.model_types}
    _OWN.update(own)
    return own


def layer_class_name(model_type: str) -> str | None:
    """The name of the class of a model type's layers; None where these may not have configs of their own."""
    family = {**builtin_families(), **_OWN}.get(model_type)
    return None if family is None else family.layer_class.get(model_type)
