"""Word problems with worked answers, made by rule from the templates in `word_problems.txt`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
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
