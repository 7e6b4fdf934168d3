"""Prune a model to several sizes, and write the curve of quality against size.

    python examples/tools/sweep.py MODEL OUTPUT --sparsity 0.1 0.3 [--no-save] [flags of `structprune prune`]

A sweep that was interrupted resumes with the same command.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.commands.arguments import Command, pruning_config, run_options
from optimum_structprune.commands.checks import CONFIGS
from optimum_structprune.commands.cli import CommandParser, execute
from optimum_structprune.commands.flags import LOADING, option, switch
from optimum_structprune.commands.loading import Loading
from optimum_structprune.commands.output import Result, note
from optimum_structprune.config.pruning import StructPruneConfig
from optimum_structprune.pruner import StructPruner
from optimum_structprune.pruning.request import check_arguments, resolve_request
from optimum_structprune.record.report import Report
from optimum_structprune.record.table import aligned, number
from optimum_structprune.steps.checkpoint import run_key
from optimum_structprune.steps.data import CalibrationData
from optimum_structprune.system.disk import Output
from optimum_structprune.system.errors import StructPruneError
from optimum_structprune.system.processes import across_processes, process_index
from optimum_structprune.system.resume import Resume
from optimum_structprune.system.written import replace_json


def sweep(args: Namespace) -> Result:
    """Check all sizes, then prune to one size after the other. Each size is saved before the next begins."""
    configs = _configs(args)
    output = Path(args.output)

    with across_processes(), Output(args.output).locked():
        _check(args, configs)
        checkpoint = _checkpoint(args, configs[min(configs)])
        reports = _saved_reports(checkpoint)
        with checkpoint.readable():
            record = _curve(reports)

        for sparsity, config in configs.items():
            size = str(sparsity)
            folder = None
            if not args.no_save:
                folder = output / f"sparsity-{size}"

            if size in reports and (folder is None or folder.is_dir()):
                note(args, f"sparsity {size} is there already")
            else:
                note(args, f"sparsity {size}")
                reports[size] = _pruned(args, config, folder)
                reports = {name: reports[name] for name in sorted(reports, key=float)}
                checkpoint.save(len(reports), {name: report.to_dict() for name, report in reports.items()})
                record = _curve(reports)

            if process_index() == 0:
                replace_json(output / "curve.json", record)

    lines = [aligned(_table(record))]
    lines.extend(_notes_on_equal_widths(list(reports), record))
    lines.append(f"saved to {args.output}")
    return Result("\n".join(lines), record | {"output": args.output})


def _saved_reports(checkpoint: Resume) -> dict[str, Report]:
    """Return the reports of the sizes that earlier runs finished, and save a checkpoint if there is none."""
    saved = checkpoint.load()
    if saved is None:
        checkpoint.save(0, {})  # A sweep that is killed before its first size can resume too.
        return {}

    with checkpoint.readable():
        return {size: Report.from_dict(values, size) for size, values in saved.values.items()}


def _curve(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Return the parameters, the widths and the perplexities of the original model and of each size."""
    record: dict[str, Any] = {"parameters": {}, "widths": {}, "perplexity": {}}
    for size, report in reports.items():
        record["parameters"]["original"] = report.original.parameters
        record["parameters"][size] = report.pruned.parameters

        for kind, width_by_layer in report.widths.items():
            widths = record["widths"].setdefault(kind, {"original": [report.original_widths[kind]]})
            widths[size] = list(width_by_layer.values())

        for name, domain in report.latest().domains.items():
            if domain.perplexity is not None and domain.perplexity.ratio is not None:
                perplexities = record["perplexity"].setdefault(name, {"original": domain.perplexity.original})
                perplexities[size] = domain.perplexity.last
    return record


