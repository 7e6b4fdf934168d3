"""Descriptions of model families: the files in `families/`, and a user's own files in the same form.

`families/README.md` explains the keys. Unknown keys and values of a wrong type are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import CONFIG_MAPPING

from ..config.fields import parse_yaml
from ..system.errors import StructPruneError
from ..system.registry import did_you_mean


T = TypeVar("T")
FAMILIES_FOLDER = Path(__file__).with_name("families")
UNIT_WORDS = ("unit", "pair", "heads", "kv", "q", "q_gate")
# The sum of some config keys, such as `qk_nope_head_dim+v_head_dim`.
SUM_OF_KEYS = r"\w+_dim(\+\w+_dim)*"
# Reasons why layers may not differ that no entry has to repeat.
TEXT_ONLY = "only a text model by itself is built layer by layer"
UNDESCRIBED = "its description names no layer_class"

# The keys of transformers 4 for the base of a rotary embedding, for the base in layers with a sliding window, and for
# the rotated share of a head. An empty name means that the model type does not have such a key.
FORMER_ROPE = ("rope_theta", "", "partial_rotary_factor")
GEMMA_ROPE = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
FORMER_ROPE_OF = {
    "gemma3_text": GEMMA_ROPE,
    "gemma3n_text": GEMMA_ROPE,
    "gpt_neox": ("rotary_emb_base", "", "rotary_pct"),
    "modernbert": ("global_rope_theta", "local_rope_theta", ""),
}
# All keys of `rope_scaling` that transformers 4 accepts, for model types that refuse others.
FORMER_SCALING_OF = {"phi3": ("type", "short_factor", "long_factor")}
KNOWN_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class UndescribedError(StructPruneError):
    """The layers of a model are not described, so only tokens can be removed from it."""


@dataclass(frozen=True)
class Template:
    """One space of a family, with names relative to a layer. `families/README.md` explains the fields."""

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
    keep_first: bool = False


@dataclass(frozen=True)
class ResidualTemplate:
    """The residual stream of a family. `families/README.md` explains the fields."""

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
    layer_path: tuple[str, ...] = ()  # several paths where the model has several lists of layers
    spaces: dict[str, Template] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    causal: bool = True
    text: str | None = None
    layer: Template | None = None
    hidden: ResidualTemplate | None = None
    layer_class: dict[str, str] = field(default_factory=dict)
    uniform: str = ""


# The families of each `arch_file` that this process has read, so that later calls without the file can build them.
_USER_FAMILIES: dict[str, Family] = {}


def read_families(path: str | Path) -> list[Family]:
    """Return the families of a YAML file.

    Raises:
        StructPruneError: If the file cannot be read, or does not describe families.
    """
    path = Path(path)
    try:
        entries = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StructPruneError(f"{path} cannot be read: {error}") from error

    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise StructPruneError(f"{path} must hold a list of families, each with model_types, layer_path and spaces.")

    families = []
    for number, entry in enumerate(entries):
        try:
            families.append(_family(entry, path.name))
        except StructPruneError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            name = entry.get("model_types", f"entry {number}")
            raise StructPruneError(f"{path.name}: {name} does not describe a family: {error}.") from error

    return families


def _family(entry: Mapping[str, Any], file: str) -> Family:
    """Return the family of one entry of a file."""
    types = [str(name) for name in entry.get("model_types") or ["?"]]
    where = f"{file}: {', '.join(types)}"

    values = dict(entry)
    transposed = values.pop("transposed", False)
    if isinstance(entry.get("layer_path"), str):
        values["layer_path"] = [entry["layer_path"]]

    if "spaces" in entry:
        values["spaces"] = {
            name: _space(space, f"{where}.{name}", transposed) for name, space in entry["spaces"].items()
        }
    if "layer" in entry:
        values["layer"] = _described(Template, entry["layer"], f"{where}.layer")
    if "hidden" in entry:
        values["hidden"] = _described(ResidualTemplate, entry["hidden"], f"{where}.hidden")

    # A multimodal model only names its text model, which has a description of its own.
    if "text" in entry:
        return _described(Family, values, where)
    return _described(Family, values, where, required=("layer_path", "spaces"))


def _space(entry: Mapping[str, Any], where: str, transposed: bool) -> Template:
    """Return the template of one space."""
    values = dict(entry)
    values.setdefault("transposed", transposed)
    for key in ("producers", "consumers", "also_cut"):
        if key in entry:
            values[key] = _parts(entry[key], f"{where}.{key}")

    if "router" in entry:
        return _described(Template, values, where, required=("experts",))
    return _described(Template, values, where, required=("producers", "consumers"))


def _parts(entry: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """Return the rows per unit of each named weight, as a list of its parts."""
    parts: dict[str, list[str]] = {}
    for name, units in entry.items():
        if not isinstance(units, list):
            units = [units]

        for unit in units:
            if unit not in UNIT_WORDS and not re.fullmatch(SUM_OF_KEYS, str(unit)):
                raise StructPruneError(f"{where}.{name}: unknown unit {unit!r}.{did_you_mean(str(unit), UNIT_WORDS)}")
        parts[name] = units

    return parts


def _described(kind: type[T], entry: Mapping[str, Any], where: str, required: Sequence[str] = ()) -> T:
    """Return a dataclass from values by field. Raise if a value is not of the declared type."""
    for key in required:
        if key not in entry:
            raise StructPruneError(f"{where}: {key!r} is missing.")

    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in types:
            raise StructPruneError(f"{where}: unknown key {key!r}.{did_you_mean(key, types)}")

        if get_origin(types[key]) is tuple and isinstance(value, list):
            value = tuple(value)
        type_validator(key, value, types[key])
        values[key] = value

    return kind(**values)


@lru_cache
def builtin_families() -> dict[str, Family]:
    """Return the built-in families by model type, in the order of the files."""
    families: dict[str, Family] = {}
    for path in sorted(FAMILIES_FOLDER.glob("*.yaml")):
        families.update(by_model_type(read_families(path)))
    return families


def by_model_type(families: Sequence[Family]) -> dict[str, Family]:
    """Return families by each of their model types."""
    by_type: dict[str, Family] = {}
    for family in families:
        by_type.update(dict.fromkeys(family.model_types, family))
    return by_type


def family_of(model_type: str, arch_file: str | Path | None = None) -> Family:
    """Return the family of a model type. Raise `UndescribedError` if neither the package nor the file describes it."""
    families = dict(builtin_families())
    if arch_file:
        families.update(user_families(arch_file))

    if model_type not in families:
        suggestion = ""
        if model_type not in CONFIG_MAPPING:  # a type of transformers is not misspelt
            suggestion = did_you_mean(model_type, families)
        raise UndescribedError(
            f"The model type {model_type!r} is not described in arch/families.{suggestion} "
            "examples/tools/stub.py of the repository prints a description to check and to pass as --arch."
        )
    return families[model_type]


def user_families(arch_file: str | Path) -> dict[str, Family]:
    """Return the families of a user's file by model type, and remember them for `layer_class_name`."""
    families = by_model_type(read_families(arch_file))
    _USER_FAMILIES.update(families)
    return families


