"""Writes the table of `docs/architectures.md` from `arch/families`, below what the page says before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optimum_structprune.arch.family import FAMILIES_FOLDER, UNDESCRIBED, Family, Template, read_families
from optimum_structprune.arch.spec import EXPERT, HIDDEN, LAYER, kind_of


PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
COLUMNS = (LAYER, "attention", "mlp", EXPERT, HIDDEN)


def table() -> str:
    """Return a table with one row for all families with the same cells, and the numbered reasons in its cells."""
    reasons: list[str] = []
    rows: dict[str, list[str]] = {}
    for path in sorted(FAMILIES_FOLDER.glob("*.yaml")):
        for family in read_families(path):
            rows.setdefault(_row(family, reasons), []).extend(family.model_types)

    lines = [f"| model types | {' | '.join(COLUMNS)} | other |", "|---|" + "---|" * (len(COLUMNS) + 1)]
    for row, types in rows.items():
        names = ", ".join(f"`{name}`" for name in types)
        lines.append(f"| {names} | {row} |")

    lines += ["", "Reasons:", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def _row(family: Family, reasons: list[str]) -> str:
    """Return the cells of one family behind its model types, and append new reasons to the list."""
    cells = dict(_cells(family, reasons))
    if family.text is not None:
        cells = dict.fromkeys(COLUMNS, "text")

    others = ", ".join(f"`{name}` {cell}" for name, cell in cells.items() if name not in COLUMNS)
    known = " | ".join(cells.get(name, "") for name in COLUMNS)
    return f"{known} | {others}"


def _cells(family: Family, reasons: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each space of a family with its cell."""
    kinds: dict[str, Template] = {} if family.layer is None else {LAYER: family.layer}
    for name, template in family.spaces.items():
        kinds.setdefault(kind_of(name), template)

    for name, template in kinds.items():
        yield name, _cell(family, name, template, reasons)

    if family.hidden is not None:
        yield HIDDEN, "one"
    for name, reason in family.missing.items():
        yield name, f"no ({_number(reason, reasons)})"


def _cell(family: Family, name: str, template: Template, reasons: list[str]) -> str:
    """Return the cell of a space that can be pruned."""
    conditions = [f"`{key}` is {' or '.join(map(_plain, values))}" for key, values in template.requires.items()]
    condition = f" if {' and '.join(conditions)}" if conditions else ""

    # The page says in sentences that a model has one depth and one number of experts.
    if template is family.layer or name == EXPERT:
        return f"one{condition}"

    reason = template.uniform or family.uniform or ("" if family.layer_class else UNDESCRIBED)
    if not reason:
        return f"each{condition}"
    return f"one{condition} ({_number(reason, reasons)})"


def _number(reason: str, reasons: list[str]) -> int:
    """Return the number of a reason in the list below the table, and append a new reason."""
    if reason not in reasons:
        reasons.append(reason)
    return reasons.index(reason) + 1


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower()


if __name__ == "__main__":
    before = PAGE.read_text().partition("| model types |")[0]
    PAGE.write_text(before + table())