def _table(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the curve as a table with one column for each size."""
    sizes = list(record["parameters"])

    def row(title: str, values: Mapping[str, Any], digits: int = 0) -> list[str]:
        cells = [number(values.get(size), digits) for size in sizes]
        return [title] + cells

    rows = [[""] + sizes, row("parameters", record["parameters"])]
    for kind, widths in record["widths"].items():
        rows.append(row(f"width {kind}", widths))
    for name, perplexities in record["perplexity"].items():
        rows.append(row(f"perplexity {name}", perplexities, digits=2))
    return rows


def _configs(args: Namespace) -> dict[float, StructPruneConfig]:
    """Return the config of each size by its sparsity, from the largest model to the smallest."""
    configs = {}
    for sparsity in sorted(set(args.sizes)):
        values = vars(args) | {"sparsity": sparsity}
        configs[sparsity] = pruning_config(Namespace(**values))
    return configs


def _check(args: Namespace, configs: Mapping[float, StructPruneConfig]) -> None:
    """Refuse impossible sizes, and an output folder with other files, before a model is loaded."""
    loading = Loading.of(args)
    num_bytes = 0
    for config in configs.values():
        request = loading.ask(args.model, config)
        num_bytes += request.smaller.num_parameters() * request.model_info.plain_model.dtype.itemsize
    if args.no_save:
        num_bytes = 0

    Output(args.output).check_place(num_bytes)
    folder = Path(args.output)
    if not _may_hold_sweep(folder):
        raise StructPruneError(f"{folder} holds something else than a sweep; name another output folder.")


def _may_hold_sweep(folder: Path) -> bool:
    """Return whether a folder is new, is empty or has the files of a sweep."""
    if not folder.exists() or (folder / "size.json").is_file():
        return True
    return folder.is_dir() and not any(folder.iterdir())


def _checkpoint(args: Namespace, config: StructPruneConfig) -> Resume:
    """Return the checkpoint of the sweep. It refuses a sweep of another model, text or config."""
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    check_arguments(model, tokenizer, None)
    resolve_request(config, ModelInfo.of(model, config.arch_file), tokenizer)

    # The key must not depend on the sizes, so it is computed with a fixed sparsity.
    data = CalibrationData.read(config, model, tokenizer)
    data = replace(data, config=replace(config, sparsity=0.5))
    return Resume(Path(args.output), run_key(data, model, {}), "size")


def _pruned(args: Namespace, config: StructPruneConfig, folder: Path | None) -> Report:
    """Prune to one size, save the model if there is a folder, and return the report."""
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    losses = Path(args.output) / "losses"
    options = run_options(args)
    if config.allocation != "uniform" and config.rounds == 1:
        # The losses of the allocation are the same for all sizes, so they are measured once.
        options = replace(options, checkpoint_dir=str(losses))

    pruner = StructPruner(config, options)
    pruned = pruner.prune_model(model, tokenizer, inplace=True)

    # The other sizes read the losses, but not the checkpoints of the layers.
    for path in losses.glob("layer-*"):
        path.unlink(missing_ok=True)

    if folder is not None:
        # A sweep that was killed may have left a model in the folder.
        pruner.save(pruned, folder, tokenizer, overwrite=True)
    assert pruner.result.report is not None
    return pruner.result.report


def _notes_on_equal_widths(sizes: Sequence[str], record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each pair of neighbouring sizes that have the same widths."""
    for first, second in pairwise(sizes):
        is_equal = all(widths.get(first) == widths.get(second) for widths in record["widths"].values())
        if is_equal:
            yield f"sparsity {first} and {second} come to the same widths, which are multiples (round_to)."


COMMAND = Command(
    "sweep",
    "",
    "Prune a model to several sizes, and give the curve of quality against size.",
    {
        "model": "Model id or folder.",
        "output": "Folder for the curve, and for one pruned model per size.",
        "--sparsity": option(
            "X",
            "The shares of the layers' parameters to remove, each between 0 and 1.",
            dest="sizes",
            nargs="+",
            type=float,
            required=True,
        ),
        "--no-save": switch("Keep the curve only, not the pruned models."),
        **LOADING,
    },
    config="StructPruneConfig",
    without=("sparsity", "widths", "budget", "checkpoint_dir"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser("sweep.py", description=COMMAND.help)
    parser.declare = COMMAND.declare
    parser.set_defaults(run=sweep)
    CONFIGS[COMMAND.name] = lambda args: _configs(args).values()
    return execute(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
