"""`structprune report`: the page about a result, made anew from the records beside the model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .measuring import add_measuring_arguments, measured
from .output import Result, add_output_arguments


NAME = "report"
HELP = (
    "Write report.html beside a pruned model, from the records that lie there; with --domain or --task, measure the "
    "model on further text first."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("output", help="Folder of the pruned model.")
    parser.add_argument(
        "dense", nargs="?", help="Id or folder of the dense model, to compare with and to name in the page."
    )
    add_measuring_arguments(parser)
    add_output_arguments(parser, reads_text=True)


def run(args: Namespace) -> Result:
    """Measure what is asked for, write the page, and say where it is."""
    from pathlib import Path

    from ..record.records import EVALUATION_NAME, Records
    from ..saving.page import write_report
    from ..system.disk import check_folder

    Records.read(args.output)  # before a model is loaded in vain
    check_folder(args.output)
    lines, values = [], {}
    if args.domain or args.task:
        evaluation = measured(args, args.output, args.dense)
        evaluation.save(Path(args.output, EVALUATION_NAME))
        lines, values = [str(evaluation)], {"evaluation": evaluation.to_dict()}
    page = write_report(args.output, dense=args.dense or "")
    return Result("\n".join([*lines, f"the report is {page}"]), {**values, "output": args.output, "report": str(page)})
