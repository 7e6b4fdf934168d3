"""`structprune inspect`: what may shrink in a model, from its config alone."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import pairwise

from .arguments import add_arch_argument, add_trust_argument
from .output import Result, add_output_arguments


NAME = "inspect"
HELP = "Show a model's family, spaces, units, legal widths and parameter shares."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", help="Model id or folder.")
    add_arch_argument(parser)
    parser.add_argument(
        "--stub",
        action="store_true",
        help="Print a description of an unknown architecture, to be checked, for --arch.",
    )
    add_trust_argument(parser)
    add_output_arguments(parser)


def run(args: Namespace) -> Result:
    """Build the model on the meta device and describe it."""
    from ..arch.load import describe
    from ..arch.shrink import legal_sizes
    from ..arch.stub import stub
    from .loading import load_shapes

    model = load_shapes(args.model, args.arch_file, args.trust_remote_code)
    if args.stub:
        description = stub(model)
        return Result(description, {"stub": description})
    arch = describe(model, args.arch_file)
    total = model.num_parameters()
    lines = [
        f"{args.model}: {arch.model_type}, {arch.num_layers} layers, {total:,} parameters",
        f"{'space':<12}{'units':>8}{'parameters':>16}{'share':>8}  legal widths",
    ]
    offered = {}
    for name in arch.offered:
        spaces = arch.of(name)
        parameters = sum(space.size * space.unit_params for space in spaces)
        legal, units = list(legal_sizes(model.config, arch, name)), sorted({space.width for space in spaces})
        lines.append(f"{name:<12}{_ranges(units):>8}{parameters:>16,}{parameters / total:>8.1%}  {_ranges(legal)}")
        offered[name] = {"units": units, "parameters": parameters, "legal": legal}
    lines += [f"{name:<12}cannot be pruned: {reason}" for name, reason in arch.missing]
    values = {
        "model": args.model,
        "model_type": arch.model_type,
        "layers": arch.num_layers,
        "parameters": total,
        "spaces": offered,
        "missing": dict(arch.missing),
    }
    return Result("\n".join(lines), values)


def _ranges(sizes: Sequence[int]) -> str:
    """`[1, 2, 3, 6]` as `1-3, 6`; `[9, 18, 27]` as `9-27 in steps of 9`."""
    steps = {above - below for below, above in pairwise(sizes)}
    if len(steps) == 1 and steps != {1} and len(sizes) > 2:
        return f"{sizes[0]}-{sizes[-1]} in steps of {steps.pop()}"
    runs: list[list[int]] = []
    for size in sizes:
        if runs and size == runs[-1][-1] + 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
