"""Render the built-in texts that are not written by hand into files of the package.

    python examples/tools/render_texts.py [math records code prose]

Problems and records are made by rule, the same under every Python. Code and prose come out of the library of the
Python that runs this, without files that carry a licence of their own; the release that the package has is named in
`optimum_structprune/domains/texts/README.md`.
"""

from __future__ import annotations

import ast
import gzip
import operator
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random

from optimum_structprune.domains.sources import SEPARATOR, TEXTS, sections


TEMPLATES = Path(__file__).with_name("word_problems.txt")
NUM_PROBLEMS, NUM_RECORDS = 4_000, 1_500
LAYOUTS = (
    "{question}\n{lines}\n#### {answer}",
    "{question}\n\n{lines}\n\nThe answer is {answer}.",
    "Question: {question}\nAnswer: {text} The answer is {answer}.",
    "Q: {question}\nA: Let's think step by step. {text} So the answer is {answer}.",
    "Problem: {question}\nSolution: {text} Therefore, the answer is {answer}.",
)
WOMEN = "Anna Maria Priya Chloe Fatima Grace Hana Ines Julia Keisha Lena Mei Nora Olivia Rosa Sofia Wendy Zoe".split()
MEN = "Ahmed Ben Carlos David Emeka Felix George Hugo Ivan Jamal Kenji Liam Marco Noah Omar Pedro Ravi Tom".split()
PLACES = "school library swimming_pool village_hall summer_camp sports_club theater museum hospital bakery".split()
GOODS = """notebooks pencils apples sandwiches T-shirts candles mugs tickets plants postcards toy_cars lemons puzzles
    bottles_of_juice boxes_of_crayons loaves_of_bread bags_of_rice bunches_of_flowers jars_of_honey""".split()
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def word_problems(rng: Random) -> Iterator[str]:
    """Different word problems with worked answers, `NUM_PROBLEMS` of them."""
    _, *templates = TEMPLATES.read_text(encoding="utf-8").strip().split("\n\n")
    seen: set[str] = set()
    while len(seen) < NUM_PROBLEMS:
        try:
            question, steps, answer = _problem(rng.choice(templates), rng)
        except ArithmeticError:  # a result is no whole number, or too small: draw other numbers
            continue
        if question not in seen:
            seen.add(question)
            text = steps.replace("\n", " ")
            yield rng.choice(LAYOUTS).format(question=question, lines=steps, text=text, answer=answer)


def _problem(template: str, rng: Random) -> tuple[str, str, str]:
    """A question, the lines of its working and the answer."""
    he, his, names, others = rng.choice((("she", "her", WOMEN, MEN), ("he", "his", MEN, WOMEN)))
    goods, more = rng.sample(GOODS, 2)
    words = {"goods": goods, "more": more, "he": he, "He": he.title(), "his": his}
    words |= {"name": rng.choice(names), "friend": rng.choice(others), "place": rng.choice(PLACES)}
    values: dict[str, Fraction | str] = {key: word.replace("_", " ") for key, word in words.items()}

    def put(match: re.Match[str]) -> str:
        expression, _, name = match[1].partition(" = ")
        if not name:
            return _shown(values[expression])
        result = _result(expression, values)
        if (result * (100 if name.startswith("$") else 1)).denominator != 1:
            raise ArithmeticError
        values[name.lstrip("$")] = values["answer"] = result
        return f"{re.sub('[a-z]+', lambda match: _shown(values[match[0]]), expression)} = {_shown(result)}"

    rules, text = template.split("\n", 1)
    for name, rule in (token.split("=") for token in rules.split()):
        values[name] = _drawn(rule, values, rng)
    text = re.sub(r"\[([^]]+)]", lambda match: rng.choice(match[1].split("|")), text)
    question, steps = re.sub(r"{([^}]+)}", put, text).rsplit("?\n", 1)
    return question.replace("\n", " ") + "?", steps, _shown(values["answer"])


def _drawn(rule: str, values: dict[str, Fraction | str], rng: Random) -> Fraction | str:
    if "|" in rule:
        return rng.choice(rule.split("|")).replace("_", " ")
    if bounds := re.fullmatch(r"\$?(\d+)\.\.(\d+)(?:/(\d+))?", rule):
        low, high, step = map(int, bounds.groups("1"))
        unit = 4 if rule.startswith("$") else 1
        return Fraction(rng.randrange(unit * low, unit * high + 1, step), unit)
    return _result(rule, values)


