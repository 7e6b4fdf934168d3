"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import Namespace

from .arguments import ARCH, LOADING, OVERWRITE, Command, switch, valued
from .output import Result


ENDING = ".gguf"
# GGUF's own names for the dtypes that a file can have.
GGUF_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


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


FLAGS = {
    "model": valued("Folder or id of the pruned model."),
    "output": valued(f"File for llama.cpp, which ends in {ENDING}; with --pad-uniform, folder for the padded model."),
    "--pad-uniform": switch("Fill narrower layers up with zeros, for runtimes that take one width only."),
    **OVERWRITE,
    **ARCH,
    **LOADING,
}
HELP = "Write a model for llama.cpp (OUT.gguf), or a non-uniform one with one width for all layers (--pad-uniform)."
COMMANDS = (Command("export", HELP, run, FLAGS, reads_text=False),)
