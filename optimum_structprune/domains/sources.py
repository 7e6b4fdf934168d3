"""Read the documents of a domain from files, the Hub, memory or built-in text, and resolve presets."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from glob import glob, has_magic
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.domains import BUILTIN, GENERAL, IN_MEMORY, PRESET, SELF, DomainConfig
from ..config.fields import read_yaml
from ..errors import StructPruneError, one_line
from ..registry import did_you_mean
from .templates import Row, rendered, string


if TYPE_CHECKING:
    from datasets import Dataset  # importing it takes a second, which only data sets need
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_BUFFER_ROWS = 10_000
LOCAL_BUFFER_TEXTS = 100_000
WINDOW_ROWS = 1_000  # rows of a file that share their columns; a column that a row lacks is empty there
TEXTS = Path(__file__).with_name("texts")
BETWEEN = "\n%\n"  # the line between two documents in a file of built-in texts
PART_CHARACTERS = 800  # size of the parts in which kinds of built-in text take turns
SECTION_CHARACTERS = 4_000  # size of the sections that long texts are cut into
LONG_TEXT = 100_000  # characters; a row with more is cut into sections, since tokenizing it whole takes seconds
MAX_CSV_FIELD = 2**31 - 1  # characters; the default of `csv` is 131,072
T = TypeVar("T")
Render = Callable[[Row], str]
Write = Callable[[str, int], Iterator[str]] | None  # generates text of a kind with a seed


def documents(
    domain: DomainConfig, seed: int | None, tokenizer: PreTrainedTokenizerBase | None = None, write: Write = None
) -> Iterator[str]:
    """Return the documents of a domain that are not blank, in an order that depends on the seed.

    A wrong source raises here. The text is read with the first document.

    Args:
        domain: The domain, without presets.
        seed: The seed of the order; None keeps the order of the source.
        tokenizer: The tokenizer whose chat template a domain with `template="chat"` uses.
        write: A function that generates text of a kind with a seed, for sources such as `self:code`.

    Raises:
        StructPruneError: If the source cannot be read, or holds no text.
    """
    texts = _texts(domain, seed, lambda row: rendered(row, domain, tokenizer), write)
    return _readable(texts)


def _readable(texts: Iterator[str]) -> Iterator[str]:
    """Yield texts that are not blank, without halves of surrogate pairs, which no tokenizer reads."""
    for text in _cut_long(texts):
        if text.strip():
            yield text.encode(errors="replace").decode()


def check_source(domain: DomainConfig) -> None:
    """Raise if a source has no text that could be read. Nothing is read yet."""
    source = domain.source
    if not isinstance(source, str) or source.startswith((IN_MEMORY, SELF)):
        return
    if source.startswith(BUILTIN):
        builtin_kinds(source.removeprefix(BUILTIN))
        return
    if _is_saved_dataset(domain):
        return
    files = _files(domain)
    if files and not any(os.path.getsize(file) for file in files):
        raise StructPruneError(f"The domain {domain.name!r} is empty: there is no text in {source}.")


def endless(domain: DomainConfig) -> bool:
    """Return whether a domain may have no end: the model generates it, or it is streamed from the Hub."""
    source = domain.source
    if not isinstance(source, str) or source.startswith(BUILTIN):
        return False
    return not _is_saved_dataset(domain) and not _files(domain)


def _texts(domain: DomainConfig, seed: int | None, render: Render, write: Write) -> Iterator[str]:
    source = domain.source
    if not isinstance(source, str):
        return _from_memory(domain, seed, render)
    if source.startswith(IN_MEMORY):
        raise StructPruneError(
            f"The domain {domain.name!r} was read from a {source.removeprefix(IN_MEMORY)} in memory, which a saved "
            f"config does not hold; set its source again."
        )
    if source.startswith(BUILTIN):
        return builtin_documents(source.removeprefix(BUILTIN), seed or 0)
    if source.startswith(SELF):
        if write is None:
            raise StructPruneError(f"The domain {domain.name!r} is the model's own text, and none writes here.")
        return write(source.removeprefix(SELF), seed or 0)
    if _is_saved_dataset(domain):
        return map(render, _guarded(domain, source, _saved_rows, domain, seed))

    files = _files(domain)
    if files:
        texts = _from_files(domain, _reordered(files, seed), render)
        return _shuffled(_cut_long(texts), seed)
    name = f"{source!r} is no local file or folder, and as a dataset of the Hub it"
    return map(render, _guarded(domain, name, _hub_rows, domain, seed))


def _from_memory(domain: DomainConfig, seed: int | None, render: Render) -> Iterator[str]:
    source = domain.source
    datasets = sys.modules.get("datasets")  # without this module, no source is an object of it
    if datasets is not None and isinstance(source, datasets.Dataset):
        return map(render, _rows(source, seed))
    if datasets is not None and isinstance(source, datasets.IterableDataset):
        return map(render, _buffered(source, seed))
    return _shuffled(_cut_long(_items(domain, render)), seed)


def _rows(dataset: Dataset, seed: int | None) -> Iterator[Row]:
    return (dataset[i] for i in _reordered(range(len(dataset)), seed))


def _is_saved_dataset(domain: DomainConfig) -> bool:
    """Return whether the source is a folder that `save_to_disk` wrote."""
    folder = Path(os.path.expanduser(domain.source))
    return os.path.isfile(folder / "state.json") or os.path.isfile(folder / "dataset_dict.json")


def _saved_rows(domain: DomainConfig, seed: int | None) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(os.path.expanduser(domain.source))
    if not isinstance(loaded, DatasetDict):
        return _rows(loaded, seed)
    if domain.split not in loaded:
        raise StructPruneError(
            f"The domain {domain.name!r}: {domain.source} has no split {domain.split!r}; it has {', '.join(loaded)}."
        )
    return _rows(loaded[domain.split], seed)


def _files(domain: DomainConfig) -> list[Path]:
    """Return the files of a source, or an empty list if it may be a dataset of the Hub."""
    path = Path(os.path.expanduser(domain.source))
    if os.path.isfile(path):
        if path.suffix.lower() not in FORMATS:
            raise StructPruneError(
                f"The domain {domain.name!r}: files like {path} are not read.{did_you_mean(path.suffix, FORMATS)}"
            )
        return [path]
    if os.path.isdir(path):
        # Hidden files and folders are copies and caches of tools, such as `.ipynb_checkpoints`.
        candidates = [file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path)}"]
        name = f"the folder {path}"
    elif os.path.lexists(path):
        raise StructPruneError(
            f"The domain {domain.name!r}: {path} leads to no regular file; write its text to one, such as text.jsonl."
        )
    elif "://" in domain.source:
        raise StructPruneError(f"The domain {domain.name!r}: {domain.source} is an address; download it first.")
    elif has_magic(domain.source):
        candidates = [Path(file) for file in glob(str(path), recursive=True)]
        name = f"the pattern {domain.source!r}"
    elif domain.source.startswith((".", "/", "~")) or path.suffix.lower() in FORMATS:
        raise StructPruneError(f"The domain {domain.name!r}: there is no file or folder {path}.{_nearest_name(path)}")
    else:
        return []

    files = sorted(file for file in candidates if file.is_file() and file.suffix.lower() in FORMATS)
    if not files:
        raise StructPruneError(f"The domain {domain.name!r}: {name} gives no file of the kinds {', '.join(FORMATS)}.")
    return files


def _nearest_name(path: Path) -> str:
    """Return a suggestion of the file whose name is nearest to a missing one."""
    names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    matches = get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.with_name(matches[0]))!r}?" if matches else ""


def _from_files(domain: DomainConfig, files: list[Path], render: Render) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        "json": _json_rows,
        "csv": _csv_rows,
        "parquet": _parquet_rows,
    }
    for kind in dict.fromkeys(FORMATS.values()):
        for path in files:
            if FORMATS[path.suffix.lower()] != kind or path.stat().st_size == 0:
                continue
            if kind == "text":
                yield from _guarded(domain, str(path), _text_sections, path)
            else:
                rows = _guarded(domain, str(path), readers[kind], path)
                yield from map(render, _with_same_columns(rows))


def _text_sections(path: Path) -> Iterator[str]:
    return sections(path.read_text(encoding="utf-8-sig"))


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, or of one JSON list.

    The texts are not converted, as `datasets` converts dates and numbers.
    """
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from _objects(_parse_json(file.read(), "it"), "item")
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield from _objects([_parse_json(line, f"line {number}")], "line", number)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise StructPruneError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise StructPruneError(f"{where} is not JSON: {error}") from error


