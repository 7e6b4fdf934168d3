"""Resolves presets, and reads the documents of a domain from files, the Hub, memory or built-in text."""

from __future__ import annotations

import gzip
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from glob import escape, glob, has_magic
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.domains import BUILTIN, GENERAL, IN_MEMORY, PRESET, SELF, DomainConfig
from ..config.fields import read_yaml
from ..errors import StructPruneError, one_line
from ..registry import did_you_mean
from .templates import Row, rendered, string


if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, which only data sets are worth
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_BUFFER_ROWS = 10_000
LOCAL_BUFFER_TEXTS = 100_000
TEXTS = Path(__file__).with_name("texts")
BETWEEN = "\n%\n"  # the line between two documents in a file of built-in texts
PART_CHARACTERS = 800  # characters of the parts by which kinds of text take turns
SECTION_CHARACTERS = 4_000  # characters of the parts that long texts are cut into
T = TypeVar("T")
Render = Callable[[Row], str]
Write = Callable[[str, int], Iterator[str]] | None  # a model that writes text of a kind by a seed


def documents(
    domain: DomainConfig, seed: int | None, tokenizer: PreTrainedTokenizerBase | None = None, write: Write = None
) -> Iterator[str]:
    """Gives the texts of a domain in an order that the seed chooses, without the blank ones."""
    texts = _texts(domain, seed, lambda row: rendered(row, domain, tokenizer), write)
    # Half a character, which no tokenizer reads, becomes a question mark.
    return (text.encode(errors="replace").decode() for text in texts if text.strip())


def check_source(domain: DomainConfig) -> None:
    """Refuse a source by which no text is found, before anything is read."""
    source = domain.source
    if isinstance(source, str) and source.startswith(BUILTIN):
        builtin_kinds(source.removeprefix(BUILTIN))
    elif isinstance(source, str) and not source.startswith((IN_MEMORY, SELF)) and not _saved(domain):
        if (files := _files(domain)) and not any(os.path.getsize(file) for file in files):
            raise StructPruneError(f"The domain {domain.name!r} is empty: there is no text in {source}.")


def endless(domain: DomainConfig) -> bool:
    """Is true if reading a domain may take forever: a model writes it, or it streams from the Hub."""
    source = domain.source
    return isinstance(source, str) and not (source.startswith(BUILTIN) or _saved(domain) or _files(domain))


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
    if _saved(domain):
        return map(render, _guarded(domain, domain.source, _saved_rows, domain, seed))
    if files := _files(domain):
        return _shuffled(_from_files(domain, _reordered(files, seed), render), seed)
    what = f"{source!r} is no local file or folder, and as a dataset of the Hub it"
    return map(render, _guarded(domain, what, _hub_rows, domain, seed))


def _from_memory(domain: DomainConfig, seed: int | None, render: Render) -> Iterator[str]:
    # An object of the `datasets` library can only exist where that library has been imported.
    datasets, source = sys.modules.get("datasets"), domain.source
    if datasets is not None and isinstance(source, datasets.Dataset):
        return map(render, _rows(source, seed))
    if datasets is not None and isinstance(source, datasets.IterableDataset):
        return map(render, _buffered(source, seed))
    return _shuffled(_items(domain, render), seed)


def _rows(dataset: Dataset, seed: int | None) -> Iterator[Row]:
    return (dataset[i] for i in _reordered(range(len(dataset)), seed))


