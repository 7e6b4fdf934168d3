"""`structprune compare`: several models side by side."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .measuring import add_measuring_arguments, measured_of, names_of
from .output import Result, add_output_arguments


if TYPE_CHECKING:
    from ..evaluation.side_by_side import Facts, SideBySide

NAME = "compare"
HELP = "Show models side by side: size, widths, cache, perplexity, tasks and speed."
BATCH_SIZE, PROMPT = 1, 128


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("models", nargs="+", metavar="model", help="Model ids or folders.")
    add_measuring_arguments(parser)
    parser.add_argument("--speed", action="store_true", help="Also measure how fast they read and write tokens.")
    parser.add_argument("--csv", metavar="FILE", help="Write the table to a file of comma-separated values.")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="Draw quality against size to an .svg, .png or .pdf file; joined are those that no other beats in both.",
    )
    add_output_arguments(parser, file=True, reads_text=True)


def run(args: Namespace) -> Result:
    """Check all models by their configs, then load and measure one after the other."""
    from ..evaluation.pictures import draw_quality
    from ..evaluation.side_by_side import SideBySide

    paths = dict(zip(names_of(args.models), args.models, strict=True))
    _check(args, paths)
    models = SideBySide({name: _facts(path, args) for name, path in paths.items()})
    if args.speed:
        _add_speed(models, paths, args)
    if args.csv is not None:
        Path(args.csv).write_text(models.to_csv())
    if args.plot is not None:
        draw_quality(
            args.plot, models.points(), quality=str(models.quality), higher_is_better=models.quality == "accuracy"
        )
    return Result(str(models), models.to_dict())


def _check(args: Namespace, paths: dict[str, str]) -> None:
    """Refuse what cannot be compared, before a model is loaded."""
    from ..arch.per_layer import enable_heterogeneous
    from ..errors import StructPruneError
    from ..evaluation.pictures import check_picture
    from ..system.fingerprint import vocabulary_hash
    from .loading import load_config, load_device, load_dtype, load_tokenizer

    load_dtype(args.dtype)
    load_device(args.device)
    if args.arch_file is not None:
        enable_heterogeneous(args.arch_file)
    for path in paths.values():
        load_config(path, args.trust_remote_code)
    if args.csv is not None and not Path(args.csv).absolute().parent.is_dir():
        raise StructPruneError(f"--csv {args.csv} cannot be written: there is no folder {Path(args.csv).parent}.")
    if args.plot is not None:
        check_picture(args.plot)
        if not (args.domain or args.task):
            raise StructPruneError("--plot shows quality against size: name text (--domain) or a task (--task).")
    if args.domain:
        words = {path: vocabulary_hash(load_tokenizer(path, args.trust_remote_code)) for path in paths.values()}
        first = next(iter(words))
        for path, found in words.items():
            if found != words[first]:
                raise StructPruneError(
                    f"{path} has another vocabulary than {first}, and perplexity is per token of a vocabulary; "
                    "compare them by --task alone."
                )


def _facts(path: str, args: Namespace) -> Facts:
    """What is known of one model; it is let go before the next is loaded."""
    from ..evaluation.side_by_side import Facts
    from .loading import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(path, args.dtype, args.device, args.trust_remote_code, args.arch_file)
    evaluation = measured_of(args, model, tokenizer) if args.domain or args.task else None
    return Facts.of(model, evaluation, args.arch_file)


def _add_speed(models: SideBySide, paths: dict[str, str], args: Namespace) -> None:
    from ..evaluation.speed import measure_speed
    from .loading import load_model

    loading = (args.dtype, args.device, args.trust_remote_code, args.arch_file)
    loaded = {name: load_model(path, *loading) for name, path in paths.items()}
    models.add_speed(measure_speed(loaded, batch_sizes=[BATCH_SIZE], prompts=[PROMPT], arch_file=args.arch_file))
