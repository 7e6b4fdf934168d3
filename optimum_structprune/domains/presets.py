"""Domains by name: `preset:code`, and `preset:FILE.yaml#NAME` of your own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config.domains import PRESET, DomainConfig
from ..config.fields import read_yaml
from ..errors import StructPruneError
from ..registry import did_you_mean


BUILTIN_PRESETS = Path(__file__).with_name("presets.yaml")


def resolve(domains: Iterable[DomainConfig]) -> list[DomainConfig]:
    """Replace presets by what they stand for, which gives domains whose sources can be read.

    A field that the domain sets to something else than its default goes before the preset's. A preset with `mix` gives
    one domain for each of its parts, named `NAME-PART`, which share the weight equally.
    """
    resolved = [part for domain in domains for part in _resolved(domain)]
    names = [domain.name for domain in resolved]
    for name in names:
        if names.count(name) > 1:
            raise StructPruneError(f"Two domains are named {name!r} once the presets are resolved; rename one.")
    return resolved


def presets(file: str = "") -> dict[str, Mapping[str, Any]]:
    """All presets by name, those of a file over the built-in ones: each has the fields of `DomainConfig` and a
    `licence`, or a `mix` of others.
    """
    table = {**read_yaml(BUILTIN_PRESETS), **(read_yaml(file) if file else {})}
    for name, entry in table.items():
        if not isinstance(entry, Mapping) or ("mix" in entry) == ("source" in entry):
            raise StructPruneError(f"The preset {name!r} needs a source, or a mix of other presets; got {entry!r}.")
    return table


def _resolved(domain: DomainConfig) -> list[DomainConfig]:
    if not (isinstance(domain.source, str) and domain.source.startswith(PRESET)):
        return [domain]
    file, _, name = domain.source.removeprefix(PRESET).rpartition("#")
    table = presets(file)
    entry = _entry(name, table)
    if "mix" not in entry:
        return [_filled(domain, entry)]
    parts = {part: _entry(part, table) for part in entry["mix"]}
    for part in parts:
        if "mix" in parts[part]:
            raise StructPruneError(f"The preset {domain.source!r} mixes {part!r}, itself a mix.")
    weight = domain.weight / len(parts)
    return [_filled(domain, fields, f"{domain.name}-{part}", weight) for part, fields in parts.items()]


def _entry(name: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if name not in table:
        raise StructPruneError(f"There is no preset {name!r}.{did_you_mean(name, table)}")
    return table[name]


def _filled(
    domain: DomainConfig, entry: Mapping[str, Any], name: str | None = None, weight: float | None = None
) -> DomainConfig:
    preset = {key: value for key, value in entry.items() if key != "licence"}
    changed = {f.name: value for f in fields(DomainConfig) if (value := getattr(domain, f.name)) != f.default}
    fixed = {"name": name or domain.name, "weight": weight or domain.weight, "source": entry["source"]}
    return DomainConfig.from_dict({**preset, **changed, **fixed})
