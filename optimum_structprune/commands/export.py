"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import Command, add_loading_arguments, add_path_arguments
from .output import Result, add_output_arguments


HELP = "Write a model for llama.cpp (OUT.gguf), or a non-uniform one with one width for all layers (--pad-uniform)."
ENDING = ".gguf"
# GGUF's own names for the dtypes that a file can have.
GGUF_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    add_path_arguments(
        parser,
        "Folder or id of the pruned model.",
        f"File for llama.cpp, which ends in {ENDING}; with --pad-uniform, folder for the padded model.",
    )
    parser.add_argument(
        "--pad-uniform",
        action="store_true",
        help="Fill narrower layers up with zeros, for runtimes that take one width only.",
    )
    add_loading_arguments(parser, arch=True)
    add_output_arguments(parser)


def run(args: Namespace) -> Result:
    """Write the model in the form that the flags name."""
    from dataclasses import asdict

    from ..errors import StructPruneError
    from ..saving.export import export_uniform
    from ..saving.gguf_file import check_gguf, export_gguf
    from ..system.disk import GGUFOutput, Output
    from .loading import Loading, weights_bytes

    if args.output.endswith(ENDING) == args.pad_uniform:
        raise StructPruneError(
            f"Name a file OUT{ENDING} for llama.cpp, or a folder with --pad-uniform for runtimes that take one width "
            f"only. A padded folder can be written as OUT{ENDING} afterwards."
        )
    if args.pad_uniform:
        loading = Loading.of(args)
        Output(args.output, args.overwrite, [args.model, args.arch_file]).check(weights_bytes(args.model))
        model, tokenizer = loading.model_and_tokenizer(args.model)
        padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
        return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})
    loading = Loading.of(args, dtype=GGUF_DTYPES.get(args.dtype, args.dtype))
    check_gguf(loading.config(args.model))
    GGUFOutput(args.output, args.overwrite).check(weights_bytes(args.model))
    model, tokenizer = loading.model_and_tokenizer(args.model)
    written = export_gguf(model, args.output, tokenizer, args.overwrite)
    return Result(f"{written}\nsaved to {args.output}", {**asdict(written), "output": args.output})


COMMANDS = (Command("export", HELP, add_arguments, run),)
