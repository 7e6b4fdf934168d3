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

from ..config.domains import BUILTIN, GENERAL, IN_MEMORY, PRESET, WRITTEN, DomainConfig, written_by_model
from ..config.fields import read_yaml
from ..system.errors import StructPruneError, one_line
from ..system.registry import did_you_mean
from .templates import Row, rendered, string


if TYPE_CHECKING:
    from datasets import Dataset  # importing it takes a second, and only data sets need it
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# The sizes of the buffers that shuffle streams.
HUB_BUFFER_ROWS = 10_000
LOCAL_BUFFER_TEXTS = 100_000
# The number of rows of a file that share their columns. A column that a row lacks is empty in that row.
WINDOW_ROWS = 1_000
# The maximum number of characters of a CSV field. The default of `csv` is 131,072.
MAX_CSV_FIELD = 2**31 - 1

# The folder of built-in texts, and the line between two documents in its files.
TEXTS = Path(__file__).with_name("texts")
SEPARATOR = "\n%\n"
# The number of characters in a part of built-in text, if several kinds alternate.
PART_CHARACTERS = 800
# The number of characters in a section of a long text.
SECTION_CHARACTERS = 4_000
# A text with more characters is cut into sections, because tokenizing it whole takes seconds.
LONG_TEXT = 100_000

T = TypeVar("T")
Render = Callable[[Row], str]
# A function that generates text with a seed.
Write = Callable[[int], Iterator[str]] | None


def documents(
    domain: DomainConfig, seed: int | None, tokenizer: PreTrainedTokenizerBase | None = None, write: Write = None
) -> Iterator[str]:
    """Return the documents of a domain in an order that depends on the seed. Blank documents are skipped.

    This function checks the source. The text is read with the first document.

    Args:
        domain: The domain, without presets.
        seed: The seed of the order. None keeps the order of the source.
        tokenizer: The tokenizer whose chat template a domain with `template="chat"` uses.
        write: A function that generates text with a seed, for the source `self:any`.

    Raises:
        StructPruneError: If the source cannot be read.
    """
    texts = _texts(domain, seed, lambda row: rendered(row, domain, tokenizer), write)
    return _readable(texts)


def _readable(texts: Iterator[str]) -> Iterator[str]:
    """Yield texts that are not blank. Lone surrogates are replaced, because no tokenizer accepts them."""
    for text in _cut_long(texts):
        if text.strip():
            yield text.encode(errors="replace").decode()


def check_source(domain: DomainConfig) -> None:
    """Raise if a source does not exist or is empty. No text is read."""
    source = domain.source
    if not isinstance(source, str) or source.startswith(IN_MEMORY) or written_by_model(domain):
        return
    if source.startswith(BUILTIN):
        builtin_kinds(source.removeprefix(BUILTIN))
        return
    if _is_saved_dataset(domain):
        return

    files = _files(domain)
    if files and not any(os.path.getsize(file) for file in files):
        raise StructPruneError(f"The domain {domain.name!r} is empty: {source} does not contain any text.")


def endless(domain: DomainConfig) -> bool:
    """Return whether a domain may be infinite: the model generates it, or it is streamed from the Hub."""
    source = domain.source
    if not isinstance(source, str) or source.startswith(BUILTIN):
        return False
    return not _is_saved_dataset(domain) and not _files(domain)


def _texts(domain: DomainConfig, seed: int | None, render: Render, write: Write) -> Iterator[str]:
    """Return the texts of a domain; see `documents`."""
    source = domain.source
    if not isinstance(source, str):
        return _from_memory(domain, seed, render)
    if source.startswith(IN_MEMORY):
        raise StructPruneError(
            f"The domain {domain.name!r} was read from a {source.removeprefix(IN_MEMORY)} in memory, which a saved "
            f"config does not contain. Set its source again."
        )

    if source.startswith(BUILTIN):
        return builtin_documents(source.removeprefix(BUILTIN), seed or 0)
    if written_by_model(domain):
        if write is None:
            raise StructPruneError(
                f"The domain {domain.name!r} is text that the model generates, and this command does not generate "
                "text. Use another source."
            )
        return write(seed or 0)

    if _is_saved_dataset(domain):
        return map(render, _guarded(domain, source, _saved_rows, domain, seed))

    files = _files(domain)
    if files:
        texts = _from_files(domain, _reordered(files, seed), render)
        return _shuffled(_cut_long(texts), seed)

    name = f"{source!r} is not a local file or folder, and as a dataset of the Hub it"
    return map(render, _guarded(domain, name, _hub_rows, domain, seed))