def _result(expression: str, values: dict[str, Fraction | str]) -> Fraction:
    """The value of a sum of numbers and names, exact over fractions."""

    def computed(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](computed(node.left), computed(node.right))
        return Fraction(values[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node))

    result = computed(ast.parse(expression, mode="eval").body)
    if result <= 1:  # the sentences speak of it in the plural
        raise ArithmeticError
    return result


def _shown(value: Fraction | str) -> str:
    return value if isinstance(value, str) else str(value) if value.denominator == 1 else f"{float(value):.2f}"


NAMES = "Adler Baker Chen Diaz Fischer Garcia Haddad Ito Kovac Moreau Nguyen Okoye Patel Rossi Silva Walsh".split()
CITIES = "Bergen Cairo Dakar Denver Geneva Hanoi Lagos Lima Lyon Osaka Perth Quito Riga Turin Vilnius".split()
WARES = "bolts brackets cables filters gaskets hinges lamps motors panels pumps switches valves washers".split()
COLUMNS = "price weight stock sold rating width delay score share returns margin volume".split()
MODULES = "auth billing cache db.pool http.server mailer queue.worker scheduler search storage.sync".split()
PATHS = "/ /login /cart /search?q=lamp /app.js /style.css /api/v1/items /api/v1/orders /favicon.ico".split()
EVENTS = """
connection from {ip} accepted
request {n} finished in {ms} ms
retry {k} of 5 after timeout ({ms} ms)
user {n} signed in
user {n} signed out
cache miss for key item:{n}
wrote {n} rows to table orders
disk usage at {p}%
job {n} queued, {k} ahead of it
job {n} done
could not reach {ip}:{n}, giving up
configuration reloaded
slow query: {ms} ms
"""


def records(rng: Random) -> Iterator[str]:
    """Different tables and logs of 10 to 16 lines, `NUM_RECORDS` of them."""
    makers: tuple[Callable[[Random], str], ...] = (_table, _csv, _access_log, _event_log, _fields)
    for _ in range(NUM_RECORDS):
        yield rng.choice(makers)(rng)


