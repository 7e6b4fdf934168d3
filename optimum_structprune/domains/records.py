"""Tables and logs, made by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random


NUM_RECORDS = 10_000
NAMES = "Adler Baker Chen Diaz Fischer Garcia Haddad Ito Kovac Moreau Nguyen Okoye Patel Rossi Silva Walsh".split()
CITIES = "Bergen Cairo Dakar Denver Geneva Hanoi Lagos Lima Lyon Osaka Perth Quito Riga Turin Vilnius".split()
GOODS = "bolts brackets cables filters gaskets hinges lamps motors panels pumps switches valves washers".split()
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
    rows = [[name, *(_number(rng) for _ in columns)] for name in rng.sample(GOODS + CITIES, rng.randint(8, 14))]
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
    goods = rng.sample(GOODS, len(prices))
    lines = [
        f"{count:>3} x {name:<10} {price:>8.2f} {count * price:>10.2f}"
        for count, name, price in zip(counts, goods, prices, strict=True)
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
