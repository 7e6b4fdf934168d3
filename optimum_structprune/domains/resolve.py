"""The domains that a config stands for, with their weights: built-in ones, those of presets, and general text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config.domains import ANY, BUILTIN, GENERAL, PRESET, SELF, DomainConfig, is_general
from ..config.fields import read_yaml
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..registry import did_you_mean


def resolve(domains: Iterable[DomainConfig]) -> list[DomainConfig]:
    """Replace presets by their domains. A domain's own fields come first."""
    resolved = [part for domain in domains for part in _resolved(domain)]
    names = [domain.name for domain in resolved]
    for name in names:
        if names.count(name) > 1:
            raise StructPruneError(f"Two domains are named {name!r} once the presets are resolved; rename one.")
    return resolved


def presets(file: str = "") -> dict[str, Mapping[str, Any]]:
    """All presets by name, those of a file over the built-in ones: fields of a domain and a licence, or a `mix`."""
    table = {**read_yaml(Path(__file__).with_name("presets.yaml")), **(read_yaml(file) if file else {})}
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


WRITTEN = SELF + ANY


def builtin_domains() -> list[DomainConfig]:
    """The domains where none are named, in equal shares; they need no download."""
    return [DomainConfig(name=name, source=f"{BUILTIN}{name}") for name in ("prose", "code", "math")]


def texts_of(config: StructPruneConfig) -> list[DomainConfig]:
    """The domains of a config, or the built-in ones, followed by the general text where it has a share."""
    domains = builtin_domains() if config.domains is None else config.domains
    share = config.general_share
    if share is None:
        share = 0.5 if config.domains is None else 0.2 if config.general_text is not None else 0.0
    if share == 0:
        return domains
    weight = share / (1 - share) * sum(domain.weight for domain in domains)
    source = config.general_text or builtin_beside(domains, bool(config.trims))
    return [*domains, DomainConfig(name=GENERAL, source=source, weight=weight)]


def with_written_text(config: StructPruneConfig) -> StructPruneConfig:
    """Adds general text to other text, if nothing is said of it: the model's own, or built-in where tokens go."""
    domains = config.domains or []
    placed = 0 < len(domains) < config.num_samples and not any(map(is_general, domains))
    if not placed or config.general_text is not None or config.general_share == 0:
        return config
    return replace(config, general_text=builtin_beside(domains, True) if config.trims else WRITTEN)


def builtin_beside(domains: list[DomainConfig], trims: bool = False) -> str:
    """Names built-in text of all kinds but those of the domains, and without languages where it `trims`."""
    sources = [domain.source for domain in domains if isinstance(domain.source, str)]
    named = [source.removeprefix(BUILTIN) for source in sources if source.startswith(BUILTIN)]
    return BUILTIN + "-".join([GENERAL, *(kind for name in named for kind in name.split("+")), *["languages"] * trims])


def split_samples(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Divide samples in proportion to weights: whole numbers by largest remainder, and at least 1 each."""
    if num_samples < len(weights):
        raise StructPruneError(
            f"num_samples={num_samples} does not give each of the {len(weights)} domains a sample; "
            f"{len(weights)} is the least."
        )
    total = sum(weights)
    quotas = [num_samples * weight / total for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: num_samples - sum(counts)]:
        counts[i] += 1
    while 0 in counts:
        donors = (i for i, count in enumerate(counts) if count > 1)
        counts[max(donors, key=lambda i: counts[i] - quotas[i])] -= 1
        counts[counts.index(0)] = 1
    return counts
