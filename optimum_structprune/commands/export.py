"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import add_arch_argument, add_model_arguments, add_path_arguments
from .output import Result, add_output_arguments


NAME = "export"
HELP = "Save a non-uniform model with one width for all layers, filled up with zeros."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add_path_arguments(parser, "Folder or id of the pruned model.", "Folder for the exported model.")
    parser.add_argument(
        "--pad-uniform",
        action="store_true",
        required=True,
        help="Fill narrower layers up with zeros, for runtimes that take one width only.",
    )
    add_arch_argument(parser)
    add_model_arguments(parser)
    add_output_arguments(parser)


def run(args: Namespace) -> Result:
    """Pad the model, save it, and say what that costs."""
    from dataclasses import asdict

    from ..saving.export import export_uniform
    from ..saving.target import check_target, probe_target
    from .loading import load_model_and_tokenizer, weights_bytes

    check_target(args.output, args.overwrite, [args.model, args.arch_file])
    probe_target(args.output, weights_bytes(args.model))
    model, tokenizer = load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, args.arch_file
    )
    padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
    return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})