def _from_memory(domain: DomainConfig, seed: int | None, render: Render) -> Iterator[str]:
    """Return the texts of a source that is an object in memory."""
    source = domain.source

    # A program that passes a data set has imported the module.
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.Dataset):
        return map(render, _rows(source, seed))
    if datasets is not None and isinstance(source, datasets.IterableDataset):
        return map(render, _buffered(source, seed))
    return _shuffled(_cut_long(_items(domain, render)), seed)


def _rows(dataset: Dataset, seed: int | None) -> Iterator[Row]:
    """Yield the rows of a data set in a seeded order."""
    return (dataset[index] for index in _reordered(range(len(dataset)), seed))


def _is_saved_dataset(domain: DomainConfig) -> bool:
    """Return whether the source is a folder that `save_to_disk` wrote."""
    folder = Path(os.path.expanduser(domain.source))
    return os.path.isfile(folder / "state.json") or os.path.isfile(folder / "dataset_dict.json")


def _saved_rows(domain: DomainConfig, seed: int | None) -> Iterator[Row]:
    """Yield the rows of a data set that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(os.path.expanduser(domain.source))
    if not isinstance(dataset, DatasetDict):
        return _rows(dataset, seed)

    if domain.split not in dataset:
        raise StructPruneError(
            f"The domain {domain.name!r}: {domain.source} has no split {domain.split!r}. It has {', '.join(dataset)}."
        )
    return _rows(dataset[domain.split], seed)


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
        return _readable_files(domain, candidates, f"the folder {path}")

    if domain.source.startswith("self:"):
        raise StructPruneError(f"The domain {domain.name!r}: a model generates {WRITTEN} only, got {domain.source}.")
    if "://" in domain.source:
        raise StructPruneError(f"The domain {domain.name!r}: {domain.source} is an address. Download it first.")

    if has_magic(domain.source):
        candidates = [Path(file) for file in glob(str(path), recursive=True)]
        return _readable_files(domain, candidates, f"the pattern {domain.source!r}")

    if domain.source.startswith((".", "/", "~")) or path.suffix.lower() in FORMATS:
        message = f"The domain {domain.name!r}: the file or folder {path} does not exist.{_nearest_name(path)}"
        if not path.is_absolute():
            # The config of a pruning keeps the path as it was passed.
            message += f" A relative path starts at {Path.cwd()}. Pass the domain with its path from there."
        raise StructPruneError(message)
    return []


def _readable_files(domain: DomainConfig, candidates: list[Path], name: str) -> list[Path]:
    """Return the files with a supported format, sorted. Raise if there are none."""
    files = sorted(file for file in candidates if file.is_file() and file.suffix.lower() in FORMATS)
    if not files:
        raise StructPruneError(
            f"The domain {domain.name!r}: {name} contains no file of the kinds {', '.join(FORMATS)}."
        )
    return files


def _nearest_name(path: Path) -> str:
    """Return a suggestion of the file with the most similar name, or an empty text."""
    names = []
    if os.path.isdir(path.parent):
        names = os.listdir(path.parent)

    matches = get_close_matches(path.name, names, n=1)
    if not matches:
        return ""
    return f" Did you mean {str(path.with_name(matches[0]))!r}?"


def _from_files(domain: DomainConfig, files: list[Path], render: Render) -> Iterator[str]:
    """Yield the texts of files, sorted by their format. Empty files are skipped."""
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
    """Yield the sections of a text file."""
    return sections(path.read_text(encoding="utf-8-sig"))


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, or of one JSON list.

    `datasets` is not used here, because it would convert texts that look like dates or numbers.
    """
    with open(path, encoding="utf-8-sig") as file:
        character = file.read(1)
        while character.isspace():
            character = file.read(1)
        file.seek(0)

        if character == "[":
            items = _parse_json(file.read(), "it")
            for number, item in enumerate(items, start=1):
                yield _checked_object(item, f"item {number}")
            return

        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _checked_object(_parse_json(line, f"line {number}"), f"line {number}")


def _parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text. Raise `StructPruneError` if it is not valid."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise StructPruneError(f"{where} is not JSON: {error}") from error


def _checked_object(value: Any, where: str) -> Row:
    """Return a JSON value. Raise `StructPruneError` if it is not an object."""
    if isinstance(value, dict):
        return value

    example = '{"text": "…"}'
    raise StructPruneError(f"{where} must be an object, such as {example}, got {value!r:.60}")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        for row in _with_long_fields(reader):
            # The key "" holds fields without a header.
            if "" in row and "" not in (reader.fieldnames or ()):
                raise StructPruneError(f"line {reader.line_num} has more fields than the header")
            yield row


