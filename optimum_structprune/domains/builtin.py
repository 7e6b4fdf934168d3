"""Calibration text that comes with the package, in `texts` (see its README)."""

from __future__ import annotations

import gzip
from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from random import Random

from ..config.domains import GENERAL
from ..errors import StructPruneError
from ..registry import did_you_mean


TEXTS = Path(__file__).with_name("texts")
# The line between two documents in a file of texts.
BETWEEN = "\n%\n"
SECTION = 4_000
PART = 800


def builtin_documents(name: str, seed: int = 0) -> Iterator[str]:
    """The documents of a built-in text in a seeded order; of several kinds of text, as much of each, in turns."""
    names = kinds(name)
    if len(names) == 1:
        return _documents(names[0], Random(seed))
    Random(seed).shuffle(names)
    whole = [_documents(kind, Random(seed)) for kind in names]
    return _evenly([(part for document in documents for part in sections(document, PART)) for documents in whole])


def kinds(name: str) -> list[str]:
    """The kinds of text that a name of built-in text stands for."""
    available = sorted(path.name.partition(".")[0] for path in TEXTS.glob("*.txt*"))
    first, *others = name.split("-")
    named = others if first == GENERAL else name.split("+")
    for kind in named:
        if kind not in available:
            raise StructPruneError(f"There is no built-in text {kind!r}.{did_you_mean(kind, [*available, GENERAL])}")
    return [kind for kind in available if kind not in named] if first == GENERAL else named


def read_kind(kind: str) -> list[str]:
    """The documents of one kind of text, as its file has them."""
    path = TEXTS / f"{kind}.txt"
    text = path.read_bytes() if path.exists() else gzip.decompress(path.with_suffix(".txt.gz").read_bytes())
    return text.decode().strip("\n").split(BETWEEN)


def _documents(kind: str, rng: Random) -> Iterator[str]:
    documents = read_kind(kind)
    rng.shuffle(documents)
    # Breadth first: a small sample holds something of many documents, and seldom two sections of the same one.
    queue = deque(map(sections, documents))
    while queue:
        stream = queue.popleft()
        if (part := next(stream, None)) is not None:
            queue.append(stream)
            yield part


def sections(text: str, size: int = SECTION) -> Iterator[str]:
    """Cut a text of more than `2 * size` characters into parts of `size / 2` to `size` characters, the last one up to
    `2 * size`: on a blank line where there is one, else on the end of a line, else on a space.
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