def _objects(items: Iterable[Any], name: str, first: int = 1) -> Iterator[Row]:
    """Yield items that are JSON objects, and raise at any other."""
    for number, item in enumerate(items, start=first):
        if not isinstance(item, dict):
            example = '{"text": "…"}'
            raise StructPruneError(f"{name} {number} must be an object, such as {example}, got {item!r:.60}")
        yield item


def _csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header."""
    csv.field_size_limit(MAX_CSV_FIELD)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        for row in reader:
            if "" in row and "" not in (reader.fieldnames or ()):
                raise StructPruneError(f"line {reader.line_num} has more fields than the header")
            yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=WINDOW_ROWS):
            yield from batch.to_pylist()


def _with_same_columns(rows: Iterator[Row]) -> Iterator[Row]:
    """Add the columns that a row lacks but others around it have, with the value None."""
    while window := list(islice(rows, WINDOW_ROWS)):
        columns: dict[str, None] = {}
        for row in window:
            columns.update(dict.fromkeys(row))
        for row in window:
            yield {**columns, **row}


def _hub_rows(domain: DomainConfig, seed: int | None) -> Iterable[Row]:
    from datasets import load_dataset

    dataset = load_dataset(
        domain.source, domain.dataset_config, split=domain.split, revision=domain.revision, streaming=True
    )
    return _buffered(dataset, seed)


def _buffered(rows: Any, seed: int | None) -> Iterable[Row]:
    return rows if seed is None else rows.shuffle(seed=seed, buffer_size=HUB_BUFFER_ROWS)


def _guarded(domain: DomainConfig, name: str, read: Callable[..., Iterable[T]], *arguments: Any) -> Iterator[T]:
    """Yield what a reader yields, and name the domain in its errors."""
    try:
        yield from read(*arguments)
    except StopIteration:  # `datasets` raises it for a file without rows
        return
    except StructPruneError as error:
        if str(error).startswith("The domain"):
            raise
        raise StructPruneError(f"The domain {domain.name!r}: {name} cannot be read: {error}.") from error
    except Exception as error:  # parsers and HTTP clients raise errors of many classes
        reason = one_line(error) or type(error).__name__
        advice = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise StructPruneError(f"The domain {domain.name!r}: {name} cannot be read: {reason}{advice}") from error


def _items(domain: DomainConfig, render: Render) -> Iterator[str]:
    for number, item in enumerate(domain.source):
        if domain.template is not None and isinstance(item, Mapping):
            yield render(item)
        else:
            yield string(item, domain, f"item {number}")


def _cut_long(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts, and those of more than `LONG_TEXT` characters in sections."""
    for text in texts:
        if len(text) > LONG_TEXT:
            yield from sections(text)
        else:
            yield text


