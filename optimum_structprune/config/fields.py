"""The base of every config: strict fields, and plain values in and out."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError

from ..errors import StructPruneError, one_line
from ..registry import did_you_mean
from ..written import unversioned


T = TypeVar("T", bound=type)
Item = TypeVar("Item")
Self = TypeVar("Self", bound="Serialisable")
# `strict` would refuse 1 where 1.0 is meant; to a type checker an int is a float already.
if TYPE_CHECKING:
    Number = float
else:
    Number = float | int
LARGEST = sys.float_info.max  # no NaN, no infinity and no integer of hundreds of digits is at most this


def _range(allowed: Callable[[float], bool], what: str) -> Callable[[Any], None]:
    """A validator that passes finite numbers in a range, and whatever is no number: `strict` checks types."""

    def validate(value: Any) -> None:
        if isinstance(value, (int, float)) and not (abs(value) <= LARGEST and allowed(value)):
            raise ValueError(what.format(value))

    return validate


positive = _range(lambda value: value > 0, "has to be greater than 0, got {}")
seed_of_all = _range(lambda value: 0 <= value < 2**32, "has to lie between 0 and 4294967295, got {}")
share = _range(lambda value: 0 < value < 1, "has to lie between 0 and 1 (both excluded), got {}; 0.2 is a fifth")
proportion = _range(lambda value: 0 <= value <= 1, "has to lie between 0 and 1, got {}")
below_one = _range(lambda value: 0 <= value < 1, "has to lie between 0 and 1 (excluded), got {}")


def filled(value: Any) -> None:
    """Refuse an empty value; None passes."""
    if value is not None and not value:
        raise ValueError(f"has to name at least one, got {value!r}")


class Serialisable:
    """`to_dict` and `from_dict` with strict keys.

    Attributes:
        gone: Fields that saved configs may hold, each with the only value that is left of it.
        moved: Fields that saved configs may hold, and that another config has now.
        parts: Fields that hold other configs, each with a function of their plain values and of the owner's name.
    """

    gone: ClassVar[Mapping[str, Any]] = {}
    moved: ClassVar[Collection[str]] = ()
    parts: ClassVar[Mapping[str, Callable[[Any, str], Any]]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """Read the plain values that `to_dict` gives; those of earlier versions too, see `gone` and `moved`."""
        if not isinstance(data, Mapping):
            raise StructPruneError(f"{cls.__name__} takes a mapping of fields, got {type(data).__name__}.")
        values = {str(name): value for name, value in unversioned(data).items() if name not in cls.moved}
        for name, left in cls.gone.items():
            if (value := values.pop(name, left)) != left:
                raise StructPruneError(f"{cls.__name__}: {name!r} is gone, only {left!r} is left, got {value!r}.")
        for name, read in cls.parts.items():
            if isinstance(values.get(name), (list, Mapping)):
                values[name] = read(values[name], cls.__name__)
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.to_dict() if isinstance(value, Serialisable) else value


def by_layer(values: Mapping[Any, Item], owner: str) -> dict[int, Item]:
    """A mapping by numbers of layers, of which JSON makes strings; each layer has to be there once."""
    numbers = [int(key) for key in values if re.fullmatch("-?[0-9]{1,9}", str(key))]
    if len({*numbers}) < len(values):
        raise StructPruneError(f"{owner} names layers by their numbers, each once, got {list(values)}.")
    return dict(zip(numbers, values.values(), strict=True))


class FieldError(StructPruneError):
    """A value that a field does not take, with the name of the config's class, the field and the reason."""

    def __init__(self, owner: str, field: str, reason: str):
        super().__init__(f"{owner}: {field!r} {reason}")
        self.owner, self.field, self.reason = owner, field, reason


def config_class(cls: T) -> T:
    """A class decorator for configs, by which every mistake in the constructor is a `StructPruneError`."""
    init: Any = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        _check_names(cls, values)
        try:
            init(self, *args, **values)
        except StrictDataclassFieldValidationError as error:
            field = str(error).split("'")[1]  # which only the message says
            reason = one_line(error.__cause__).removeprefix(f"Field {field!r} ").partition(". Errors: ")[0]
            reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.|optimum_structprune\.[\w.]+\.", r"\1", reason)
            reason = re.sub(
                r"with value (.{,80}).* doesn't match any type in \((.*?)(, NoneType)?\)$", r"takes \2; got \1", reason
            )
            raise FieldError(cls.__name__, field, reason) from error
        except (StrictDataclassError, TypeError) as error:
            raise StructPruneError(f"{cls.__name__}: {one_line(error.__cause__ or error)}") from error
        for name, value in vars(self).items():  # as of a file whose name is not UTF-8: no card could name it
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise FieldError(cls.__name__, name, f"holds half a character, got {value!r}; rename it in UTF-8")

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _check_names(cls: Any, values: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise StructPruneError(f"{cls.__name__} has no field {key!r}.{did_you_mean(key, known)}")


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of another library from values by field."""
    _check_names(cls, values)
    try:
        return cls(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise StructPruneError(f"{cls.__name__}: {one_line(error)}") from error


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file."""
    return read_mapping(Path(path), parse_yaml)


def read_json(path: str | Path) -> Mapping[str, Any]:
    """The fields in a JSON file, without the version of its form; a version that is not known is refused."""
    values = read_mapping(Path(path), json.loads)
    try:
        return unversioned(values)
    except StructPruneError as error:
        raise StructPruneError(f"{path}: {error}") from error


def read_mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """The mapping in a file that `parse` reads."""
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StructPruneError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, Mapping):
        raise StructPruneError(f"{path} has to hold a mapping of fields, found {type(data).__name__}.")
    return data


MAX_YAML = 2**18  # characters of a document


class Loader(yaml.SafeLoader):
    """The safe loader of YAML, with the numbers of YAML 1.2, see `NUMBERS`; a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class LoaderWithoutAliases(Loader):
    """The loader of documents of others, in which a short text with aliases may be endless."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """See `Composer.compose_node`."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name); write the value out")
        return super().compose_node(parent, index)


# The numbers of YAML 1.2. To PyYAML, which reads 1.1, 0100 is 64, 1:30 is 90 and 1e-4 is text.
NUMBERS = {
    "tag:yaml.org,2002:int": r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "tag:yaml.org,2002:float": r"([-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|"
    r"\.(nan|NaN|NAN))$",
}
for tag, pattern in NUMBERS.items():
    Loader.add_implicit_resolver(tag, re.compile(pattern), None)
Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))
)


def parse_yaml(text: str, aliases: bool = False) -> Any:
    """The value of a YAML document; aliases, by which a short text may be endless, have to be allowed."""
    if len(text) > MAX_YAML:
        raise ValueError(f"it has {len(text):,} characters, and {MAX_YAML:,} are the most")
    try:
        return yaml.load(text, Loader if aliases else LoaderWithoutAliases)  # both are safe
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (TypeError, LookupError, AttributeError) as error:  # of a tag that does not fit its value
        raise ValueError(f"a value is not what its tag says ({error})") from error
