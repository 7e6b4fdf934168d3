"""Prune a model to several sizes, and write the curve of quality against size.

    python examples/tools/sweep.py MODEL OUTPUT --sparsity 0.1 0.3 [--no-save] [flags of `structprune prune`]

A sweep that was interrupted goes on where it was.
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
from optimum_structprune.errors import StructPruneError
from optimum_structprune.pruner import StructPruner
from optimum_structprune.pruning.request import check_arguments, resolve_request
from optimum_structprune.record.report import Report
from optimum_structprune.record.table import aligned, number
from optimum_structprune.record.verdict import judged_domains
from optimum_structprune.sources.data import CalibrationData
from optimum_structprune.steps.checkpoint import run_key
from optimum_structprune.system.disk import Output
from optimum_structprune.system.processes import across_processes, process_index
from optimum_structprune.system.resume import Resume
from optimum_structprune.written import replace_json


def sweep(args: Namespace) -> Result:
    """Check all sizes, then prune to one after the other; each is on disk before the next begins."""
    configs, output = _configs(args), Path(args.output)
    with across_processes(), Output(args.output).locked():
        _check(args, configs)
        finished = _store(args, configs[min(configs)])
        saved = finished.load()
        if saved is None:
            finished.save(0, {})  # so that a sweep which is killed at once goes on too
        with finished.readable():
            known = {} if saved is None else saved.values
            reports = {name: Report.from_dict(values, name) for name, values in known.items()}
            record = _curve(reports)
        for sparsity, config in configs.items():
            name, folder = str(sparsity), output / f"sparsity-{sparsity}"
            if name in reports and (args.no_save or folder.is_dir()):
                note(args, f"sparsity {name} is there already")
            else:
                note(args, f"sparsity {name}")
                reports[name] = _pruned(args, config, None if args.no_save else folder)
                reports = {size: reports[size] for size in sorted(reports, key=float)}
                finished.save(len(reports), {size: report.to_dict() for size, report in reports.items()})
                record = _curve(reports)
            if process_index() == 0:
                replace_json(output / "curve.json", record)
    lines = [aligned(_table(record)), *_coinciding([*reports], record), f"saved to {args.output}"]
    return Result("\n".join(lines), {**record, "output": args.output})


def _curve(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Return the sizes, the widths and the perplexities of the dense model and of each size, by their names."""
    record: dict[str, Any] = {"parameters": {}, "widths": {}, "perplexity": {}}
    for size, report in reports.items():
        record["parameters"] |= {"dense": report.dense.parameters, size: report.pruned.parameters}
        for kind, by_layer in report.widths.items():
            widths = record["widths"].setdefault(kind, {"dense": [report.dense_widths[kind]]})
            widths[size] = [*by_layer.values()]
        for name, domain in judged_domains(report).items():
            if domain.perplexity is not None and domain.perplexity.ratio is not None:
                curve = record["perplexity"].setdefault(name, {"dense": domain.perplexity.dense})
                curve[size] = domain.perplexity.last
    return record


def _table(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the curve as a table with one column for each size."""
    models = list(record["parameters"])
    rows = [["", *models], ["parameters", *map(number, record["parameters"].values())]]
    for kind, widths in record["widths"].items():
        rows.append([f"width {kind}", *(number(widths.get(model)) for model in models)])
    for name, values in record["perplexity"].items():
        rows.append([f"perplexity {name}", *(number(values.get(model), 2) for model in models)])
    return rows


def _configs(args: Namespace) -> dict[float, StructPruneConfig]:
    """How to prune to each size, from the largest model to the smallest."""
    configs = {}
    for sparsity in sorted(set(args.sizes)):
        config = pruning_config(Namespace(**{**vars(args), "sparsity": sparsity}))
        configs[sparsity] = config
    return configs


def _check(args: Namespace, configs: Mapping[float, StructPruneConfig]) -> None:
    """Refuse a size that cannot be reached, and a folder of something else, before a model is loaded."""
    loading, output = Loading.of(args), Path(args.output)
    asked = [loading.ask(args.model, config) for config in configs.values()]
    sizes = [each.smaller.num_parameters() * each.model_info.plain_model.dtype.itemsize for each in asked]
    Output(args.output).check_place(0 if args.no_save else sum(sizes))
    if output.exists() and not (output / "size.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise StructPruneError(f"{output} holds something else than a sweep; name another output folder.")


def _store(args: Namespace, config: StructPruneConfig) -> Resume:
    """What remembers the sizes of a sweep; one of another model or text, or with other settings, is refused."""
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    check_arguments(model, tokenizer, None)
    resolve_request(config, ModelInfo.of(model, config.arch_file), tokenizer)
    any_size = replace(CalibrationData.read(config, model, tokenizer), config=replace(config, sparsity=0.5))
    return Resume(Path(args.output), run_key(any_size, model, {}), "size")


def _pruned(args: Namespace, config: StructPruneConfig, folder: Path | None) -> Report:
    """Prune to one size, save the model if there is a folder, and return the report."""
    model, tokenizer = Loading.of(args, arch_file=config.arch_file).model_and_tokenizer(args.model)
    options = run_options(args)
    if config.allocation != "uniform" and config.rounds == 1:  # losses are measured once for all sizes
        options = replace(options, checkpoint_dir=str(Path(args.output) / "losses"))
    pruner = StructPruner(config, options)
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    for finished in Path(args.output, "losses").glob("layer-*"):  # which no other size reads
        finished.unlink(missing_ok=True)
    if folder is not None:
        # A model without a place on the curve is left from a sweep that was killed.
        pruner.save(pruned, folder, tokenizer, overwrite=True)
    assert pruner.report is not None
    return pruner.report


def _coinciding(sizes: Sequence[str], record: Mapping[str, Any]) -> Iterator[str]:
    """The neighbours of equal widths, in sentences."""
    for name, other in pairwise(sizes):
        if all(of.get(name) == of.get(other) for of in record["widths"].values()):
            yield f"sparsity {name} and {other} come to the same widths, which are multiples (round_to)."


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
            **{"dest": "sizes", "nargs": "+", "type": float, "required": True},
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
    CONFIGS[COMMAND.name] = lambda args: _configs(args).values()
    parser.set_defaults(run=sweep)
    return execute(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