def _reordered(items: Iterable[T], seed: int | None) -> list[T]:
    order = list(items)
    if seed is not None:
        Random(seed).shuffle(order)
    return order


def _shuffled(texts: Iterable[str], seed: int | None) -> Iterator[str]:
    """Yield texts in a random order. With more texts than the buffer holds, a text stays near its place."""
    stream = iter(texts)
    if seed is None:
        yield from stream
        return
    rng = Random(seed)
    buffer = list(islice(stream, LOCAL_BUFFER_TEXTS))
    for text in stream:
        place = rng.randrange(LOCAL_BUFFER_TEXTS)
        yield buffer[place]
        buffer[place] = text
    rng.shuffle(buffer)
    yield from buffer


def builtin_documents(name: str, seed: int = 0) -> Iterator[str]:
    """Yield the documents of built-in text in a seeded order. Several kinds take turns by the number of characters."""
    names = builtin_kinds(name)
    if len(names) == 1:
        return _sections_of_kind(names[0], Random(seed))
    Random(seed).shuffle(names)
    return _in_turns([_parts_of_kind(kind, seed) for kind in names])


def builtin_kinds(name: str) -> list[str]:
    """Return the kinds of text that a name of built-in text stands for: `a+b`, or `general-a` for all but `a`."""
    available = sorted(path.name.partition(".")[0] for path in TEXTS.glob("*.txt*"))
    first, *excluded = name.split("-")
    named = excluded if first == GENERAL else name.split("+")
    for kind in named:
        if kind not in available:
            raise StructPruneError(f"There is no built-in text {kind!r}.{did_you_mean(kind, [*available, GENERAL])}")
    if first == GENERAL:
        return [kind for kind in available if kind not in excluded]
    return named


