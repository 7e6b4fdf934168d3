"""`structprune plan`: what pruning would give, from the config alone, in seconds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .prune import add_amount_arguments, config_from


NAME = "plan"
HELP = "Show what pruning would give: widths, parameters, memory. Needs no weights."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; those that say what is removed are those of `prune`."""
    parser.add_argument("model", help="Model id or folder; config.json is enough.")
    add_amount_arguments(parser)
    parser.add_argument(
        "--dtype", default="auto", help="Of the memory: auto (as saved), float32, bfloat16 or float16."
    )
    parser.add_argument("--json", metavar="OUT", help="Write the numbers to a file.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the model.")


def run(args: Namespace) -> int:
    """Build the dense and the pruned model on the meta device and compare them."""
    from ..dryrun import dry_run
    from ..errors import StructPruneError
    from .loading import load_config, load_dtype

    config = config_from(args)
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
