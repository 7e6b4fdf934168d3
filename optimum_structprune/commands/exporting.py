"""Writes a model of the disk as one file for llama.cpp, for `prune` and `export`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace

from ..saving.gguf_file import check_gguf, export_gguf
from ..system.disk import GGUFOutput
from .checks import gguf_file
from .loading import Loading, weights_bytes
from .output import Result, note


def to_gguf(loading: Loading, name: str, output: str, kind: str | None, overwrite: bool) -> Result:
    """Write a model as a file of one of llama.cpp's types, or of its own dtype."""
    check_gguf(loading.config(name), kind)
    GGUFOutput(output, overwrite).check(weights_bytes(name))
    model, tokenizer = loading.model_and_tokenizer(name)
    written = export_gguf(model, output, tokenizer, overwrite, kind)
    return Result(f"{written}\nsaved to {output}", {**asdict(written), "output": output})


def with_gguf(args: Namespace, result: Result, loading: Loading, parameters: int) -> Result:
    """A result of a model of so many parameters, with the file of `--gguf` beside it; unchanged without that flag."""
    if args.gguf is None:
        return result
    note(args, f"{args.output} is saved; now it is written for llama.cpp")
    file = gguf_file(args.output, args.gguf)
    written = to_gguf(replace(loading, dtype="auto"), args.output, file, args.gguf, args.overwrite)
    size = f"{written.values['bytes'] / 1e6:,.1f} MB; the dense model has {2 * parameters / 1e6:,.1f} MB in 16 bits"
    text = f"{result.text}\nsaved to {file} for llama.cpp: {size}"
    return replace(result, text=text, values={**result.values, "gguf": written.values})