def _saved(domain: DomainConfig) -> bool:
    # A folder that `save_to_disk` wrote.
    folder = os.path.expanduser(domain.source)
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


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
    path = Path(os.path.expanduser(domain.source))
    if os.path.isfile(path):
        if path.suffix.lower() not in FORMATS:
            raise StructPruneError(
                f"The domain {domain.name!r}: files like {path} are not read.{did_you_mean(path.suffix, FORMATS)}"
            )
        return [path]
    if os.path.isdir(path):
        # What is hidden are the copies and caches of tools, as in `.ipynb_checkpoints`; a pattern does not find it.
        candidates = [file for file in path.rglob("*") if not f"/{file.relative_to(path)}".count("/.")]
        what = f"the folder {path}"
    elif os.path.lexists(path):
        raise StructPruneError(
            f"The domain {domain.name!r}: {path} leads to no regular file; write its text to one, such as text.jsonl."
        )
    elif "://" in domain.source:
        raise StructPruneError(f"The domain {domain.name!r}: {domain.source} is an address; download it first.")
    elif has_magic(domain.source):
        candidates, what = [*map(Path, glob(str(path), recursive=True))], f"the pattern {domain.source!r}"
    elif domain.source.startswith((".", "/", "~")) or path.suffix.lower() in FORMATS:
        names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        close = [f" Did you mean {str(path.with_name(name))!r}?" for name in get_close_matches(path.name, names, n=1)]
        raise StructPruneError(f"The domain {domain.name!r}: there is no file or folder {path}.{''.join(close)}")
    else:
        return []
    files = sorted(file for file in candidates if file.is_file() and file.suffix.lower() in FORMATS)
    if not files:
        raise StructPruneError(f"The domain {domain.name!r}: {what} gives no file of the kinds {', '.join(FORMATS)}.")
    return files


def _from_files(domain: DomainConfig, files: list[Path], render: Render) -> Iterator[str]:
    for kind in dict.fromkeys(FORMATS.values()):
        # `datasets` fails at a CSV file without a head.
        paths = [path for path in files if FORMATS[path.suffix.lower()] == kind and path.stat().st_size]
        if kind == "text":
            for path in paths:
                yield from _guarded(domain, str(path), lambda at: sections(at.read_text(encoding="utf-8-sig")), path)
        elif paths:
            what = str(paths[0]) if len(paths) == 1 else f"one of {len(paths)} {kind} files"
            yield from map(render, _guarded(domain, what, _stream, kind, paths))


def _stream(kind: str, paths: list[Path]) -> Iterable[Row]:
    from datasets import load_dataset

    files = [escape(str(path)) for path in paths]
    # A batch is as long as the first group of rows otherwise, which may be of none.
    more = {"batch_size": 1000} if kind == "parquet" else {}
    with TemporaryDirectory() as cache:  # for a lock alone; the user's may not be writable
        return load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=cache, **more)


def _hub_rows(domain: DomainConfig, seed: int | None) -> Iterable[Row]:
    from datasets import load_dataset

    where = {"split": domain.split, "revision": domain.revision}
    return _buffered(load_dataset(domain.source, domain.dataset_config, streaming=True, **where), seed)


def _buffered(rows: Any, seed: int | None) -> Iterable[Row]:
    return rows if seed is None else rows.shuffle(seed=seed, buffer_size=HUB_BUFFER_ROWS)


def _guarded(domain: DomainConfig, what: str, read: Callable[..., Iterable[T]], *arguments: Any) -> Iterator[T]:
    try:
        yield from read(*arguments)
    except StopIteration:  # what `datasets` makes of a file without rows
        return
    except StructPruneError:
        raise
    except Exception as error:  # a reader passes on whatever its parser or its HTTP client raises
        reason = one_line(error) or type(error).__name__
        advice = "; save it as UTF-8" * isinstance(error, UnicodeDecodeError)
        advice += '; each row has to be an object, such as {"text": "…"}' * ("JSON parse error" in reason)
        raise StructPruneError(f"The domain {domain.name!r}: {what} cannot be read: {reason}{advice}") from error


def _items(domain: DomainConfig, render: Render) -> Iterator[str]:
    for i, item in enumerate(domain.source):
        is_row = domain.template is not None and isinstance(item, Mapping)
        yield render(item) if is_row else string(item, domain, f"item {i}")


def _reordered(items: Iterable[T], seed: int | None) -> list[T]:
    order = list(items)
    if seed is not None:
        Random(seed).shuffle(order)
    return order


def _shuffled(texts: Iterable[str], seed: int | None) -> Iterator[str]:
    # What fits into the buffer is shuffled as a whole. Beyond that a text moves less far, and memory stays bounded.
    stream = iter(texts)
    if seed is not None:
        rng, buffer = Random(seed), list(islice(stream, LOCAL_BUFFER_TEXTS))
        for text in stream:
            place = rng.randrange(LOCAL_BUFFER_TEXTS)
            yield buffer[place]
            buffer[place] = text
        rng.shuffle(buffer)
        stream = iter(buffer)
    yield from stream


