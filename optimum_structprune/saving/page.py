"""Write the page of a result, an HTML file that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from ..errors import StructPruneError
from ..record.report import REPORT_NAME, CurvePoint
from ..record.verdict import judge
from ..system.processes import is_first_rank
from ..written import replace_text, warn_on_error
from .chart import NARROW, WIDE, curve_chart, loss_chart, widths_chart
from .names import PAGE_NAME
from .records import Records
from .view import short_name, view_of


TEMPLATES = Environment(
    loader=PackageLoader("optimum_structprune.saving", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True)
class Chart:
    """A chart for wide and for narrow windows. Both are empty if there is nothing to draw."""

    wide: str
    narrow: str

    @classmethod
    def of(cls, draw: Callable[[int], str]) -> Chart:
        """Return the chart that a function draws with a width in pixels."""
        return cls(draw(WIDE), draw(NARROW))


def check_result(folder: str | Path) -> None:
    """Raise `StructPruneError` if a folder has no report of a pruning."""
    if not Path(folder, REPORT_NAME).is_file():
        raise StructPruneError(f"{folder} has no {REPORT_NAME}. Pass a folder that `structprune prune` has written.")


def page(folder: str | Path, dense: str = "") -> str:
    """Return the page of one result as HTML.

    Args:
        folder: The folder of the result.
        dense: The original model; by default the one in the report.
    """
    check_result(folder)
    records = Records.read(folder, dense)
    report = records.report
    curve: list[CurvePoint] = []
    if report.recovery is not None:
        curve = report.recovery.curve

    name = report.model.base_model or short_name(records.dense)
    dense_path = name or "ORIGINAL"
    title = Path(folder).absolute().name
    view = view_of(records, title, name, dense_path, title, f"{title}-again")
    later_answers = None if records.evaluation is None else records.evaluation.answers
    verdict = judge(report, later_answers)

    return TEMPLATES.get_template("page.html.jinja").render(
        view=view,
        level="" if verdict is None else int(verdict.level),
        losses=Chart.of(lambda width: loss_chart(report, width)),
        widths=Chart.of(lambda width: widths_chart(report, width)),
        curve=Chart.of(lambda width: curve_chart(curve, width)),
        dense_path=dense_path,
        version=__version__,
    )


def write_report(folder: str | Path, dense: str = "") -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        dense: The name of the original model; by default the one in the report.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, or a record cannot be read.
    """
    path = Path(folder, PAGE_NAME)
    replace_text(path, page(folder, dense))
    return path


def write_page_or_warn(output: str | Path) -> None:
    """Write the page of a saved result; an error only causes a warning."""
    if is_first_rank() and Path(output, REPORT_NAME).is_file():
        with warn_on_error(output, PAGE_NAME):
            write_report(output)
