"""`structprune plan`: a dry run that shows what pruning would give, from the config alone, in seconds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import add_config_arguments, add_trust_argument, pruning_config


NAME = "plan"
HELP = (
    "A dry run: show the widths, parameters and memory that `prune` would give with the same settings. Needs no "
    "weights, and writes no model."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; the settings are those of `prune`."""
    from ..config.pruning import StructPruneConfig

    parser.add_argument("model", help="Model id or folder; config.json is enough.")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="The dtype in which memory is counted: auto (as saved), float32, bfloat16 or float16.",
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the numbers to this file.")
    add_trust_argument(parser)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> int:
    """Build the dense and the pruned model on the meta device and compare them."""
    from ..dryrun import dry_run
    from ..errors import StructPruneError
    from .loading import load_config, load_dtype

    config = pruning_config(args)
    dtype = load_dtype(args.dtype)
    outcome = dry_run(load_config(args.model, args.trust_remote_code), config, dtype, args.trust_remote_code)
    print(f"{args.model}: {outcome.model_type}, {outcome.sparsity:.1%} of the layers' parameters go")
    print(outcome)
    if args.json:
        try:
            outcome.save(args.json)
        except OSError as error:
            raise StructPruneError(f"--json {args.json} cannot be written: {error.strerror}.") from error
    return 0
