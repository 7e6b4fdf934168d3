"""The config of a calibration domain."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from string import Formatter
from typing import Any

from huggingface_hub.dataclasses import strict, validated_field

from ..errors import StructPruneError
from .fields import LARGEST, Number, Serialisable, config_class, filled, positive


# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.


IN_MEMORY = "memory:"
PRESET = "preset:"
SELF = "self:"
BUILTIN = "builtin:"
# The built-in text of all kinds, the text of any kind that a model writes, and the domain that is made of either.
GENERAL, ANY = "general", "any"
# Text of many kinds by which a run is judged, and which the run does not read.
OTHER = "other"
CHAT = "chat"


class Reiterable:
    """Makes an iterator readable any number of times: it is kept as far as it has been read."""

    def __init__(self, items: Iterator[Any]):
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        self._items, again = tee(self._items)
        return again


def _source(value: Any) -> None:
    if not isinstance(value, (Iterable, Path)) or isinstance(value, (bytes, Mapping)):
        raise ValueError(f"has to be a path, a name, a dataset or an iterable of strings, got {type(value).__name__}")
    if isinstance(value, str) and not value:
        raise ValueError("has to name something, got ''")


def _template(value: Any) -> None:
    if value is not None and value != CHAT and not template_fields(value):
        raise ValueError(f"has to be 'chat' or to hold column names such as {{question}}, got {value!r}")


def template_fields(template: str) -> list[str]:
    """The columns that a text template names, in order."""
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"a field of the template {template!r} has to be a column's name, got {name!r}")
            names.append(name)
    return names


@config_class
@strict
@dataclass
class DomainConfig(Serialisable):
    """A named source of calibration text.

    Args:
        name: The name of the domain in the report.
        source: A file (`.txt`, `.jsonl`, `.json`, `.parquet`, `.csv`), a glob, a folder, `builtin:prose`,
            `builtin:code`, `builtin:math`, a preset (`preset:code`, or of your own `preset:FILE.yaml#NAME`), text that
            the model writes itself (`self:code`, `self:math`, `self:prose`, `self:dialogue`, `self:reasoning`,
            `self:any`), a dataset id on the Hub, a folder that `save_to_disk` of `datasets` wrote, a `datasets`
            object, or any iterable of strings, or with a template of rows. A `pathlib.Path` is kept as its text, and
            what a generator gives is kept as far as it is read, for later readings.
        weight: The domain's share of the calibration tokens, relative to the other domains.
        text_column: The column that holds the text, or with `template="chat"` the messages.
        dataset_config: The name of the configuration of a Hub dataset.
        split: The split of a Hub dataset, or of a folder that holds several.
        revision: The commit, tag or branch of a Hub dataset.
        template: How a row becomes text: `chat` puts its messages through the tokenizer's chat template; any other
            template is a text with column names, such as `"Question: {question}\\nAnswer: {answer}"`.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type or lies outside of its range; the message
            names the field and the value.
    """

    name: str = validated_field(filled)
    source: Any = validated_field(_source)
    weight: Number = validated_field(positive, default=1.0)
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"
    revision: str | None = None
    template: str | None = validated_field(_template, default=None)
    gone = {"answers_only": False}

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            self.source = str(self.source)
        elif isinstance(self.source, Iterator):
            self.source = Reiterable(self.source)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; of a source in memory only the name of its class is kept."""
        source = self.source if isinstance(self.source, str) else f"{IN_MEMORY}{type(self.source).__name__}"
        return {**super().to_dict(), "source": source}


def written_by_model(domain: DomainConfig) -> bool:
    """Tell whether the model writes the text of a domain itself."""
    return isinstance(domain.source, str) and domain.source.startswith(SELF)


def as_domain(item: Any, owner: str) -> DomainConfig:
    """A domain from a mapping of its fields; a domain comes back as it is."""
    if isinstance(item, DomainConfig):
        return item
    if not isinstance(item, Mapping):
        raise StructPruneError(f"{owner}: 'domains' takes mappings with a name and a source, got {item!r}.")
    return DomainConfig.from_dict(item)


class WithDomains(Serialisable):
    """A config that names domains, or none."""

    domains: list[DomainConfig] | None
    parts = {"domains": lambda items, owner: [as_domain(item, owner) for item in items]}

    def validate_domains(self) -> None:
        """Refuse an empty list of domains, and two of the same name."""
        if self.domains is None:
            return
        names = [domain.name for domain in self.domains]
        if not names:
            raise ValueError("domains has to name at least one domain, got []")
        if sum(domain.weight for domain in self.domains) > LARGEST:
            raise ValueError("the weights of the domains add up to infinity; they are relative, so 1 and 2 will do")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"domains has two entries of the name {twice!r}; rename one (--domain NAME=FILE)")


def is_general(domain: DomainConfig) -> bool:
    """Tell whether a domain is general text: of every kind, or of that name."""
    every_kind = (f"{BUILTIN}{GENERAL}", f"{SELF}{ANY}", f"{PRESET}{GENERAL}")
    return domain.name == GENERAL or (isinstance(domain.source, str) and domain.source.startswith(every_kind))
