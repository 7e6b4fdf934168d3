"""Where a domain's documents come from: files, folders, the Hub, built-in text, or an object in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from glob import escape, glob
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from ..errors import StructPruneError
from ..registry import did_you_mean
from ..schema import IN_MEMORY, DomainConfig
from .builtin import builtin_documents, sections


BUILTIN = "builtin:"
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_BUFFER = 10_000
LOCAL_BUFFER = 100_000
Row = Mapping[str, Any]
T = TypeVar("T")


def documents(domain: DomainConfig, seed: int | None) -> Iterator[str]:
    """The texts of a domain in an order that the seed chooses, without the blank ones.

    Args:
        domain: Names the source; a relative path is looked for on the disk before the Hub.
        seed: Of the order. Local and in-memory text is shuffled as a whole up to 100 000 documents, beyond that and
            for a Hub stream through a buffer. None leaves the source's own order.

    Raises:
        StructPruneError: If the source is not there, cannot be read, or does not give strings.
    """
    return (text for text in _texts(domain, seed) if text.strip())


def endless(domain: DomainConfig) -> bool:
    """Whether reading a domain to its end may take forever: built-in text, and what streams from the Hub."""
    source = domain.source
    return isinstance(source, str) and (source.startswith(BUILTIN) or not _files(domain))


def _texts(domain: DomainConfig, seed: int | None) -> Iterator[str]:
    source = domain.source
    if not isinstance(source, str):
        return _from_memory(domain, seed)
    if source.startswith(IN_MEMORY):
        raise StructPruneError(
            f"The domain {domain.name!r} was read from a {source.removeprefix(IN_MEMORY)} in memory, which a saved "
            f"config does not hold; set its source again."
        )
    if source.startswith(BUILTIN):
        return builtin_documents(source.removeprefix(BUILTIN), seed or 0)
    if files := _files(domain):
        return _shuffled(_from_files(files, domain, seed), seed)
    return _from_hub(domain, seed)


def _from_memory(domain: DomainConfig, seed: int | None) -> Iterator[str]:
    # An object of the `datasets` library can only exist where that library has been imported.
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(domain.source, datasets.Dataset):
        order = _reordered(range(len(domain.source)), seed)
        return _column((domain.source[i] for i in order), domain)
    if datasets is not None and isinstance(domain.source, datasets.IterableDataset):
        return _column(_reshuffled(domain.source, seed), domain)
    return _shuffled(_strings(domain.source, domain), seed)


def _files(domain: DomainConfig) -> list[Path]:
    path = Path(os.path.expanduser(domain.source))
    if os.path.isfile(path):
        if path.suffix.lower() not in READERS:
            raise StructPruneError(
                f"The domain {domain.name!r}: files like {path} are not read.{did_you_mean(path.suffix, READERS)}"
            )
        return [path]
    if os.path.isdir(path):
        found, what = [*path.rglob("*")], f"the folder {path}"
    elif "*" in domain.source:
        found, what = [Path(name) for name in glob(str(path), recursive=True)], f"the pattern {domain.source!r}"
    elif domain.source.startswith((".", "/", "~")) or path.suffix.lower() in READERS:
        raise StructPruneError(f"The domain {domain.name!r}: there is no file or folder {path}.{_nearest(path)}")
    else:
        return []
    files = sorted(file for file in found if file.is_file() and file.suffix.lower() in READERS)
    if not files:
        raise StructPruneError(f"The domain {domain.name!r}: {what} gives no file of the kinds {', '.join(READERS)}.")
    return files


def _nearest(path: Path) -> str:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def _from_files(files: list[Path], domain: DomainConfig, seed: int | None) -> Iterator[str]:
    order = _reordered(files, seed)
    for kind in dict.fromkeys(READERS.values()):
        paths = [path for path in order if READERS[path.suffix.lower()] == kind]
        if kind == "text":
            for path in paths:
                yield from _guarded(domain, str(path), _read_text, path)
        elif paths:
            what = str(paths[0]) if len(paths) == 1 else f"one of {len(paths)} {kind} files"
            yield from _column(_guarded(domain, what, _stream, kind, paths), domain)


def _read_text(path: Path) -> Iterator[str]:
    return sections(path.read_text(encoding="utf-8"))


def _stream(kind: str, paths: list[Path]) -> Iterable[Row]:
    from datasets import load_dataset

    return load_dataset(kind, data_files=[escape(str(path)) for path in paths], split="train", streaming=True)


def _from_hub(domain: DomainConfig, seed: int | None) -> Iterator[str]:
    what = f"{domain.source!r} is no local file or folder, and as a dataset of the Hub it"
    return _column(_guarded(domain, what, _hub_stream, domain, seed), domain)


def _hub_stream(domain: DomainConfig, seed: int | None) -> Iterable[Row]:
    from datasets import load_dataset

    stream = load_dataset(domain.source, domain.dataset_config, split=domain.split, streaming=True)
    return _reshuffled(stream, seed)


def _reshuffled(stream: Any, seed: int | None) -> Iterable[Row]:
    return stream if seed is None else stream.shuffle(seed=seed, buffer_size=HUB_BUFFER)


def _reordered(items: Iterable[T], seed: int | None) -> list[T]:
    order = list(items)
    if seed is not None:
        Random(seed).shuffle(order)
    return order


def _guarded(domain: DomainConfig, what: str, read: Callable[..., Iterable[T]], *arguments) -> Iterator[T]:
    try:
        yield from read(*arguments)
    except StopIteration:  # what `datasets` makes of a file without rows
        return
    except Exception as error:  # a reader passes on whatever its parser or its HTTP client raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StructPruneError(f"The domain {domain.name!r}: {what} cannot be read: {reason}") from error


def _column(rows: Iterable[Row], domain: DomainConfig) -> Iterator[str]:
    for row in rows:
        if domain.text_column not in row:
            raise StructPruneError(
                f"The domain {domain.name!r} has no column {domain.text_column!r}; set text_column."
                f"{did_you_mean(domain.text_column, row)}"
            )
        text = row[domain.text_column]
        yield "" if text is None else _string(text, domain, f"the column {domain.text_column!r}")


def _strings(items: Iterable[Any], domain: DomainConfig) -> Iterator[str]:
    return (_string(item, domain, f"item {i}") for i, item in enumerate(items))


def _string(value: Any, domain: DomainConfig, where: str) -> str:
    if not isinstance(value, str):
        raise StructPruneError(
            f"The domain {domain.name!r} has to give strings; {where} holds the {type(value).__name__} "
            f"{str(value):.60}."
        )
    return value


def _shuffled(texts: Iterable[str], seed: int | None) -> Iterator[str]:
    # A full shuffle of what fits into the buffer; beyond that, memory stays bounded at the price of some order.
    if seed is None:
        yield from texts
        return
    rng = Random(seed)
    held: list[str] = []
    for text in texts:
        if len(held) < LOCAL_BUFFER:
            held.append(text)
            continue
        place = rng.randrange(LOCAL_BUFFER)
        yield held[place]
        held[place] = text
    rng.shuffle(held)
    yield from held
