"""`structprune plan`: a dry run that shows what pruning would give, from the config alone, in seconds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import add_config_arguments, add_trust_argument, pruning_config
from .output import Result, add_output_arguments


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
    add_output_arguments(parser, file=True)
    add_trust_argument(parser)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> Result:
    """Build the dense and the pruned model on the meta device and compare them."""
    from ..dryrun import dry_run
    from .loading import load_config, load_dtype

    config = pruning_config(args)
    dtype = load_dtype(args.dtype)
    outcome = dry_run(load_config(args.model, args.trust_remote_code), config, dtype, args.trust_remote_code)
    head = f"{args.model}: {outcome.model_type}, {outcome.sparsity:.1%} of the layers' parameters go"
    return Result(f"{head}\n{outcome}", outcome.to_dict())
