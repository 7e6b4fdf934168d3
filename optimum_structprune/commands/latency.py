"""`structprune latency`: how long a model takes at several widths, for a budget of milliseconds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from .arguments import add_arch_argument, add_loading_arguments
from .measuring import add_timing_arguments
from .output import Result, add_output_arguments, check_folder_of


NAME = "latency"
HELP = "Measure how long a model takes at several widths, on the machine that is to serve it."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", help="Model id or folder of the dense model.")
    parser.add_argument("file", help="The file for the times, which `prune --latency-file` reads.")
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="A space that may shrink (mlp, attention). Repeatable."
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="Sequences that run together (1).")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="Tokens in each prompt (128).")
    add_timing_arguments(parser)
    add_arch_argument(parser)
    add_loading_arguments(parser)
    add_output_arguments(parser)


def run(args: Namespace) -> Result:
    """Check the model by its config, load it, and measure it beside smaller ones."""
    from ..arch.load import describe
    from ..evaluation.latency import legal_targets, measure_latency, table_of
    from ..evaluation.speed import check_clock, check_speed
    from ..saving.report import table
    from ..widths.latency import Latency
    from .loading import load_device, load_dtype, load_model, load_shapes

    load_dtype(args.dtype)
    check_clock(args.clock, load_device(args.device))
    check_folder_of(args.file, args.file)
    if Path(args.file).exists():
        Latency.load(args.file)  # a former measurement is replaced, and nothing else
    shapes = load_shapes(args.model, args.arch_file, args.trust_remote_code)
    legal_targets(describe(shapes, args.arch_file), shapes, args.target)
    check_speed({args.model: shapes}, [args.batch_size], [args.prompt], args.new_tokens, args.repeats, args.threads)
    latency = measure_latency(
        load_model(args.model, args.dtype, args.device, args.trust_remote_code, args.arch_file),
        targets=args.target,
        batch_size=args.batch_size,
        prompt=args.prompt,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=args.threads,
        clock=args.clock,
        arch_file=args.arch_file,
    )
    latency.save(args.file)
    return Result(table(table_of(latency)), asdict(latency))
