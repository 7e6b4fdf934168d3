"""Writes the table of `docs/architectures.md` from `arch/families`, below what the page says before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optimum_structprune.arch.family import FAMILIES_FOLDER, TEXT_ONLY, UNDESCRIBED, Family, Template, read_families
from optimum_structprune.arch.spec import HIDDEN, LAYER, kind_of


PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
ONE_FOR_ALL = "a model has one"


def table() -> str:
    """The lines of the table, for all families."""
    lines = ["| model types | space | plain | non-uniform | config keys |", "|---|---|---|---|---|"]
    for path in sorted(FAMILIES_FOLDER.glob("*.yaml")):
        for family in read_families(path):
            lines += _rows(family)
    return "\n".join(lines) + "\n"


def _rows(family: Family) -> Iterator[str]:
    types = ", ".join(f"`{name}`" for name in family.model_types)
    if family.text is not None:
        yield f"| {types} | those of the text model | yes | no: {TEXT_ONLY} | in `text_config` | as there |"
        return
    kinds: dict[str, Template] = {} if family.layer is None else {LAYER: family.layer}
    for name, template in family.spaces.items():
        kinds.setdefault(kind_of(name), template)
    for name, template in kinds.items():
        keys = ", ".join(f"`{key}`" for key in (template.size, *template.also))
        when = "".join(
            f", where `{key}` is {' or '.join(_plain(value) for value in values)}"
            for key, values in template.requires.items()
        )
        yield f"| {types} | `{name}` | yes{when} | {_may_differ(family, template)} | {keys} |"
    if family.hidden is not None:
        yield f"| {types} | `{HIDDEN}` | yes | no: {ONE_FOR_ALL} | `{family.hidden.size}` |"
    for name, reason in family.missing.items():
        yield f"| {types} | `{name}` | no: {reason} | | |"


def _may_differ(family: Family, template: Template) -> str:
    if template is family.layer:
        return f"no: {ONE_FOR_ALL}"
    reason = template.uniform or family.uniform or ("" if family.layer_class else UNDESCRIBED)
    return f"no: {reason}" if reason else "yes"


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower()


if __name__ == "__main__":
    before = PAGE.read_text().partition("| model types |")[0]
    PAGE.write_text(before + table())
