"""The config of a calibration domain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import tee
from math import inf
from pathlib import Path
from string import Formatter
from typing import Any

from ..system.errors import StructPruneError
from .fields import Config


# The prefixes of sources that are not files or datasets.
IN_MEMORY = "memory:"
PRESET = "preset:"
BUILTIN = "builtin:"
# General text of all kinds: the name of the built-in text and of its domain, and the source of a model that generates.
GENERAL = "general"
ANY = "any"
WRITTEN = f"self:{ANY}"
# Text of many kinds that a run evaluates on, but does not calibrate on.
OTHER = "other"
CHAT = "chat"
# The origins of unseen text.
FROM_HUB = "from the Hub"
MODEL_WRITTEN = "model-written"
BUILT_IN = "built-in"


class Reiterable:
    """An iterable that reads an iterator once and stores its items, so that it can be iterated several times."""

    def __init__(self, items: Iterator[Any]):
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        self._items, copy = tee(self._items)
        return copy


def template_fields(template: str) -> list[str]:
    """Return the column names in a text template, in order.

    Raises:
        ValueError: If a field of the template is not a column name.
    """
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(f"the field {name!r} of the template {template!r} is not a column name")
        names.append(name)
    return names


@dataclass
class DomainConfig(Config):
    """A named source of calibration text.

    Args:
        name: The name of the domain in the report.
        source: A file (`.txt`, `.jsonl`, `.json`, `.parquet`, `.csv`), a glob, a folder, `builtin:prose`,
            `builtin:code`, `builtin:math`, a preset (`preset:code`, or your own `preset:FILE.yaml#NAME`), text that
            the model generates (`self:any`), a dataset id on the Hub, a folder written by `save_to_disk` of
            `datasets`, a `datasets` object, or any iterable of strings, or of rows if there is a template. A
            `pathlib.Path` is converted to a string. The items of a generator are kept, so that it can be read again.
        weight: The domain's share of the calibration tokens, relative to the other domains.
        text_column: The column with the text, or with the messages if `template="chat"`.
        dataset_config: The name of the configuration of a Hub dataset.
        split: The split of a Hub dataset, or of a folder that holds several.
        revision: The commit, tag or branch of a Hub dataset.
        template: How a row becomes text. `chat` applies the tokenizer's chat template to its messages. Any other
            template is a text with column names, such as `"Question: {question}\\nAnswer: {answer}"`.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type or is out of range. The message names the
            field and the value.
    """

    name: str
    source: Any
    weight: float = 1.0
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"
    revision: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            self.source = str(self.source)
        elif isinstance(self.source, Iterator):
            self.source = Reiterable(self.source)
        super().__post_init__()

    def validate(self) -> None:
        """Raise `StructPruneError` if a value has another type or is out of range."""
        super().validate()

        self.check_not_empty("name")
        if not 0 < self.weight < inf:
            self.refuse("weight", f"must be greater than 0 and finite, got {self.weight}")

        is_text = isinstance(self.source, Iterable) and not isinstance(self.source, (bytes, Mapping))
        if not is_text:
            kind = type(self.source).__name__
            self.refuse("source", f"must be a path, a name, a dataset or an iterable of strings, got {kind}")
        # Iterating over a table yields the names of its columns.
        if hasattr(self.source, "iterrows") or hasattr(self.source, "iter_rows"):
            self.refuse("source", "must not be a table. Pass one of its columns, such as table['text']")
        if isinstance(self.source, str) and not self.source:
            self.refuse("source", "must not be empty, got ''")

        if self.template is not None and self.template != CHAT:
            self._check_template(self.template)

    def _check_template(self, template: str) -> None:
        try:
            names = template_fields(template)
        except ValueError as error:
            raise StructPruneError(f"DomainConfig: `template` is not legal: {error}.") from error

        if not names:
            self.refuse("template", f"must be 'chat' or hold column names such as {{question}}, got {template!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON. A source in memory becomes the name of its class."""
        source = self.source
        if not isinstance(source, str):
            source = f"{IN_MEMORY}{type(source).__name__}"
        return Config.to_dict(replace(self, source=source))


def written_by_model(domain: DomainConfig) -> bool:
    """Return whether the model generates the text of a domain."""
    return isinstance(domain.source, str) and domain.source == WRITTEN


def as_domain(item: Any) -> DomainConfig:
    """Convert a mapping of fields to a domain. A domain is returned unchanged."""
    if isinstance(item, DomainConfig):
        return item
    return DomainConfig.from_dict(item)


def check_domains(config: Any) -> None:
    """Raise if the field `domains` of a config is an empty list, or two domains have the same name."""
    if config.domains is None:
        return

    config.check_not_empty("domains")
    names = [domain.name for domain in config.domains]
    for name in names:
        if names.count(name) > 1:
            config.refuse("domains", f"has two entries of the name {name!r}. Rename one (--domain NAME=FILE)")


def is_general(domain: DomainConfig) -> bool:
    """Return whether a domain is general text, by its name or its source."""
    sources = (f"{BUILTIN}{GENERAL}", WRITTEN, f"{PRESET}{GENERAL}")
    has_general_source = isinstance(domain.source, str) and domain.source.startswith(sources)
    return domain.name == GENERAL or has_general_source
