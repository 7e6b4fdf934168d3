"""Makes the page about a result, the HTML that a browser shows, and writes it beside the model."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import UndefinedError

from ..errors import StructPruneError
from ..record.report import REPORT_NAME
from ..system.processes import is_first_rank
from ..written import check_unchanged, replace_text, warn_on_error
from .shown import HTML, Records, short_name, shown_of


PAGE_NAME = "report.html"
ID = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the Hub


def check_result(folder: str | Path) -> None:
    """Refuse a folder that is not what a pruning has saved."""
    if not Path(folder, REPORT_NAME).is_file():
        raise StructPruneError(
            f"{folder} has no {REPORT_NAME}, so it is not what `structprune prune` or `pruner.save` wrote; name "
            "such a folder."
        )


def page(folder: str | Path, dense: str = "") -> str:
    """The page of one result: HTML that needs nothing else."""
    check_result(folder)
    records = Records.read(folder, dense)
    try:
        named = (records.report.get("model") or {}).get("base_model") or short_name(records.dense)
        dense = named if ID.fullmatch(named) else records.dense or "DENSE"
        shown = shown_of(records, named, dense, str(folder), f"{folder}-again")
        return HTML.get_template("page.html.jinja").render(**shown, title=Path(folder).absolute().name)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise StructPruneError(f"{folder}: a record is not what this package writes: {error!r}.") from error


def write_report(folder: str | Path, dense: str = "") -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        dense: The name of the dense model; by default what the run has noted.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, a record cannot be read, or the page that is there is another
            program's or has been changed.
    """
    path = Path(folder, PAGE_NAME)
    check_unchanged(path)
    replace_text(path, page(folder, dense))
    return path


def write_page_or_warn(output: str | Path) -> None:
    """Write the page of a result that was saved; one that cannot be made only gives a warning."""
    if is_first_rank() and Path(output, REPORT_NAME).is_file():
        with warn_on_error(output, PAGE_NAME):
            write_report(output)
