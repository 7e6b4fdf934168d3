"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from ..saving.export import export_nemotron_nas, export_uniform
from ..system.disk import GGUF, GGUFOutput, Output
from .flags import GGUF_DTYPES
from .loading import Loading, weights_bytes
from .output import Result


def export(args: Namespace) -> Result:
    """Write the model in the form that the flags name."""
    from ..arch.nemotron_nas import check_nemotron_nas
    from ..saving.gguf_file import check_gguf, export_gguf

    loading = Loading.of(args, dtype=GGUF_DTYPES.get(args.dtype, args.dtype))
    if not args.output.endswith(GGUF):
        Output(args.output, args.overwrite, [args.model, args.arch_file]).check(weights_bytes(args.model))
        if args.form:
            check_nemotron_nas(loading.config(args.model), args.pad)
        model, tokenizer = loading.model_and_tokenizer(args.model)
        if args.form:
            padding = export_nemotron_nas(model, args.output, tokenizer, args.overwrite, args.pad)
        else:
            padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
        return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})
    check_gguf(loading.config(args.model))
    GGUFOutput(args.output, args.overwrite).check(weights_bytes(args.model))
    model, tokenizer = loading.model_and_tokenizer(args.model)
    written = export_gguf(model, args.output, tokenizer, args.overwrite)
    return Result(f"{written}\nsaved to {args.output}", {**asdict(written), "output": args.output})
