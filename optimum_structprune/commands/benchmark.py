"""`structprune benchmark`: how fast models read prompts and write tokens, against the first of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .arguments import add_arch_argument, add_loading_arguments
from .measuring import add_timing_arguments, names_of
from .output import Result, add_output_arguments


NAME = "benchmark"
HELP = "Measure how fast models read prompts and write tokens, against the dense one."
# Where the flags name none; a default of argparse would stay beside what is given.
BATCH_SIZES, PROMPTS = [1], [128]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("dense", help="Model id or folder of the dense model, which the others are compared with.")
    parser.add_argument("models", nargs="+", metavar="pruned", help="Model ids or folders to compare with it.")
    parser.add_argument(
        "--batch-size", action="append", type=int, metavar="N", help="Sequences that run together (1). Repeatable."
    )
    parser.add_argument(
        "--prompt", action="append", type=int, metavar="N", help="Tokens in each prompt (128). Repeatable."
    )
    add_timing_arguments(parser)
    add_arch_argument(parser)
    add_loading_arguments(parser)
    add_output_arguments(parser, file=True)


def run(args: Namespace) -> Result:
    """Check all models by their configs, load them, and let them take turns."""
    from ..arch.per_layer import enable_heterogeneous
    from ..errors import StructPruneError
    from ..evaluation.speed import check_clock, check_speed, measure_speed
    from .loading import SPREAD, load_device, load_dtype, load_model, load_shapes

    load_dtype(args.dtype)
    device = load_device(args.device)
    if device in SPREAD:
        raise StructPruneError(
            f"--device {args.device} spreads a model, and the time of one device is measured: name one."
        )
    check_clock(args.clock, device)
    if args.arch_file is not None:
        enable_heterogeneous(args.arch_file)
    paths = dict(zip(names_of([args.dense, *args.models]), [args.dense, *args.models], strict=True))
    batch_sizes, prompts = args.batch_size or BATCH_SIZES, args.prompt or PROMPTS
    shapes = {name: load_shapes(path, args.arch_file, args.trust_remote_code) for name, path in paths.items()}
    check_speed(shapes, batch_sizes, prompts, args.new_tokens, args.repeats, args.threads)
    speed = measure_speed(
        {
            name: load_model(path, args.dtype, args.device, args.trust_remote_code, args.arch_file)
            for name, path in paths.items()
        },
        batch_sizes=batch_sizes,
        prompts=prompts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=args.threads,
        clock=args.clock,
        folders={name: folder for name, path in paths.items() if (folder := _folder(path))},
        arch_file=args.arch_file,
    )
    return Result(str(speed), speed.to_dict())


def _folder(path: str) -> Path | None:
    """The folder of a model's files; that of an id is where its config has been stored."""
    from transformers.utils import cached_file

    config = cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return None if config is None else Path(config).parent
