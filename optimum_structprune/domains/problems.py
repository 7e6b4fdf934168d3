"""Arithmetic word problems with worked answers, made by rule."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from random import Random


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

# One problem per paragraph. The first line draws numbers (`3..9`, with a step `5..60/5`, in quarters of a dollar
# `$2..9`) and words (`red|blue`), or computes; a question follows, up to its mark, and then the working. `[a|b]` is a
# choice of words. `{a * p = x}` writes the sum out and keeps its result, positive and whole, or in cents if `$x`.
PROBLEMS = """
a=2..9 b=2..9 p=$1..12 q=$1..12 cash=40..150/5
{name} has ${cash} and [buys|picks up] {a} {goods} at ${p} each and {b} {more} at ${q} each. How much is left?
The {goods} cost {a * p = $x} and the {more} cost {b * q = $y}.
[Altogether|In all] that is {x + y = $z}, so {he} has {cash - z = $rest} left.

hours=3..9 days=3..6 rate=$9..30 costs=60..400/5 weeks=2..8
{name} works {hours} hours a day, {days} days a week, and earns ${rate} an hour at the {place}. Every week {he} spends
${costs}. How much [can|does] {he} save in {weeks} weeks?
{He} works {hours * days = week} hours a week, which brings in {week * rate = $pay}.
After {his} expenses {he} keeps {pay - costs = $kept} a week, and over {weeks} weeks {kept * weeks = $saved}.

n=24..240 k=2..6 m=2..6 first=chess|tennis|soccer|piano second=basketball|the_guitar|hockey|volleyball
There are {n} children at the {place}. One in every {k} plays {first} and one in every {m} of the others plays
{second}. How many of them [play neither|do neither of the two]?
{n / k = x} of the children play {first}, which leaves {n - x = others} others.
Of these, {others / m = y} play {second}, so {others - y = rest} do neither.

price=20..300 off=5..60/5 n=2..6
[Normally|Usually] a coat costs ${price}, but today there is a discount of {off}%. What does {name} pay for {n}?
The discount on each coat is {price * off / 100 = $less}, so it now costs {price - less = $now}.
For {n} coats {he} pays {n * now = $total}.

k=2..5 age=5..16 years=2..15
{name} is {k} times as old as {friend}, who is {age}. How old will both be together [in|after] {years} years?
{name} is {k * age = now}, so today they are {now + age = both} years old together.
In {years} years both will be {years} years older, which makes {both + years + years = sum} years.

v=30..80/5 t=2..5 w=30..80/5 s=2..5
A [train|bus|truck] travels for {t} hours at {v} miles per hour and then for {s} hours at {w} miles per hour. What is
its average speed?
It covers {v * t = x} miles in the first part and {w * s = y} miles in the second.
That is {x + y = way} miles in {t + s = time} hours, or {way / time = speed} miles per hour.

l=6..40 w=4..30 price=$2..15 gate=2..4
{name} [puts up|builds] a fence around a garden {l} meters long and {w} meters wide, with a gap of {gate} meters for a
gate. A meter of fence costs ${price}. How much does the fence cost?
Once around the garden is {2 * (l + w) = around} meters.
Without the gate, {around - gate = length} meters are needed, and they cost {length * price = $cost}.

packs=3..12 each=6..24 kids=4..11 share=4..30 left=2..3 gone=packs*each-kids*share-left
{name} has {packs} bags of {each} [marbles|candies|stickers], gives away {gone} and divides the rest equally among
{kids} children, who get {share} each. How many remain?
The bags hold {packs * each = all}, and {all - gone = rest} of them are left to divide.
The children get {kids * share = given} together, so {rest - given = remain} remain.

a=55..98 b=55..98 c=55..98 score=50..99 goal=(a+b+c+score)/4
{name} scored {a}, {b} and {c} on three tests. What must {he} score on the fourth for an average of {goal}?
Four tests with that average make {4 * goal = need} points, and so far {he} has {a + b + c = have}.
[So|That means] {he} needs {need - have = fourth} points.

a=2..30 d=1..9 n=5..12
{name} [saves|puts aside] ${a} in the first week, and every week ${d} more than in the week before. How much is it
after {n} weeks?
In week {n} the amount is {a + (n - 1) * d = last} dollars, so the average is {(a + last) / 2 = $mean} a week.
Over {n} weeks that makes {n * mean = total} dollars.

