"""Text made by rule: word problems with worked answers, tables and logs."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random


TEMPLATES = Path(__file__).with_name("word_problems.txt")
NUM_PROBLEMS = 10_000
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


NUM_RECORDS = 10_000
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
