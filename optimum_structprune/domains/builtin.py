"""Calibration text that needs no download: from any Python installation, by rule, or in `texts` (see its README)."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import tokenize
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from pathlib import Path
from random import Random
from typing import Any

from ..config.domains import GENERAL
from ..errors import StructPruneError
from ..registry import did_you_mean
from .synthetic import records, word_problems


TEXTS = Path(__file__).with_name("texts")
# The line between two documents in a file of texts.
BETWEEN = "\n%\n"
SECTION = 4_000
PART = 800
SHORTEST = 200
SKIP = frozenset("test tests idlelib lib2to3 site-packages dist-packages encodings pydoc_data __phello__".split())


def builtin_documents(name: str, seed: int = 0) -> Iterator[str]:
    """The documents of a built-in text, in an order that the seed chooses; of several kinds of text, parts of about
    `PART` characters, as much of each kind as of the others, so that a few samples hold something of all of them.
    """
    names = kinds(name)
    if len(names) == 1:
        return _documents(names[0], Random(seed))
    Random(seed).shuffle(names)
    whole = [_documents(kind, Random(seed)) for kind in names]
    return _evenly([(part for document in documents for part in sections(document, PART)) for documents in whole])


def kinds(name: str) -> list[str]:
    """The kinds of text that a name of built-in text stands for."""
    available = [*MADE, *sorted(path.stem for path in TEXTS.glob("*.txt"))]
    first, *others = name.split("-")
    named = others if first == GENERAL else name.split("+")
    for kind in named:
        if kind not in available:
            raise StructPruneError(f"There is no built-in text {kind!r}.{did_you_mean(kind, [*available, GENERAL])}")
    return [kind for kind in available if kind not in named] if first == GENERAL else named


def _documents(kind: str, rng: Random) -> Iterator[str]:
    if kind in MADE:
        return MADE[kind](rng)
    documents = (TEXTS / f"{kind}.txt").read_text(encoding="utf-8").strip("\n").split(BETWEEN)
    rng.shuffle(documents)
    return iter(documents)


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


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    # Breadth first: a small sample holds something of many sources, and seldom two parts of the same one.
    queue = deque(streams)
    while queue:
        stream = queue.popleft()
        if (part := next(stream, None)) is not None:
            queue.append(stream)
            yield part


def _evenly(streams: list[Iterator[str]]) -> Iterator[str]:
    # The next part is of the kind that has given the fewest characters.
    heap = [(0, number, stream) for number, stream in enumerate(streams)]
    while heap:
        characters, number, stream = heappop(heap)
        if (part := next(stream, None)) is not None:
            heappush(heap, (characters + len(part), number, stream))
            yield part


def _library() -> list[Path]:
    root = sysconfig.get_path("stdlib")
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - SKIP
        files += [Path(folder, name) for name in names if re.fullmatch(r"(?!_sysconfigdata).*\.py", name)]
    if not files:
        raise StructPruneError(
            f"builtin:prose and builtin:code read Python's sources; {root} has none. Use builtin:math."
        )
    return sorted(files)


def _code(rng: Random) -> Iterator[str]:
    files = _library()[::2]
    rng.shuffle(files)
    return _in_turn([_from_anywhere(path, rng.random()) for path in files])


def _from_anywhere(path: Path, share: float) -> Iterator[str]:
    # Files begin with licences and imports, so that a small sample of beginnings would hold little else.
    parts = list(_parts(_read, path))
    start = int(share * len(parts))
    yield from parts[start:] + parts[:start]


def _prose(rng: Random) -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    streams = [_parts(_english, [text], seen) for _, text in sorted(topics.items())]
    streams += [_parts(_english_of_source, path, seen) for path in _library()[1::2]]
    rng.shuffle(streams)
    return _in_turn(streams)


def _parts(read: Callable[..., str], *arguments: Any) -> Iterator[str]:
    # A generator, so that a file is only read, and parsed, when its turn comes.
    yield from (part for part in sections(read(*arguments)) if len(part) >= SHORTEST)


def _read(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _english_of_source(path: Path, seen: set[str]) -> str:
    source = _read(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    comments = [re.sub(r"(?m)^[ \t]*#+ ?", "", m[0]) for m in re.finditer(r"(?m)(^[ \t]*#.*\n){3,}", source)]
    return _english([*filter(None, docstrings), *comments], seen)


def _english(texts: list[str], seen: set[str]) -> str:
    # Lines are unwrapped because running text elsewhere has no breaks at column 79; a paragraph counts as English if
    # it is nearly all words, which drops signatures, tables and examples.
    kept = []
    for paragraph in (" ".join(raw.split()) for text in texts for raw in re.split(r"\n\s*\n", text)):
        words = sum(letter.isalpha() or letter == " " for letter in paragraph)
        english = len(paragraph) >= 80 and words >= 0.9 * len(paragraph) and paragraph[-1] in ".:!?)"
        if english and paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    return "\n\n".join(kept)


# What is read from Python's library, or made by rule.
MADE: dict[str, Callable[[Random], Iterator[str]]] = {
    "prose": _prose,
    "code": _code,
    "math": word_problems,
    "records": records,
}
