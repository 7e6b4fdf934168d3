"""`structprune plan`: a dry run that shows what pruning would give, from the config alone, in seconds."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from .arguments import add_config_arguments, add_trust_argument, pruning_config
from .output import Result, add_output_arguments


if TYPE_CHECKING:
    from ..costs.estimate import Setting

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
        help="Show what the pruning takes as well: memory, operations, bytes, and the time on machines of a table.",
    )
    parser.add_argument("--device-memory", metavar="24GB", help="With --cost: say whether it fits into this memory.")
    parser.add_argument(
        "--offload", metavar="{cpu,disk}", help="With --cost: where the layers are while they do not run."
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="With --cost: how many processes share the samples (default: 1)."
    )
    add_output_arguments(parser, file=True)
    add_trust_argument(parser)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> Result:
    """Build the dense and the pruned model on the meta device and compare them."""
    from ..dryrun import dry_run
    from .loading import load_config, load_dtype

    config = pruning_config(args)
    dtype, setting = load_dtype(args.dtype), _setting(args)
    model_config = load_config(args.model, args.trust_remote_code)
    outcome = dry_run(model_config, config, dtype, args.trust_remote_code, setting)
    head = f"{args.model}: {outcome.model_type}, {outcome.sparsity:.1%} of the layers' parameters go"
    return Result(f"{head}\n{outcome}", outcome.to_dict())


def _setting(args: Namespace) -> Setting | None:
    """Where the pruning is to run; None where its cost is not asked for."""
    from ..costs.estimate import Setting
    from ..errors import StructPruneError
    from .loading import OFFLOADS

    names = ("device_memory", "offload", "processes")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not args.cost:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise StructPruneError(f"--{flag} says where a cost is counted for; add --cost.")
        return None
    if given.get("offload", "cpu") not in OFFLOADS:
        raise StructPruneError(f"--offload {args.offload} is not known; choose one of {', '.join(OFFLOADS)}.")
    if given.get("processes", 1) < 1:
        raise StructPruneError(f"--processes has to be 1 or more, got {args.processes}.")
    memory = {"device_memory": _bytes(args.device_memory)} if "device_memory" in given else {}
    return Setting(**{**given, **memory})


def _bytes(text: str) -> float:
    """A size such as 24GB or 80GiB in bytes."""
    from ..errors import StructPruneError

    found = re.fullmatch(r"(\d+\.?\d*)\s*([MGT]i?)B", text.strip())
    if found is None or float(found[1]) == 0:
        raise StructPruneError(f"--device-memory {text} is no size; write a number above 0 and a unit, such as 24GB.")
    power = "MGT".index(found[2][0]) + 2
    return float(found[1]) * (1024 if found[2].endswith("i") else 1000) ** power