def _table(rng: Random) -> str:
    columns = rng.sample(COLUMNS, 3)
    rows = [[name, *(_number(rng) for _ in columns)] for name in rng.sample(WARES + CITIES, rng.randint(8, 14))]
    lines = [["item", *columns], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(rng: Random) -> str:
    day, month, year = rng.randint(1, 14), rng.randint(1, 12), rng.randint(1995, 2024)
    columns = rng.sample(COLUMNS, 3)
    lines = [
        ",".join([f"{year}-{month:02}-{day + i:02}", rng.choice(CITIES), *(_number(rng) for _ in columns)])
        for i in range(rng.randint(9, 14))
    ]
    return "\n".join([",".join(["date", "city", *columns]), *lines])


def _access_log(rng: Random) -> str:
    second = rng.randint(0, 80_000)
    lines = []
    for _ in range(rng.randint(7, 10)):
        second += rng.randint(0, 40)
        status = rng.choices((200, 304, 404, 500), (12, 4, 2, 1))[0]
        request = f'"{rng.choice(("GET", "GET", "GET", "POST"))} {rng.choice(PATHS)} HTTP/1.1"'
        stamp = f"[{_date(rng, '{d:02}/Mar/2023')}:{_clock(second)} +0000]"
        lines.append(f"{_address(rng)} - - {stamp} {request} {status} {rng.randint(120, 60_000)}")
    return "\n".join(lines)


def _event_log(rng: Random) -> str:
    second, day = rng.randint(0, 80_000), _date(rng, "2024-{m:02}-{d:02}")
    events = EVENTS.strip().split("\n")
    lines = []
    for _ in range(rng.randint(10, 15)):
        second += rng.randint(0, 90)
        level = rng.choices(("INFO", "DEBUG", "WARNING", "ERROR"), (8, 4, 2, 1))[0]
        numbers = {"n": rng.randint(10, 99_999), "k": rng.randint(1, 5), "p": rng.randint(40, 99)}
        event = rng.choice(events).format(ip=_address(rng), ms=rng.randint(1, 4_000), **numbers)
        lines.append(f"{day} {_clock(second)},{rng.randint(0, 999):03} {level:<7} {rng.choice(MODULES)}: {event}")
    return "\n".join(lines)


def _fields(rng: Random) -> str:
    prices = [rng.randint(100, 20_000) / 100 for _ in range(rng.randint(4, 7))]
    counts = [rng.randint(1, 12) for _ in prices]
    total = sum(price * count for price, count in zip(prices, counts, strict=True))
    wares = rng.sample(WARES, len(prices))
    lines = [
        f"{count:>3} x {name:<10} {price:>8.2f} {count * price:>10.2f}"
        for count, name, price in zip(counts, wares, prices, strict=True)
    ]
    head = [
        f"Invoice no. {rng.randint(1_000, 99_999)}",
        f"Date:     {_date(rng, '{d} {month} 2022')}",
        f"Customer: {rng.choice(NAMES)} & {rng.choice(NAMES)}, {rng.choice(CITIES)}",
        "",
    ]
    return "\n".join([*head, *lines, f"{'Total':<16} {total:>19.2f}"])


def _number(rng: Random) -> str:
    return str(rng.randint(1, 5_000)) if rng.random() < 0.5 else f"{rng.uniform(0, 100):.{rng.randint(1, 2)}f}"


def _address(rng: Random) -> str:
    # Networks that are set aside for documentation (RFC 5737).
    return f"{rng.choice(('192.0.2', '198.51.100', '203.0.113'))}.{rng.randint(1, 254)}"


def _clock(second: int) -> str:
    return f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"


def _date(rng: Random, form: str) -> str:
    months = "January February March April May June July August September October November December".split()
    month = rng.randint(1, 12)
    return form.format(d=rng.randint(1, 28), m=month, month=months[month - 1])


SKIP = frozenset("test tests idlelib lib2to3 site-packages dist-packages encodings pydoc_data __phello__".split())
NOTICE = re.compile(r"(?i)copyright|licen[sc]e|\(c\) |all rights reserved")
# A file of code gives a piece of it from a place that is drawn: files begin with imports, and a small sample of
# beginnings would hold little else.
LONGEST_CODE = 24_000
SHORTEST = 200


def code(rng: Random) -> Iterator[str]:
    """A piece of every other file of the library."""
    for path in library()[::2]:
        start, text = rng.random(), read(path).strip("\n")
        if NOTICE.search(text):
            continue
        parts = list(sections(text))
        piece = text[text.index(parts[int(start * len(parts))]) :]
        if len(piece) > LONGEST_CODE:
            piece = piece[: piece.rindex("\n", 0, LONGEST_CODE)]
        if len(piece) >= SHORTEST:
            yield piece.strip("\n")


def prose(rng: Random) -> Iterator[str]:
    """The English of the pages of `help()`, and of docstrings and comments of the files that `code` passes over."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = [[text] for _, text in sorted(topics.items())]
    texts += [comments(source) for source in map(read, library()[1::2]) if not NOTICE.search(source)]
    for text in texts:
        if len(kept := english(text, seen)) >= SHORTEST:
            yield kept


def library() -> list[Path]:
    """The files of the library in a fixed order."""
    files: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - SKIP
        files += [Path(folder, name) for name in names if re.fullmatch(r"(?!_sysconfigdata).*\.py", name)]
    return sorted(files)


def read(path: Path) -> str:
    """The text of a source."""
    with tokenize.open(path) as file:
        return file.read()


def comments(source: str) -> list[str]:
    """The docstrings of a source, and its comments of three lines or more."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    blocks = [re.sub(r"(?m)^[ \t]*#+ ?", "", match[0]) for match in re.finditer(r"(?m)(^[ \t]*#.*\n){3,}", source)]
    return [*filter(None, docstrings), *blocks]


def english(texts: list[str], seen: set[str]) -> str:
    """The paragraphs of texts that are English and not seen before."""
    # Lines are unwrapped because running text elsewhere has no breaks at column 79; a paragraph counts as English if
    # it is nearly all words, which drops signatures, tables and examples.
    kept = []
    for paragraph in (" ".join(raw.split()) for text in texts for raw in re.split(r"\n\s*\n", text)):
        words = sum(letter.isalpha() or letter == " " for letter in paragraph)
        whole = len(paragraph) >= 80 and words >= 0.9 * len(paragraph) and paragraph[-1] in ".:!?)"
        if whole and paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    return "\n\n".join(kept)


KINDS: dict[str, Callable[[Random], Iterator[str]]] = {
    "math": word_problems,
    "records": records,
    "code": code,
    "prose": prose,
}


def main(kinds: list[str]) -> None:
    """Write the files of some kinds of text, or of all."""
    for kind in kinds or KINDS:
        documents = list(dict.fromkeys(KINDS[kind](Random(0))))
        assert not any(SEPARATOR in f"\n{text}\n" for text in documents)
        path = TEXTS / f"{kind}.txt.gz"
        # Neither time nor name, so that the same text gives the same file.
        path.write_bytes(gzip.compress(f"{SEPARATOR.join(documents)}\n".encode(), mtime=0))
        print(
            f"{path}: {len(documents)} documents, {sum(map(len, documents)):,} characters, {path.stat().st_size:,} B"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
