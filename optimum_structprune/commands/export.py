"""`structprune export`: write a pruned model for another runtime."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from ..record.report import REPORT_NAME, Report
from ..saving.export import export_uniform
from ..saving.gguf_file import GGUFFile, check_gguf, export_gguf, gguf_bytes
from ..saving.gguf_types import GGUF_TYPES, K_QUANTS
from ..system.disk import GGUF, GGUFOutput, Output
from ..system.errors import StructPruneError
from .checks import gguf_file
from .loading import Loading, weights_bytes
from .output import Result, note


def export(args: Namespace) -> Result:
    """Write a GGUF file or a padded model, as the flags say."""
    gguf_type = None
    loading = Loading.of(args)
    if args.dtype in GGUF_TYPES:
        # The model is loaded in its own dtype, and converted when the file is written.
        gguf_type = args.dtype
        loading = replace(loading, dtype="auto")

    if args.output.endswith(GGUF):
        file = to_gguf(loading, args.model, args.output, gguf_type, args.overwrite)
        values = asdict(file)
        values["output"] = args.output
        return Result(f"{file}\nsaved to {args.output}", values)

    Output(args.output, args.overwrite, [args.model, args.arch_file]).check(weights_bytes(args.model))
    model, tokenizer = loading.model_and_tokenizer(args.model)
    padding = export_uniform(model, args.output, tokenizer, args.overwrite, args.arch_file)
    return Result(f"{padding}\nsaved to {args.output}", {"parameters": asdict(padding), "output": args.output})


def to_gguf(loading: Loading, name: str, output: str, gguf_type: str | None, overwrite: bool) -> GGUFFile:
    """Write a model as a GGUF file.

    Args:
        loading: Loads the model.
        name: The id or the folder of the model.
        output: The file.
        gguf_type: llama.cpp's name of a data type; None stands for the dtype of the model.
        overwrite: Whether to replace an existing file.
    """
    check_gguf(loading.config(name), gguf_type)
    need_bytes = weights_bytes(name)
    if gguf_type is not None:
        need_bytes = disk_bytes(loading.without_weights(name), gguf_type)
    GGUFOutput(output, overwrite).check(need_bytes)

    model, tokenizer = loading.model_and_tokenizer(name)
    return export_gguf(model, output, tokenizer, overwrite, gguf_type)


def disk_bytes(model: PreTrainedModel, gguf_type: str) -> int:
    """Return the bytes of the tensors of a GGUF file while it is written."""
    if gguf_type in K_QUANTS:
        # llama.cpp's program reads a file in 16 bits, and writes at most as many bytes.
        return 2 * gguf_bytes(model, 0, "f16")
    return gguf_bytes(model, 0, gguf_type)


def add_gguf(args: Namespace, result: Result, loading: Loading, gguf_type: str | None, report: Report) -> Result:
    """Write the GGUF file of `--gguf`, and return the result with the file; without the flag, do nothing.

    Args:
        args: The arguments of `structprune prune`.
        result: The result of the pruning.
        loading: Loads the pruned model.
        gguf_type: The data type of the file.
        report: The report of the pruning, which gets the size of the file.
    """
    if gguf_type is None:
        return result

    note(args, f"{args.output} is saved; now it is written for llama.cpp")
    path = gguf_file(args.output, gguf_type)
    try:
        file = to_gguf(replace(loading, dtype="auto"), args.output, path, gguf_type, args.overwrite)
    except StructPruneError as error:
        raise StructPruneError(f"{error} The model is saved in {args.output}.") from error

    values = asdict(file)
    values["output"] = path
    size = f"{file.size}; the original model has {2 * report.original.parameters / 1e6:,.1f} MB in 16 bits"
    lines = [f"Saved to {path} for llama.cpp: {size}"]
    added = {"gguf": values}
    if report.file is not None:
        report.file.measured = file.bytes
        report.save(Path(args.output, REPORT_NAME))
        lines.append(str(report.file))
        added["file"] = asdict(report.file)
    return result.extended("\n".join(lines), added)
