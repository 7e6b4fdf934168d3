"""`structprune export`: a pruned model in another form."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace

from ..saving.export import export_uniform
from ..saving.gguf_file import GGUFFile, check_gguf, export_gguf
from ..saving.gguf_types import GGUF_TYPES
from ..system.disk import GGUF, GGUFOutput, Output
from .checks import gguf_file
from .loading import Loading, weights_bytes
from .output import Result, note


def export(args: Namespace) -> Result:
    """Write the model in the form that the flags name."""
    kind = args.dtype if args.dtype in GGUF_TYPES else None
    loading = Loading.of(args, dtype="auto" if kind else args.dtype)
    if args.output.endswith(GGUF):
        written = to_gguf(loading, args.model, args.output, kind, args.overwrite)
        return Result(f"{written}\nsaved to {args.output}", {**asdict(written), "output": args.output})
    Output(args.output, args.overwrite, [args.model, args.arch_file]).check(weights_bytes(args.model))
    model, tokenizer = loading.model_and_tokenizer(args.model)
    padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
    return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})


def to_gguf(loading: Loading, name: str, output: str, kind: str | None, overwrite: bool) -> GGUFFile:
    """Write a model as a file of one of llama.cpp's types, or of its own dtype."""
    check_gguf(loading.config(name), kind)
    GGUFOutput(output, overwrite).check(weights_bytes(name))
    model, tokenizer = loading.model_and_tokenizer(name)
    return export_gguf(model, output, tokenizer, overwrite, kind)


def with_gguf(args: Namespace, result: Result, loading: Loading, parameters: int) -> Result:
    """A result of a model of so many parameters, with the file of `--gguf` beside it; unchanged without that flag."""
    if args.gguf is None:
        return result
    note(args, f"{args.output} is saved; now it is written for llama.cpp")
    file = gguf_file(args.output, args.gguf)
    written = to_gguf(replace(loading, dtype="auto"), args.output, file, args.gguf, args.overwrite)
    size = f"{written.size}; the original model has {2 * parameters / 1e6:,.1f} MB in 16 bits"
    text = f"{result.text}\nSaved to {file} for llama.cpp: {size}"
    return replace(result, text=text, values={**result.values, "gguf": {**asdict(written), "output": file}})
