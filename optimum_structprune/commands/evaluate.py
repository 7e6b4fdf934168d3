"""`structprune evaluate`: perplexity by domain, closeness to the dense model, and tasks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .measuring import add_measuring_arguments, measured
from .output import Result, add_output_arguments


NAME = "evaluate"
HELP = "Measure a model by perplexity and tasks, alone or against the dense one."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", help="Model id or folder.")
    parser.add_argument("--against", metavar="DENSE", help="The dense model to compare with.")
    add_measuring_arguments(parser)
    add_output_arguments(parser, file=True, reads_text=True)


def run(args: Namespace) -> Result:
    """Measure the model."""
    evaluation = measured(args, args.model, args.against)
    return Result(str(evaluation), evaluation.to_dict())
