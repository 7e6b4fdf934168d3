"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from ..arch.nemotron_nas import check_nemotron_nas
from ..saving.export import export_nemotron_nas, export_uniform
from ..saving.gguf_types import GGUF_TYPES
from ..system.disk import GGUF, Output
from .exporting import to_gguf
from .loading import Loading, weights_bytes
from .output import Result


def export(args: Namespace) -> Result:
    """Write the model in the form that the flags name."""
    kind = args.dtype if args.dtype in GGUF_TYPES else None
    loading = Loading.of(args, dtype="auto" if kind else args.dtype)
    if args.output.endswith(GGUF):
        return to_gguf(loading, args.model, args.output, kind, args.overwrite)
    Output(args.output, args.overwrite, [args.model, args.arch_file]).check(weights_bytes(args.model))
    if args.form:
        check_nemotron_nas(loading.config(args.model), args.pad)
    model, tokenizer = loading.model_and_tokenizer(args.model)
    if args.form:
        padding = export_nemotron_nas(model, args.output, tokenizer, args.overwrite, args.pad)
    else:
        padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
    return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})