def read_kind(kind: str) -> list[str]:
    """Return the documents of one kind of built-in text, in the order of its file."""
    path = TEXTS / f"{kind}.txt"
    if path.exists():
        text = path.read_bytes()
    else:
        text = gzip.decompress(path.with_suffix(".txt.gz").read_bytes())
    return text.decode().strip("\n").split(BETWEEN)


def _parts_of_kind(kind: str, seed: int) -> Iterator[str]:
    for text in _sections_of_kind(kind, Random(seed)):
        yield from sections(text, PART_CHARACTERS)


def _sections_of_kind(kind: str, rng: Random) -> Iterator[str]:
    """Yield a section of each document, then the next ones, so that a small sample has many documents."""
    documents = read_kind(kind)
    rng.shuffle(documents)
    queue = deque(map(sections, documents))
    while queue:
        stream = queue.popleft()
        part = next(stream, None)
        if part is not None:
            queue.append(stream)
            yield part


def sections(text: str, size: int = SECTION_CHARACTERS) -> Iterator[str]:
    """Cut a long text into parts of `size / 2` to `size` characters, the last one up to `2 * size`.

    A text is cut at a blank line if there is one, otherwise at the end of a line, otherwise at a space.
    """
    start = 0
    while len(text) - start > 2 * size:
        cut = start + size
        for mark in ("\n\n", "\n", " "):
            place = text.rfind(mark, start + size // 2, start + size)
            if place > 0:
                cut = place
                break
        yield text[start:cut].strip("\n")
        start = cut
    yield text[start:].strip("\n")


def _in_turns(streams: list[Iterator[str]]) -> Iterator[str]:
    """Yield the next part of the stream that has had the fewest characters so far."""
    heap = [(0, number, stream) for number, stream in enumerate(streams)]
    while heap:
        characters, number, stream = heappop(heap)
        part = next(stream, None)
        if part is not None:
            heappush(heap, (characters + len(part), number, stream))
            yield part


def resolve(domains: Iterable[DomainConfig]) -> list[DomainConfig]:
    """Return domains with presets replaced by their domains. Fields that a domain sets override those of a preset."""
    resolved: list[DomainConfig] = []
    for domain in domains:
        resolved += _resolved(domain)
    names = [domain.name for domain in resolved]
    for name in names:
        if names.count(name) > 1:
            raise StructPruneError(f"Two domains are named {name!r} once the presets are resolved; rename one.")
    return resolved


def presets(file: str = "") -> dict[str, Mapping[str, Any]]:
    """Return all presets by name. Those of a file override the built-in ones.

    A preset has the fields of a domain, or a `mix` of other presets.
    """
    table = dict(read_yaml(Path(__file__).with_name("presets.yaml")))
    if file:
        table.update(read_yaml(file))
    for name, entry in table.items():
        if not isinstance(entry, Mapping) or ("mix" in entry) == ("source" in entry):
            raise StructPruneError(f"The preset {name!r} needs a source, or a mix of other presets; got {entry!r}.")
    return table


def _resolved(domain: DomainConfig) -> list[DomainConfig]:
    if not isinstance(domain.source, str) or not domain.source.startswith(PRESET):
        return [domain]
    file, _, name = domain.source.removeprefix(PRESET).rpartition("#")
    table = presets(file)
    entry = _entry(name, table)
    if "mix" not in entry:
        return [_from_preset(domain, entry)]

    parts = {part: _entry(part, table) for part in entry["mix"]}
    domains = []
    for part, fields_of_part in parts.items():
        if "mix" in fields_of_part:
            raise StructPruneError(f"The preset {domain.source!r} mixes {part!r}, itself a mix.")
        named = replace(domain, name=f"{domain.name}-{part}", weight=domain.weight / len(parts))
        domains.append(_from_preset(named, fields_of_part))
    return domains


def _entry(name: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if name not in table:
        raise StructPruneError(f"There is no preset {name!r}.{did_you_mean(name, table)}")
    return table[name]


def _from_preset(domain: DomainConfig, entry: Mapping[str, Any]) -> DomainConfig:
    """Return the domain of a preset, with the fields that the user has set."""
    values = {name: value for name, value in entry.items() if name != "licence"}
    for field in fields(DomainConfig):
        value = getattr(domain, field.name)
        if value != field.default:
            values[field.name] = value
    values["weight"] = domain.weight
    values["source"] = entry["source"]
    return DomainConfig.from_dict(values)
