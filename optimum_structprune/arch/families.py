"""Reads `families.yaml`, and refuses unknown keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

from ..config.fields import parse_yaml
from ..errors import StructPruneError
from ..registry import did_you_mean


T = TypeVar("T")
FAMILIES_FILE = Path(__file__).with_name("families.yaml")
UNIT_WORDS = ("unit", "pair", "heads", "kv", "q", "q_gate")
# Reasons why layers may not differ that no entry has to repeat.
TEXT_ONLY = "only a text model by itself is built layer by layer"
UNDESCRIBED = "its description names no layer_class"
# What configs of transformers 4 call the base of a rotary embedding, that of layers with a sliding window, and the
# part of a head that rotates; and all that one of them may say of scaling.
FORMER_ROPE = ("rope_theta", "", "partial_rotary_factor")
FORMER_ROPES = {
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")),
    "gpt_neox": ("rotary_emb_base", "", "rotary_pct"),
    "modernbert": ("global_rope_theta", "local_rope_theta", ""),
}
FORMER_SCALING = {"phi3": ("type", "short_factor", "long_factor")}


# Families from `arch_file`s that this process has read: their models can then be built where no file is given.
_USER_FAMILIES: dict[str, Family] = {}


class UndescribedError(StructPruneError):
    """The layers of a model are not described, and only tokens can go from it."""


@dataclass(frozen=True)
class Template:
    """One space of a family, with names relative to a layer; `families.yaml` says what the fields mean."""

    size: str
    producers: dict[str, list[str]] = field(default_factory=dict)
    consumers: dict[str, list[str]] = field(default_factory=dict)
    also_cut: dict[str, list[str]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    transposed: bool = False
    experts: str | None = None
    router: str | None = None
    min_size: str | None = None
    times: str | None = None
    requires: dict[str, list[Any]] = field(default_factory=dict)
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
    consumers: dict[str, list[str]]
    producers: tuple[str, ...]
    pin: tuple[str, ...] = ()
    norm_offset: float | int = 0.0
    scaled_embedding: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture that one or more model types share."""

    model_types: tuple[str, ...]
    layer_path: tuple[str, ...] = ()  # several where layers count through several lists
    spaces: dict[str, Template] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    causal: bool = True
    text: str | None = None
    layer: Template | None = None
    hidden: ResidualTemplate | None = None
    layer_class: dict[str, str] = field(default_factory=dict)
    uniform: str = ""


def read_families(path: str | Path) -> list[Family]:
    """The families of a YAML file in the form of `families.yaml`."""
    try:
        entries = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StructPruneError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise StructPruneError(f"{path} has to hold a list of families, each with model_types, layer_path and spaces.")
    families = []
    for number, entry in enumerate(entries):
        try:
            families.append(_family(entry, Path(path).name))
        except StructPruneError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            name = entry.get("model_types", f"entry {number}")
            raise StructPruneError(f"{Path(path).name}: {name} does not describe a family: {error}.") from error
    return families


def _family(entry: Mapping[str, Any], file: str) -> Family:
    where = f"{file}: {', '.join(map(str, entry.get('model_types') or ['?']))}"
    values = {key: value for key, value in entry.items() if key != "transposed"}
    transposed = entry.get("transposed", False)
    if isinstance(path := entry.get("layer_path"), str):
        values["layer_path"] = [path]
    if "spaces" in entry:
        spaces = entry["spaces"].items()
        values["spaces"] = {name: _space(space, f"{where}.{name}", transposed) for name, space in spaces}
    for key, kind in (("layer", Template), ("hidden", ResidualTemplate)):
        if key in entry:
            values[key] = _described(kind, entry[key], f"{where}.{key}")
    return _described(Family, values, where, () if "text" in entry else ("layer_path", "spaces"))


def _space(entry: Mapping[str, Any], where: str, transposed: bool) -> Template:
    keys = [key for key in ("producers", "consumers", "also_cut") if key in entry]
    parts = {key: _parts(entry[key], f"{where}.{key}") for key in keys}
    required = ("experts",) if "router" in entry else ("producers", "consumers")
    return _described(Template, {"transposed": transposed, **entry, **parts}, where, required)


def _parts(entry: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    parts = {name: units if isinstance(units, list) else [units] for name, units in entry.items()}
    for name, units in parts.items():
        for unit in units:
            if unit not in UNIT_WORDS and not re.fullmatch(r"\w+_dim(\+\w+_dim)*", str(unit)):
                raise StructPruneError(f"{where}.{name}: unknown unit {unit!r}.{did_you_mean(str(unit), UNIT_WORDS)}")
    return parts


def _described(kind: type[T], entry: Mapping[str, Any], where: str, required: tuple[str, ...] = ()) -> T:
    """A dataclass from values by field, each of which has to be of the declared type."""
    types, values = get_type_hints(kind), dict[str, Any]()
    if absent := [key for key in required if key not in entry]:
        raise StructPruneError(f"{where}: {absent[0]!r} is missing.")
    for key, value in entry.items():
        if key not in types:
            raise StructPruneError(f"{where}: unknown key {key!r}.{did_you_mean(key, types)}")
        values[key] = tuple(value) if get_origin(types[key]) is tuple and isinstance(value, list) else value
        type_validator(key, values[key], types[key])
    return kind(**values)


@lru_cache
def builtin_families() -> dict[str, Family]:
    """The families that the package knows, by model type."""
    return {name: family for family in read_families(FAMILIES_FILE) for name in family.model_types}


def family_of(model_type: str, arch_file: str | Path | None = None) -> Family:
    """The family of a model type."""
    families = {**builtin_families(), **(user_families(arch_file) if arch_file else {})}
    if model_type not in families:
        raise UndescribedError(
            f"The model type {model_type!r} is not described in families.yaml.{did_you_mean(model_type, families)} "
            "examples/tools/stub.py of the repository prints a description to check and to pass as --arch."
        )
    return families[model_type]


def user_families(arch_file: str | Path) -> dict[str, Family]:
    """The families of a user's file, by model type; `layer_class_name` finds them from then on."""
    families = {name: family for family in read_families(arch_file) for name in family.model_types}
    _USER_FAMILIES.update(families)
    return families


def layer_class_name(model_type: str) -> str | None:
    """The name of the class of a model type's layers; None where these may not have configs of their own."""
    family = {**builtin_families(), **_USER_FAMILIES}.get(model_type)
    return None if family is None else family.layer_class.get(model_type)


def with_former_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` which say in the words of transformers 4 too how positions are embedded."""
    former = {key: with_former_rope(part) if isinstance(part, dict) else part for key, part in fields.items()}
    rope, kind = fields.get("rope_parameters") or {}, fields.get("model_type", "")
    whole, local = rope.get("full_attention", rope) or {}, rope.get("sliding_attention") or {}
    if whole.get("rope_type") in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"):
        values = (whole.get("rope_theta"), local.get("rope_theta"), whole.get("partial_rotary_factor"))
        names = FORMER_ROPES.get(kind, FORMER_ROPE)
        former |= {name: value for name, value in zip(names, values, strict=True) if name and value is not None}
        scaling = {key: value for key, value in whole.items() if key not in FORMER_ROPE}
        known = {key: scaling[key] for key in FORMER_SCALING.get(kind, scaling) if key in scaling}
        former["rope_scaling"] = None if scaling == {"rope_type": "default"} else known
    return former