def _with_long_fields(reader: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows of a CSV reader, and allow fields of any length only while a row is read.

    The limit of the `csv` module is one value for the whole program.
    """
    while True:
        limit = csv.field_size_limit(MAX_CSV_FIELD)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(limit)

        if row is None:
            return
        yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=WINDOW_ROWS):
            yield from batch.to_pylist()


def _with_same_columns(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows with the columns of all rows in the same window. A missing value is None."""
    window = list(islice(rows, WINDOW_ROWS))
    while window:
        columns: dict[str, None] = {}
        for row in window:
            columns.update(dict.fromkeys(row))

        for row in window:
            complete_row: dict[str, Any] = dict(columns)
            complete_row.update(row)
            yield complete_row

        window = list(islice(rows, WINDOW_ROWS))


def _hub_rows(domain: DomainConfig, seed: int | None) -> Iterable[Row]:
    """Return the rows of a data set that is streamed from the Hub."""
    from datasets import load_dataset

    dataset = load_dataset(
        domain.source, domain.dataset_config, split=domain.split, revision=domain.revision, streaming=True
    )
    return _buffered(dataset, seed)


def _buffered(rows: Any, seed: int | None) -> Iterable[Row]:
    """Shuffle the rows of a streamed data set with a buffer."""
    if seed is None:
        return rows
    return rows.shuffle(seed=seed, buffer_size=HUB_BUFFER_ROWS)


def _guarded(domain: DomainConfig, name: str, reader: Callable[..., Iterable[T]], *arguments: Any) -> Iterator[T]:
    """Yield the values of a reader. Its errors become `StructPruneError`s that name the domain.

    Parsers and HTTP clients raise errors of many classes, and `datasets` raises `StopIteration` for a file without
    rows.
    """
    try:
        yield from reader(*arguments)
    except StopIteration:
        return
    except StructPruneError as error:
        if str(error).startswith("The domain"):
            raise
        raise StructPruneError(f"The domain {domain.name!r}: {name} cannot be read: {error}.") from error
    except Exception as error:
        reason = one_line(error) or type(error).__name__

        if isinstance(error, UnicodeDecodeError):
            reason += "; save it as UTF-8"
        raise StructPruneError(f"The domain {domain.name!r}: {name} cannot be read: {reason}") from error


def _items(domain: DomainConfig, render: Render) -> Iterator[str]:
    """Yield the texts of an iterable in memory."""
    for number, item in enumerate(domain.source):
        if domain.template is not None and isinstance(item, Mapping):
            yield render(item)
        else:
            yield string(item, domain, f"item {number}")


def _cut_long(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts, and cut texts of more than `LONG_TEXT` characters into sections."""
    for text in texts:
        if len(text) > LONG_TEXT:
            yield from sections(text)
        else:
            yield text


def _reordered(items: Iterable[T], seed: int | None) -> list[T]:
    """Return items in a seeded order."""
    order = list(items)
    if seed is not None:
        Random(seed).shuffle(order)
    return order


def _shuffled(texts: Iterable[str], seed: int | None) -> Iterator[str]:
    """Yield texts in a seeded order. If the buffer cannot hold all texts, they are shuffled locally."""
    stream = iter(texts)
    if seed is None:
        yield from stream
        return

    rng = Random(seed)
    buffer = list(islice(stream, LOCAL_BUFFER_TEXTS))
    for text in stream:
        index = rng.randrange(LOCAL_BUFFER_TEXTS)
        yield buffer[index]
        buffer[index] = text

    rng.shuffle(buffer)
    yield from buffer


def builtin_documents(name: str, seed: int = 0) -> Iterator[str]:
    """Yield the documents of built-in text in a seeded order. Several kinds alternate by the number of characters."""
    kinds = builtin_kinds(name)
    if len(kinds) == 1:
        return _sections_of_kind(kinds[0], Random(seed))

    Random(seed).shuffle(kinds)
    return _alternating([_parts_of_kind(kind, seed) for kind in kinds])


def builtin_kinds(name: str) -> list[str]:
    """Return the kinds of text in a name of built-in text: `a+b`, or `general-a` for all kinds except `a`."""
    available = sorted(path.name.partition(".")[0] for path in TEXTS.glob("*.txt*"))
    parts = name.split("-")
    is_general = parts[0] == GENERAL
    kinds = name.split("+")
    if is_general:
        kinds = parts[1:]

    for kind in kinds:
        if kind not in available:
            suggestion = did_you_mean(kind, available + [GENERAL])
            raise StructPruneError(f"The built-in text {kind!r} does not exist.{suggestion}")

    if is_general:
        return [kind for kind in available if kind not in kinds]
    return kinds


def read_kind(kind: str) -> list[str]:
    """Return the documents of one kind of built-in text, in the order of its file."""
    path = TEXTS / f"{kind}.txt"
    if path.exists():
        text = path.read_bytes()
    else:
        text = gzip.decompress(path.with_suffix(".txt.gz").read_bytes())
    return text.decode().strip("\n").split(SEPARATOR)


def _parts_of_kind(kind: str, seed: int) -> Iterator[str]:
    """Yield the sections of a kind of text in parts of `PART_CHARACTERS`."""
    for text in _sections_of_kind(kind, Random(seed)):
        yield from sections(text, PART_CHARACTERS)


def _sections_of_kind(kind: str, rng: Random) -> Iterator[str]:
    """Yield one section of each document, then the next section of each, so that a small sample has many documents."""
    documents = read_kind(kind)
    rng.shuffle(documents)

    queue = deque(map(sections, documents))
    while queue:
        stream = queue.popleft()
        section = next(stream, None)
        if section is not None:
            queue.append(stream)
            yield section


def sections(text: str, size: int = SECTION_CHARACTERS) -> Iterator[str]:
    """Yield parts of a long text with `size / 2` to `size` characters. The last part has up to `2 * size`.

    A text is cut at a blank line, or else at the end of a line, or else at a space.
    """
    start = 0
    while len(text) - start > 2 * size:
        cut = start + size
        for mark in ("\n\n", "\n", " "):
            position = text.rfind(mark, start + size // 2, start + size)
            if position > 0:
                cut = position
                break

        yield text[start:cut].strip("\n")
        start = cut

    yield text[start:].strip("\n")


def _alternating(streams: list[Iterator[str]]) -> Iterator[str]:
    """Yield parts of streams, always the next part of the stream with the fewest characters so far."""
    heap = [(0, index, stream) for index, stream in enumerate(streams)]
    while heap:
        num_characters, index, stream = heappop(heap)
        part = next(stream, None)
        if part is not None:
            heappush(heap, (num_characters + len(part), index, stream))
            yield part


def resolve(domains: Iterable[DomainConfig]) -> list[DomainConfig]:
    """Replace presets by their domains. Fields that a domain sets override the fields of the preset."""
    resolved: list[DomainConfig] = []
    for domain in domains:
        resolved += _resolved(domain)

    names = [domain.name for domain in resolved]
    for name in names:
        if names.count(name) > 1:
            raise StructPruneError(f"Two domains are named {name!r} once the presets are resolved. Rename one.")
    return resolved


def presets(file: str = "") -> dict[str, Mapping[str, Any]]:
    """Return all presets by name. The presets of a file override built-in presets.

    A preset has the fields of a domain, or a `mix` of other presets.
    """
    table = dict(read_yaml(Path(__file__).with_name("presets.yaml")))
    if file:
        table.update(read_yaml(file))

    for name, entry in table.items():
        if not isinstance(entry, Mapping) or ("mix" in entry) == ("source" in entry):
            raise StructPruneError(f"The preset {name!r} needs a source, or a mix of other presets, got {entry!r}.")
    return table


def _resolved(domain: DomainConfig) -> list[DomainConfig]:
    """Return the domains of a preset, or the domain itself if its source is not a preset."""
    if not isinstance(domain.source, str) or not domain.source.startswith(PRESET):
        return [domain]

    file, _, name = domain.source.removeprefix(PRESET).rpartition("#")
    table = presets(file)
    entry = _entry(name, table)
    if "mix" not in entry:
        return [_from_preset(domain, entry)]

    part_entries = {part: _entry(part, table) for part in entry["mix"]}
    domains = []
    for part, part_entry in part_entries.items():
        if "mix" in part_entry:
            raise StructPruneError(f"The preset {domain.source!r} mixes {part!r}, which is a mix itself.")

        part_domain = replace(domain, name=f"{domain.name}-{part}", weight=domain.weight / len(part_entries))
        domains.append(_from_preset(part_domain, part_entry))

    return domains


def _entry(name: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the preset of a name."""
    if name not in table:
        raise StructPruneError(f"The preset {name!r} does not exist.{did_you_mean(name, table)}")
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
