"""Makes the page, and writes it beside a model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from ... import __version__
from ...errors import StructPruneError
from ...plain_json import replace_text
from ...record.records import Records, only_warning
from . import pictures
from .sections import SECTIONS, tiles


PAGE_NAME = "report.html"
HOW_TO_DRAW = "pip install 'optimum-structprune[report]'"


def page(records: Records) -> str:
    """The page of one result: HTML that needs nothing else."""
    try:
        return _template().render(
            records=records,
            tiles=list(tiles(records)),
            sections=[section(records) for section in SECTIONS],
            how_to_draw="" if pictures.can_draw() else HOW_TO_DRAW,
            version=__version__,
            svg=Markup,  # what matplotlib draws is escaped by it
            coded=coded,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StructPruneError(f"{records.output}: a record is not what this package writes: {error!r}.") from error


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("optimum_structprune.saving.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def coded(text: str) -> Markup:
    """A sentence as HTML, with what stands between backticks as code."""
    parts = text.split("`")
    tags = [
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    ]
    return Markup("").join(tags)


def write_report(folder: str | Path, output: str | Path | None = None, dense: str = "", dense_bytes: int = 0) -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        output: The name that is shown for it; by default its own.
        dense: The name of the dense model; by default what the run has noted.
        dense_bytes: The size of its weights; by default what the run has noted.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, or a record cannot be read.
    """
    path = Path(folder, PAGE_NAME)
    replace_text(path, page(Records.read(folder, output, dense, dense_bytes)))
    return path


def leave_page(folder: str | Path, output: str | Path) -> None:
    """Write the page of a result that is being saved; a page that cannot be made only gives a warning."""
    with only_warning(output, PAGE_NAME):
        write_report(folder, output)
