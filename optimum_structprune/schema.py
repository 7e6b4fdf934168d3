"""What every config is made of: strict fields, plain values in and out, and the domain that several of them name."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from .errors import StructPruneError
from .registry import did_you_mean
from .yaml_text import parse_yaml


IN_MEMORY = "memory:"
PRESET = "preset:"
SELF = "self:"
CHAT = "chat"
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


def proportion(value: Any) -> None:
    """A number from 0 to 1."""
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f"has to lie between 0 and 1, got {value}")


def up_to_one(value: Any) -> None:
    """A number above 0 and not above 1."""
    if isinstance(value, (int, float)) and not 0 < value <= 1:
        raise ValueError(f"has to lie between 0 (excluded) and 1, got {value}")


def above_one(value: Any) -> None:
    """A ratio above 1."""
    if isinstance(value, (int, float)) and value <= 1:
        raise ValueError(f"has to be greater than 1, got {value}; 1.3 allows 30 % more")


def filled(value: Any) -> None:
    """Something that is not empty."""
    if not value:
        raise ValueError(f"has to name at least one, got {value!r}")


def _source(value: Any) -> None:
    if not isinstance(value, (Iterable, Path)) or isinstance(value, (bytes, Mapping)):
        raise ValueError(f"has to be a path, a name, a dataset or an iterable of strings, got {type(value).__name__}")
    if value == "":
        raise ValueError("has to name something, got ''")


def _template(value: Any) -> None:
    if value is not None and value != CHAT and not template_fields(value):
        raise ValueError(f"has to be 'chat' or to hold column names such as {{question}}, got {value!r}")


def template_fields(template: str) -> list[str]:
    """The columns that a text template names, in order.

    Raises:
        ValueError: If a brace is left open, or a field is more than a name.
    """
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"a field of the template {template!r} has to be a column's name, got {name!r}")
            names.append(name)
    return names


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
            `builtin:code`, `builtin:math`, a preset (`preset:code`, `preset:hybrid` …), text that the model writes
            itself (`self:code`, `self:math`, `self:prose`, `self:dialogue`, `self:reasoning`), a dataset id on the
            Hub, a folder that `save_to_disk` of `datasets` wrote, a `datasets` object, or any iterable of strings, or
            with a template of rows. A `pathlib.Path` is kept as its text.
        weight: Share of the calibration tokens, relative to the other domains.
        text_column: Column that holds the text, or with `template="chat"` the messages.
        dataset_config: Name of the configuration of a Hub dataset.
        split: Split of a Hub dataset, or of a folder that holds several.
        revision: Commit, tag or branch of a Hub dataset.
        streaming: Read a Hub dataset row by row; otherwise the split is downloaded as a whole.
        template: How a row becomes text: `chat` puts its messages through the tokenizer's chat template; else a text
            with column names, such as `"Question: {question}\nAnswer: {answer}"`.
        answers_only: Take evidence only from answers: what the assistant says in a chat, the last field of a template,
            what the model wrote.
    """

    name: str = validated_field(filled)
    source: Any = validated_field(_source)
    weight: Number = validated_field(positive, default=1.0)
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    template: str | None = validated_field(_template, default=None)
    answers_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            self.source = str(self.source)

    def validate_answers(self) -> None:
        """Something that tells answers from questions."""
        preset = isinstance(self.source, str) and self.source.startswith(PRESET)
        if self.answers_only and self.template is None and not (preset or written_by_model(self)):
            raise ValueError("answers_only needs a template that says what the answers are, got template=None")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; a source that lives in memory is only named."""
        named = self.source if isinstance(self.source, str) else f"{IN_MEMORY}{type(self.source).__name__}"
        return {**super().to_dict(), "source": named}


def written_by_model(domain: DomainConfig) -> bool:
    """Whether a domain is text that the model writes itself."""
    return isinstance(domain.source, str) and domain.source.startswith(SELF)


@strict
@dataclass(kw_only=True)
class SelfTextConfig(Serialisable):
    """How a model writes its own calibration text, for the sources `self:NAME`.

    Args:
        max_new_tokens: Length of a document, at most.
        batch_size: Documents that are written at once.
        temperature: Of the sampling.
        top_p: Of the sampling: the likeliest tokens that together have this probability.
        min_tokens: Shorter documents are dropped.
        min_distinct: Least share of different runs of 4 tokens among all; a document that repeats itself is dropped.
        max_perplexity_ratio: A document is dropped if its perplexity is this many times above or below the median of
            its batch.
        cache_dir: Where the documents are kept; by default `structprune` in the Hugging Face home folder.
    """

    max_new_tokens: int = validated_field(positive, default=384)
    batch_size: int = validated_field(positive, default=16)
    temperature: Number = validated_field(positive, default=1.0)
    top_p: Number = validated_field(positive, default=0.95)
    min_tokens: int = validated_field(positive, default=32)
    min_distinct: Number = validated_field(not_negative, default=0.5)
    max_perplexity_ratio: Number = validated_field(positive, default=4.0)
    cache_dir: str | None = None


def as_domain(item: Any, owner: str) -> DomainConfig:
    """A domain from its mapping; a domain comes back as it is.

    Raises:
        StructPruneError: If it is neither.
    """
    if isinstance(item, DomainConfig):
        return item
    if not isinstance(item, Mapping):
        raise StructPruneError(f"{owner}: 'domains' takes mappings with a name and a source, got {item!r}.")
    return DomainConfig.from_dict(item)


def with_domains(data: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """The fields of a config with its domains as `DomainConfig`s, where it lists any."""
    domains = data.get("domains")
    if not isinstance(domains, list):
        return data
    return {**data, "domains": [as_domain(item, owner) for item in domains]}


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
    return read_mapping(Path(path), parse_yaml)


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
