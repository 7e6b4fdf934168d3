"""Write the page of a result, an HTML file that needs no other file and no network."""

from __future__ import annotations

from pathlib import Path

from ..record.report import REPORT_NAME
from ..system.errors import StructPruneError
from ..system.processes import is_first_rank
from ..system.written import replace_text, warn_on_error
from .records import Records
from .view import content, short_name, templates


PAGE_NAME = "report.html"
PAGE = templates(autoescape=True).get_template("page.html.jinja")


def check_result(folder: str | Path) -> None:
    """Raise `StructPruneError` if a folder has no report of a pruning."""
    if not Path(folder, REPORT_NAME).is_file():
        raise StructPruneError(f"{folder} has no {REPORT_NAME}. Pass a folder that `structprune prune` has written.")


def page(folder: str | Path, original: str = "") -> str:
    """Return the page of one result as HTML.

    Args:
        folder: The folder of the result.
        original: The original model; by default the one in the report.
    """
    check_result(folder)
    records = Records.read(folder, original)
    name = records.report.model.base_model or short_name(records.original)
    return PAGE.render(content(records, Path(folder).absolute().name, name))


def write_report(folder: str | Path, original: str = "") -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        original: The name of the original model; by default the one in the report.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, or a record cannot be read.
    """
    path = Path(folder, PAGE_NAME)
    replace_text(path, page(folder, original))
    return path


def write_page_or_warn(output: str | Path) -> None:
    """Write the page of a saved result; an error only causes a warning."""
    if is_first_rank() and Path(output, REPORT_NAME).is_file():
        with warn_on_error(output, PAGE_NAME):
            write_report(output)
