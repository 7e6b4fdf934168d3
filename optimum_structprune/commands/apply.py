"""`structprune apply`: a plan put onto the dense model that it was made for."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .output import Result, add_output_arguments


NAME = "apply"
HELP = (
    "Remove from a dense model what a pruning plan removes. No text is needed; the kept weights stay as they are, so "
    "a refit of the pruning that made the plan is not in the result."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    from .arguments import add_arch_argument, add_model_arguments

    parser.add_argument("model", help="Id or folder of the dense model.")
    parser.add_argument("plan", help="A pruning_plan.json, or the folder of a pruned model that has one.")
    parser.add_argument("output", help="Folder for the smaller model.")
    add_arch_argument(parser)
    add_model_arguments(parser)
    add_output_arguments(parser)


def run(args: Namespace) -> Result:
    """Apply the plan, save the model, and say what it removed."""
    from pathlib import Path

    from ..saving.hub import save_applied
    from ..saving.target import check_target, probe_target
    from ..surgery.apply import apply_plan
    from ..surgery.plan import PLAN_NAME, Plan
    from .loading import load_model_and_tokenizer

    path = Path(args.plan) / PLAN_NAME if Path(args.plan).is_dir() else Path(args.plan)
    used = (args.model, path, args.arch_file)
    check_target(args.output, args.overwrite, used)
    probe_target(args.output)
    plan = Plan.load(path)
    model, tokenizer = load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, args.arch_file
    )
    smaller = apply_plan(model, plan, args.arch_file)
    save_applied(smaller, args.output, plan, tokenizer, args.overwrite, used)
    before, after = model.num_parameters(), smaller.num_parameters()
    return Result(
        f"{before:,} parameters before, {after:,} after; nothing was refitted\nsaved to {args.output}",
        {"parameters": {"before": before, "after": after}, "output": args.output},
    )
