"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from ..errors import StructPruneError
from ..saving.export import export_uniform
from ..system.disk import GGUFOutput, Output
from .loading import Loading, weights_bytes
from .output import Result


ENDING = ".gguf"
# GGUF's own names for the dtypes that a file can have.
GGUF_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def export(args: Namespace) -> Result:
    """Write the model in the form that the flags name."""
    from ..saving.gguf_file import check_gguf, export_gguf

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
