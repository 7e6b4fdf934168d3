"""Generate the JSON schemas of the files of a result from the dataclasses that write them.

`python -m optimum_structprune.saving.schemas FOLDER` writes one file for each.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..config.pruning import StructPruneConfig
from ..domains.manifest import Manifest
from ..record.evaluation import Evaluation
from ..record.report import RecoveryReport, Report
from ..record.speed import Speed
from ..written import FORMAT_VERSION, RECORD_VERSION, VERSION_KEY, replace_json


DRAFT = "https://json-schema.org/draft/2020-12/schema"
PLAIN_TYPES = {int: "integer", str: "string", bool: "boolean", NoneType: "null"}
# A description in a docstring: `name: text`, with its continuation lines.
DESCRIPTION = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
# The dataclass and the schema version of each file.
FILES: dict[str, tuple[type, int]] = {
    "structprune_config": (StructPruneConfig, FORMAT_VERSION),
    "calibration_manifest": (Manifest, FORMAT_VERSION),
    "report": (Report, RECORD_VERSION),
    "recovery_report": (RecoveryReport, RECORD_VERSION),
    "evaluation": (Evaluation, RECORD_VERSION),
    "speed": (Speed, RECORD_VERSION),
}
# The plan groups its indices by space, which differs from the fields of its class.
PLAN_SCHEMA = {
    "$schema": DRAFT,
    "title": "pruning_plan.json",
    "description": "The kept units of the original model.",
    "type": "object",
    "properties": {
        VERSION_KEY: {"const": FORMAT_VERSION},
        "model_type": {"type": "string", "description": "The model type."},
        "dense": {"type": "string", "description": "The fingerprint of the original model."},
        "sizes": {
            "type": "object",
            "description": "The greatest width of the original model, by kind of space.",
            "additionalProperties": {"type": "integer"},
        },
        "keep": {
            "type": "object",
            "description": "The kept units in ascending order, by space and layer; -1 stands for the whole model.",
            "additionalProperties": {
                "type": "object",
                "propertyNames": {"pattern": "^-?[0-9]+$"},
                "additionalProperties": {"type": "array", "items": {"type": "integer"}},
            },
        },
    },
    "required": ["model_type", "keep"],
    "additionalProperties": False,
}


def schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each file of a result, by its name without the extension."""
    schemas = {name: schema_of(kind, f"{name}.json", version) for name, (kind, version) in FILES.items()}
    schemas["pruning_plan"] = PLAN_SCHEMA
    return schemas


def schema_of(kind: type, title: str, version: int) -> dict[str, Any]:
    """Return the JSON schema of a file that holds one dataclass.

    Args:
        kind: The dataclass.
        title: The name of the file.
        version: The schema version of the file.
    """
    definitions: dict[str, Any] = {}
    schema = _object(kind, definitions)
    properties = {VERSION_KEY: {"const": version}}
    properties.update(schema["properties"])

    document: dict[str, Any] = {"$schema": DRAFT, "title": title}
    document.update(schema)
    document["properties"] = properties
    if definitions:
        document["$defs"] = dict(sorted(definitions.items()))
    return document


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a dataclass, and add the schemas of the dataclasses in it to the definitions."""
    types = get_type_hints(kind)
    descriptions = _descriptions(kind)
    properties: dict[str, dict[str, Any]] = {}
    required = []

    for field in fields(kind):
        field_schema: dict[str, Any] = {}
        description = descriptions.get(field.name)
        if description is not None:
            field_schema["description"] = description
        field_schema.update(_type(types[field.name], definitions))
        properties[field.name] = field_schema
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)

    summary = (getdoc(kind) or "").partition("\n")[0]
    schema: dict[str, Any] = {
        "type": "object",
        "description": summary,
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    return schema


def _descriptions(kind: type) -> dict[str, str]:
    """Return the description of each field in the docstrings of a dataclass and of the classes that it extends."""
    descriptions = {}
    for ancestor in reversed(kind.__mro__):
        if not is_dataclass(ancestor):
            continue

        for name, text in DESCRIPTION.findall(getdoc(ancestor) or ""):
            descriptions[name] = " ".join(text.split())
    return descriptions


def _type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type."""
    if kind is Any:
        return {}
    if is_dataclass(kind):
        return _reference(kind, definitions)  # type: ignore[arg-type]
    if kind in PLAIN_TYPES:
        return {"type": PLAIN_TYPES[kind]}
    if kind is float:
        # A number that is not finite is null.
        return {"type": ["number", "null"]}

    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin in (Union, UnionType):
        return _union(arguments, definitions)
    if origin is Literal:
        return {"enum": list(arguments)}

    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(arguments, definitions)
    if isinstance(origin, type) and issubclass(origin, (Sequence, set, frozenset)):
        return {"type": "array", "items": _type(arguments[0], definitions)}
    return {}


def _union(arguments: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a union, in which equal schemas occur once."""
    options: list[dict[str, Any]] = []
    for argument in arguments:
        option = _type(argument, definitions)
        if option not in options:
            options.append(option)
    return {"anyOf": options}


def _mapping(arguments: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a mapping, in which JSON writes numeric keys as strings."""
    key, value = arguments
    schema: dict[str, Any] = {"type": "object", "additionalProperties": _type(value, definitions)}

    if key is int:
        schema["propertyNames"] = {"pattern": "^-?[0-9]+$"}
    return schema


def _reference(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a reference to the definition of a dataclass, and add the definition if it is missing."""
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # so that a class that contains itself ends the recursion
        definitions[name] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{name}"}


def write_schemas(folder: str | Path) -> None:
    """Write the schema of each file of a result to a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        replace_json(Path(folder, f"{name}.schema.json"), schema)


if __name__ == "__main__":
    write_schemas(sys.argv[1])
