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
    parser.add_argument(
        "--cost",
        action="store_true",
        help="Show the memory that the pruning takes, and the operations of both models, as well.",
    )
    parser.add_argument(
        "--offload", metavar="{cpu,disk}", help="With --cost: where the layers are while they do not run."
    )
    add_output_arguments(parser, file=True)
    add_trust_argument(parser)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> Result:
    """Build the dense and the pruned model on the meta device and compare them."""
    from ..dryrun import dry_run
    from ..errors import StructPruneError
    from .loading import OFFLOADS, load_config, load_dtype

    config = pruning_config(args)
    if args.offload is not None and not args.cost:
        raise StructPruneError("--offload says where a cost is counted for; add --cost.")
    if args.offload not in (None, *OFFLOADS):
        raise StructPruneError(f"--offload {args.offload} is not known; choose one of {', '.join(OFFLOADS)}.")
    dtype, model_config = load_dtype(args.dtype), load_config(args.model, args.trust_remote_code)
    outcome = dry_run(model_config, config, dtype, args.trust_remote_code, args.cost, args.offload)
    head = f"{args.model}: {outcome.model_type}, {outcome.sparsity:.1%} of the layers' parameters go"
    return Result(f"{head}\n{outcome}", outcome.to_dict())
