"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from ..errors import StructPruneError
from ..saving.export import export_nemotron_nas, export_uniform
from ..system.disk import GGUF, GGUFOutput, Output
from .flags import GGUF_DTYPES
from .loading import Loading, weights_bytes
from .output import Result


def export(args: Namespace) -> Result:
    """Write the model in the form that the flags name."""
    from ..arch.nemotron_nas import FORM, check_nemotron_nas
    from ..saving.gguf_file import check_gguf, export_gguf

    if args.output.endswith(GGUF) + args.pad_uniform + (args.form is not None) != 1 or (args.pad and not args.form):
        raise StructPruneError(
            f"Name a file OUT{GGUF} for llama.cpp, or a folder with --format {FORM} [--pad], or with --pad-uniform "
            f"for runtimes that take one width only. A padded folder can be written as OUT{GGUF} afterwards."
        )
    if not args.output.endswith(GGUF):
        loading = Loading.of(args)
        Output(args.output, args.overwrite, [args.model, args.arch_file]).check(weights_bytes(args.model))
        if args.form:
            check_nemotron_nas(loading.config(args.model), args.pad)
        model, tokenizer = loading.model_and_tokenizer(args.model)
        if args.form:
            padding = export_nemotron_nas(model, args.output, tokenizer, args.overwrite, args.pad)
        else:
            padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
        return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})
    loading = Loading.of(args, dtype=GGUF_DTYPES.get(args.dtype, args.dtype))
    check_gguf(loading.config(args.model))
    GGUFOutput(args.output, args.overwrite).check(weights_bytes(args.model))
    model, tokenizer = loading.model_and_tokenizer(args.model)
    written = export_gguf(model, args.output, tokenizer, args.overwrite)
    return Result(f"{written}\nsaved to {args.output}", {**asdict(written), "output": args.output})
