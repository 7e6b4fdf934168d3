"""Writes the page of a result: the Markdown of its card as HTML that needs nothing else."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from string import Template

from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from ..errors import StructPruneError
from ..record.report import REPORT_NAME
from ..system.processes import is_first_rank
from ..written import replace_text, warn_on_error
from .card import Records, chart, result_text, short_name


PAGE_NAME = "report.html"


def check_result(folder: str | Path) -> None:
    """Refuse a folder without the report of a pruning."""
    if not Path(folder, REPORT_NAME).is_file():
        raise StructPruneError(f"{folder} has no {REPORT_NAME}; name a folder that `structprune prune` wrote.")


def page(folder: str | Path, dense: str = "") -> str:
    """Render the page of one result."""
    check_result(folder)
    records, title = Records.read(folder, dense), Path(folder).absolute().name
    try:
        named = (records.report.get("model") or {}).get("base_model") or short_name(records.dense)
        text = result_text(records, title, named, named or "DENSE", title, f"{title}-again")
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise StructPruneError(f"{folder}: a record is not what this package writes: {error!r}.") from error
    markdown = MarkdownIt("js-default")  # without HTML of others
    markdown.add_render_rule("image", lambda *_: chart(records.report))
    body = re.sub(r"<tr>\n<td>(.*)</td>", r'<tr>\n<th scope="row">\1</th>', markdown.render(text))
    shell = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return shell.substitute(title=escape(title), body=body)


def write_report(folder: str | Path, dense: str = "") -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        dense: The name of the dense model; by default what the run has noted.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, or a record cannot be read.
    """
    path = Path(folder, PAGE_NAME)
    replace_text(path, page(folder, dense))
    return path


def write_page_or_warn(output: str | Path) -> None:
    """Write the page of a saved result; if it cannot be made, only warn."""
    if is_first_rank() and Path(output, REPORT_NAME).is_file():
        with warn_on_error(output, PAGE_NAME):
            write_report(output)
