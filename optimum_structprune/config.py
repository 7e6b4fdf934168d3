"""What to remove and how: one strict, serialisable dataclass."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from .errors import StructPruneError
from .registry import did_you_mean


CONFIG_NAME = "structprune_config.json"
IN_MEMORY = "memory:"
Number = float | int


def _positive(value: Any) -> None:
    if isinstance(value, (int, float)) and value <= 0:
        raise ValueError(f"has to be greater than 0, got {value}")


def _not_negative(value: Any) -> None:
    if isinstance(value, (int, float)) and value < 0:
        raise ValueError(f"has to be 0 or more, got {value}")


def _share(value: Any) -> None:
    if isinstance(value, (int, float)) and not 0 < value < 1:
        raise ValueError(f"has to lie between 0 and 1 (both excluded), got {value}; 0.2 removes a fifth")


def _filled(value: Any) -> None:
    if not value:
        raise ValueError(f"has to name at least one, got {value!r}")


def _source(value: Any) -> None:
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise ValueError(f"has to be a path, a name, a dataset or an iterable of strings, got {type(value).__name__}")
    if value == "":
        raise ValueError("has to name something, got ''")


class _Serialisable:
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
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every subclass is a dataclass
        for key in data:
            if key not in known:
                raise StructPruneError(f"{cls.__name__} has no field {key!r}.{did_you_mean(key, known)}")
        try:
            return cls(**data)
        except (StrictDataclassError, TypeError) as error:
            raise StructPruneError(f"{cls.__name__}: {' '.join(str(error).split())}") from error


@strict
@dataclass
class DomainConfig(_Serialisable):
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

    name: str = validated_field(_filled)
    source: Any = validated_field(_source)
    weight: Number = validated_field(_positive, default=1.0)
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; a source that lives in memory is only named."""
        named = self.source if isinstance(self.source, str) else f"{IN_MEMORY}{type(self.source).__name__}"
        return {**super().to_dict(), "source": named}


def builtin_domains() -> list[DomainConfig]:
    """The domains that need no download, in equal shares."""
    return [DomainConfig(name=name, source=f"builtin:{name}") for name in ("prose", "code", "math")]


@strict
@dataclass(kw_only=True)
class StructPruneConfig(_Serialisable):
    """How a model is pruned. Exactly one of `sparsity` and `widths` says how much.

    Args:
        method: Registered pruner.
        sparsity: Share of the blocks' parameters to remove.
        widths: Number of units to keep, by space, such as `{"mlp": 1152, "attention": 2}`.
        targets: Spaces that may shrink when `sparsity` chooses the widths.
        criterion: Registered criterion that scores the units.
        refit: What makes up for the removed units: `none`, `bias` or `least_squares`.
        rounds: Number of times that calibration, scoring and removal are repeated, each removing a part.
        schedule: How the rounds divide the removal: `linear`, `geometric` or `cubic`.
        allocation: How the removal is spread over the blocks; `uniform` keeps the same width everywhere.
        round_to: Channel widths that `sparsity` chooses are multiples of this; explicit widths are taken as given.
        domains: Calibration text; more than one kind makes the result general.
        aggregation: How the evidence of several domains becomes one score: `mean` pools it, `max` keeps what any
            domain needs.
        num_samples: Token blocks for calibration in all, divided over the domains by weight.
        seq_length: Tokens per block.
        batch_size: Blocks per forward pass.
        damping: Ridge of the refit toward the original weights, relative to the mean diagonal of the Gram matrix.
        holdout: Share of each domain's blocks that is set aside, from other documents, for perplexity.
        skip_layers: Blocks that stay whole; needs an allocation that may differ between blocks.
        seed: Of everything random.
        arch_file: YAML file that describes architectures of your own, in the form of the built-in `families.yaml`.
    """

    method: str = "iterative"
    sparsity: Number | None = validated_field(_share, default=None)
    widths: dict[str, int] | None = None
    targets: tuple[str, ...] | list[str] = validated_field(_filled, default=("mlp", "attention"))
    criterion: str = "wanda"
    refit: Literal["none", "bias", "least_squares"] = "least_squares"
    rounds: int = validated_field(_positive, default=1)
    schedule: Literal["linear", "geometric", "cubic"] = "geometric"
    allocation: Literal["uniform"] = "uniform"
    round_to: int = validated_field(_positive, default=64)
    domains: list[DomainConfig] = field(default_factory=builtin_domains)
    aggregation: Literal["mean", "max"] = "mean"
    num_samples: int = validated_field(_positive, default=128)
    seq_length: int = validated_field(_positive, default=512)
    batch_size: int = validated_field(_positive, default=4)
    damping: Number = validated_field(_not_negative, default=1e-2)
    holdout: Number = validated_field(_share, default=0.125)
    skip_layers: tuple[int, ...] | list[int] = ()
    seed: int = 0
    arch_file: str | None = None

    def __post_init__(self) -> None:
        self.targets = tuple(self.targets)
        self.skip_layers = tuple(self.skip_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return {**super().to_dict(), "domains": [domain.to_dict() for domain in self.domains]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StructPruneConfig":
        """Inverse of `to_dict`; domains may be mappings.

        Raises:
            StructPruneError: If a key is unknown or a value is not legal; the message names the field and the value.
        """
        domains = data.get("domains")
        if isinstance(domains, list):
            data = {**data, "domains": [_domain(item) for item in domains]}
        return super().from_dict(data)

    def validate_amount(self) -> None:
        """Exactly one of `sparsity` and `widths`, and widths that are positive."""
        if (self.sparsity is None) == (self.widths is None):
            raise ValueError(
                f"exactly one of sparsity and widths says how much to remove, "
                f"got sparsity={self.sparsity} and widths={self.widths}"
            )
        for name, width in (self.widths or {}).items():
            if width < 1:
                raise ValueError(f"widths[{name!r}] has to be 1 or more, got {width}")
        if self.widths == {}:
            raise ValueError("widths has to name at least one space, such as {'mlp': 1152}, got {}")

    def validate_domains(self) -> None:
        """At least one domain, and no two of the same name."""
        names = [domain.name for domain in self.domains]
        if not names:
            raise ValueError("domains has to name at least one domain, got []")
        if len(set(names)) < len(names):
            raise ValueError(f"domains has two entries of the same name: {', '.join(names)}")

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `structprune_config.json` into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> "StructPruneConfig":
        """Read `structprune_config.json` from a folder."""
        return cls.from_dict(_mapping(Path(save_directory) / CONFIG_NAME, json.loads))

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "StructPruneConfig":
        """Read a YAML file."""
        return cls.from_dict(read_yaml(path))


def _domain(item: Any) -> DomainConfig:
    if isinstance(item, DomainConfig):
        return item
    if not isinstance(item, Mapping):
        raise StructPruneError(f"StructPruneConfig: 'domains' takes mappings with a name and a source, got {item!r}.")
    return DomainConfig.from_dict(item)


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        StructPruneError: If the file cannot be read or holds something else.
    """
    return _mapping(Path(path), yaml.safe_load)


def _mapping(path: Path, parse) -> Mapping[str, Any]:
    try:
        data = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StructPruneError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, Mapping):
        raise StructPruneError(f"{path} has to hold a mapping of fields, found {type(data).__name__}.")
    return data