def layer_class_name(model_type: str) -> str | None:
    """Return the name of the class of a model type's layers. None means that layers cannot have their own configs."""
    family = _USER_FAMILIES.get(model_type) or builtin_families().get(model_type)
    if family is None:
        return None
    return family.layer_class.get(model_type)


def with_former_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `config.json` with the rotary embedding keys of transformers 4 added."""
    new_fields: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            value = with_former_rope(value)
        new_fields[key] = value

    model_type = fields.get("model_type", "")
    rope = fields.get("rope_parameters") or {}
    full = rope.get("full_attention", rope) or {}
    sliding = rope.get("sliding_attention") or {}
    if full.get("rope_type") not in KNOWN_ROPE_TYPES:
        return new_fields

    values = (full.get("rope_theta"), sliding.get("rope_theta"), full.get("partial_rotary_factor"))
    for name, value in zip(FORMER_ROPE_OF.get(model_type, FORMER_ROPE), values, strict=True):
        if name and value is not None:
            new_fields[name] = value

    scaling = {key: value for key, value in full.items() if key not in FORMER_ROPE}
    if scaling == {"rope_type": "default"}:
        new_fields["rope_scaling"] = None
    else:
        keys = FORMER_SCALING_OF.get(model_type, scaling)
        new_fields["rope_scaling"] = {key: scaling[key] for key in keys if key in scaling}

    return new_fields
