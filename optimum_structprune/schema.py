"""What every config is made of: strict fields, plain values in and out, and the domain that several of them name."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from .errors import StructPruneError
from .registry import did_you_mean


IN_MEMORY = "memory:"
Number = float | int


def positive(value: Any) -> None:
    """A number above 0."""
    if isinstance(value, (int, float)) and value <= 0:
        raise ValueError(f"has to be greater than 0, got {value}")


def not_negative(value: Any) -> None:
    """A number that is 0 or more."""
    if isinstance(value, (int, float)) and value < 0:
        raise ValueError(f"has to be 0 or more, got {value}")


def share(value: Any) -> None:
    """A number strictly between 0 and 1."""
    if isinstance(value, (int, float)) and not 0 < value < 1:
        raise ValueError(f"has to lie between 0 and 1 (both excluded), got {value}; 0.2 removes a fifth")


def filled(value: Any) -> None:
    """Something that is not empty."""
    if not value:
        raise ValueError(f"has to name at least one, got {value!r}")


def _source(value: Any) -> None:
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise ValueError(f"has to be a path, a name, a dataset or an iterable of strings, got {type(value).__name__}")
    if value == "":
        raise ValueError("has to name something, got ''")


class Serialisable:
    """`to_dict` and `from_dict` with strict keys."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]):
        """Inverse of `to_dict`.

        Raises:
            StructPruneError: If a key is unknown or a value is not legal; the message names the field and the value.
        """
        return build(cls, data)


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass, of ours or of another library, from values by field.

    Raises:
        StructPruneError: If a key is unknown or a value is not legal; the message names the field and the value.
    """
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise StructPruneError(f"{cls.__name__} has no field {key!r}.{did_you_mean(key, known)}")
    try:
        return cls(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise StructPruneError(f"{cls.__name__}: {' '.join(str(error).split())}") from error


@strict
@dataclass
class DomainConfig(Serialisable):
    """A named calibration stream.

    Args:
        name: What the report calls it.
        source: A file (`.txt`, `.jsonl`, `.json`, `.parquet`, `.csv`), a glob, a folder, `builtin:prose`,
            `builtin:code`, `builtin:math`, a dataset id on the Hub, a `datasets` object, or any iterable of strings.
        weight: Share of the calibration tokens, relative to the other domains.
        text_column: Column that holds the text.
        dataset_config: Name of the configuration of a Hub dataset.
        split: Split of a Hub dataset.
    """

    name: str = validated_field(filled)
    source: Any = validated_field(_source)
    weight: Number = validated_field(positive, default=1.0)
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; a source that lives in memory is only named."""
        named = self.source if isinstance(self.source, str) else f"{IN_MEMORY}{type(self.source).__name__}"
        return {**super().to_dict(), "source": named}


def with_domains(data: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """Fields of a config whose domains are no longer mappings.

    Raises:
        StructPruneError: If an entry is neither a mapping nor a domain.
    """
    domains = data.get("domains")
    return {**data, "domains": [_domain(item, owner) for item in domains]} if isinstance(domains, list) else data


def _domain(item: Any, owner: str) -> DomainConfig:
    if isinstance(item, DomainConfig):
        return item
    if not isinstance(item, Mapping):
        raise StructPruneError(f"{owner}: 'domains' takes mappings with a name and a source, got {item!r}.")
    return DomainConfig.from_dict(item)


def check_names(domains: Iterable[DomainConfig]) -> None:
    """At least one domain, and no two of the same name."""
    names = [domain.name for domain in domains]
    if not names:
        raise ValueError("domains has to name at least one domain, got []")
    if len(set(names)) < len(names):
        raise ValueError(f"domains has two entries of the same name: {', '.join(names)}")


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        StructPruneError: If the file cannot be read or holds something else.
    """
    return read_mapping(Path(path), yaml.safe_load)


def read_mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """The mapping in a file that `parse` reads.

    Raises:
        StructPruneError: If the file cannot be read or holds something else.
    """
    try:
        data = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StructPruneError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, Mapping):
        raise StructPruneError(f"{path} has to hold a mapping of fields, found {type(data).__name__}.")
    return data