def builtin_documents(name: str, seed: int = 0) -> Iterator[str]:
    """Gives the documents of a built-in text in a seeded order; several kinds take turns in equal shares."""
    names = builtin_kinds(name)
    if len(names) == 1:
        return _sections_of_kind(names[0], Random(seed))
    Random(seed).shuffle(names)
    whole = [_sections_of_kind(kind, Random(seed)) for kind in names]
    return _evenly([(part for text in texts for part in sections(text, PART_CHARACTERS)) for texts in whole])


def builtin_kinds(name: str) -> list[str]:
    """Names the kinds of text that a name of built-in text stands for."""
    available = sorted(path.name.partition(".")[0] for path in TEXTS.glob("*.txt*"))
    first, *others = name.split("-")
    named = others if first == GENERAL else name.split("+")
    for kind in named:
        if kind not in available:
            raise StructPruneError(f"There is no built-in text {kind!r}.{did_you_mean(kind, [*available, GENERAL])}")
    return [kind for kind in available if kind not in named] if first == GENERAL else named


def read_kind(kind: str) -> list[str]:
    """Reads the documents of one kind of text, as its file has them."""
    path = TEXTS / f"{kind}.txt"
    text = path.read_bytes() if path.exists() else gzip.decompress(path.with_suffix(".txt.gz").read_bytes())
    return text.decode().strip("\n").split(BETWEEN)


def _sections_of_kind(kind: str, rng: Random) -> Iterator[str]:
    documents = read_kind(kind)
    rng.shuffle(documents)
    # Breadth first: a small sample holds something of many documents, and seldom two sections of the same one.
    queue = deque(map(sections, documents))
    while queue:
        stream = queue.popleft()
        if (part := next(stream, None)) is not None:
            queue.append(stream)
            yield part


def sections(text: str, size: int = SECTION_CHARACTERS) -> Iterator[str]:
    """Cut a long text into parts of `size / 2` to `size` characters, the last one up to `2 * size`.

    The cut is on a blank line where there is one, else on the end of a line, else on a space.
    """
    start = 0
    while len(text) - start > 2 * size:
        places = (text.rfind(mark, start + size // 2, start + size) for mark in ("\n\n", "\n", " "))
        cut = next((place for place in places if place > 0), start + size)
        yield text[start:cut].strip("\n")
        start = cut
    yield text[start:].strip("\n")


def _evenly(streams: list[Iterator[str]]) -> Iterator[str]:
    # The next part is of the kind that has given the fewest characters.
    heap = [(0, number, stream) for number, stream in enumerate(streams)]
    while heap:
        characters, number, stream = heappop(heap)
        if (part := next(stream, None)) is not None:
            heappush(heap, (characters + len(part), number, stream))
            yield part


def resolve(domains: Iterable[DomainConfig]) -> list[DomainConfig]:
    """Replace presets by their domains. A domain's own fields come first."""
    resolved = [part for domain in domains for part in _resolved(domain)]
    names = [domain.name for domain in resolved]
    for name in names:
        if names.count(name) > 1:
            raise StructPruneError(f"Two domains are named {name!r} once the presets are resolved; rename one.")
    return resolved


def presets(file: str = "") -> dict[str, Mapping[str, Any]]:
    """Reads all presets by name, those of a file over the built-in ones: fields of a domain, or a `mix`."""
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
    return [_filled(replace(domain, name=f"{domain.name}-{part}", weight=weight), parts[part]) for part in parts]


def _entry(name: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if name not in table:
        raise StructPruneError(f"There is no preset {name!r}.{did_you_mean(name, table)}")
    return table[name]


def _filled(domain: DomainConfig, entry: Mapping[str, Any]) -> DomainConfig:
    preset = {key: value for key, value in entry.items() if key != "licence"}
    changed = {f.name: value for f in fields(DomainConfig) if (value := getattr(domain, f.name)) != f.default}
    return DomainConfig.from_dict({**preset, **changed, "weight": domain.weight, "source": entry["source"]})