k=2..12 x=2..40 c=3..60 r=k*x+c
{name} thinks of a number. [Multiplied|When it is multiplied] by {k} and increased by {c}, it becomes {r}. What is it?
Call it x, so that {k}x + {c} is the same as {r}. Taking {c} from both sides, {k}x is {r - c = y}.
Dividing by {k}, x is {y / k = number}.

n=20..200 cost=2..9 sell=5..20 bad=2..15
{name} buys {n} {goods} for ${cost} each [to sell at the {place}|and opens a stall]. {bad} of them are damaged; the
others sell for ${sell} each. What is the profit?
{He} spends {n * cost = $spent}. There are {n - bad = good} to sell, and they bring in {good * sell = $income}.
The profit is {income - spent = $profit}.

n=100..900/20 p=10..90/5 q=10..90/5
Of the {n} people at the {place} on a [Sunday|rainy day|holiday], {p}% are adults, and {q}% of the adults buy a guide.
How many adults do not?
{n * p / 100 = adults} of the people are adults, and {adults * q / 100 = buy} of these buy a guide.
The other {adults - buy = rest} do not.

pages=120..500 a=10..35 d=3..7 left=2..8
{name} reads {a} pages a day of a book of {pages} pages. After {d} days, how many pages a day must {he} read to
[finish it|get to the end] in {left} more days?
So far {he} has read {a * d = done} pages, which leaves {pages - done = rest} to go.
That takes {rest / left = daily} pages a day.

h=40..80 r=5..30 b=h-r legs=4*r+2*b
On a farm with rabbits and chickens, {name} counts {h} heads and {legs} legs. How many [rabbits are there|are rabbits]?
If all were chickens, there would be {2 * h = two} legs; there are {legs - two = extra} more.
Each rabbit adds 2 legs, so there are {extra / 2 = rabbits} rabbits.
"""

Values = dict[str, Fraction | str]
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def word_problems(rng: Random) -> Iterator[str]:
    """Different word problems with worked answers, `NUM_PROBLEMS` of them."""
    templates = PROBLEMS.strip().split("\n\n")
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
    values = _cast(rng)
    rules, text = template.split("\n", 1)
    for name, rule in (token.split("=") for token in rules.split()):
        values[name] = _drawn(rule, values, rng)
    text = re.sub(r"\[([^]]+)]", lambda match: rng.choice(match[1].split("|")), text)
    text = re.sub(r"{([^}]+)}", lambda match: _put(match[1], values), text)
    question, steps = text.rsplit("?\n", 1)
    return question.replace("\n", " ") + "?", steps, _shown(values["answer"])


def _cast(rng: Random) -> Values:
    he, his, names, others = rng.choice((("she", "her", WOMEN, MEN), ("he", "his", MEN, WOMEN)))
    goods, more = rng.sample(GOODS, 2)
    words = {"name": rng.choice(names), "friend": rng.choice(others), "he": he, "He": he.title(), "his": his}
    words |= {"goods": goods, "more": more, "place": rng.choice(PLACES)}
    return {key: word.replace("_", " ") for key, word in words.items()}


def _drawn(rule: str, values: Values, rng: Random) -> Fraction | str:
    if "|" in rule:
        return rng.choice(rule.split("|")).replace("_", " ")
    if bounds := re.fullmatch(r"\$?(\d+)\.\.(\d+)(?:/(\d+))?", rule):
        low, high, step = map(int, bounds.groups("1"))
        unit = 4 if rule.startswith("$") else 1
        return Fraction(rng.randrange(unit * low, unit * high + 1, step), unit)
    return _result(rule, values)


def _put(code: str, values: Values) -> str:
    expression, _, name = code.partition(" = ")
    if not name:
        return _shown(values[code])
    result = _result(expression, values)
    if (result * (100 if name.startswith("$") else 1)).denominator != 1:
        raise ArithmeticError
    values[name.lstrip("$")] = values["answer"] = result
    return f"{re.sub('[a-z]+', lambda match: _shown(values[match[0]]), expression)} = {_shown(result)}"


def _result(expression: str, values: Values) -> Fraction:
    result = _computed(ast.parse(expression, mode="eval").body, values)
    if result <= 1:  # the sentences speak of it in the plural
        raise ArithmeticError
    return result


def _computed(node: ast.expr, values: Values) -> Fraction:
    """The value of a sum of numbers and names, exact over fractions."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_computed(node.left, values), _computed(node.right, values))
    if isinstance(node, ast.Name):
        return Fraction(values[node.id])
    return Fraction(ast.literal_eval(node))


def _shown(value: Fraction | str) -> str:
    return value if isinstance(value, str) else str(value) if value.denominator == 1 else f"{float(value):.2f}"
