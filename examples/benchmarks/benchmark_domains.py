"""Compare calibration text, numbers of rounds and methods in a grid of cells over seeds and FFN widths.

    python examples/benchmarks/benchmark_domains.py run MODEL DATA out.json [--cells "mix, *" ...] [--seeds 0 1 2]
    python examples/benchmarks/benchmark_domains.py run MODEL DATA left.json --leave-one-out [--cells "mix*, *" ...]
    python examples/benchmarks/benchmark_domains.py table out.json [more.json ...]

DATA has the structure that `benchmark_table.py` describes. A cell is a calibration text, a number of rounds and a
method, such as `mix, one-shot, wanda + refit`. `run … --list` prints all names. All cells have the same number of
calibration tokens. `run` skips the results that `out.json` already contains, so an interrupted run can continue.
`table` prints the results: means ± standard deviations over seeds. Files with the same settings make one table.

With `--leave-one-out`, each cell calibrates on all kinds of text except one and is evaluated on that kind. This is
repeated for every kind. The script then reads DATA/calibration only and holds a fifth of its documents out for the
evaluation, so that a choice needs no look at the evaluation text. Built-in and generated text of a similar kind is
left out too.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any, NamedTuple

from quality import (
    DOMAINS,
    SEQ_LENGTH,
    add_arguments,
    calibration_domains,
    evaluation_texts,
    load_model,
    load_results,
    matches,
    print_head,
    print_row,
    prune_with,
    read_samples,
    write_json,
)
from set_aside import split_lines
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, perplexity
from optimum_structprune.arch.load import describe
from optimum_structprune.config.domains import BUILTIN
from optimum_structprune.domains.load import texts_of
from optimum_structprune.domains.sources import builtin_kinds


# The folder of the sister package, if the package is not installed.
sys.path.append(str(Path(__file__).parents[1] / "sisters"))
# The import registers the methods of other papers.
import structprune_sisters  # noqa: E402, F401, I001


# The fields of the config for each part of a cell's name. `domains` are names in DATA/calibration, or sources.
MIXES: dict[str, dict[str, Any]] = {
    "mix": {},
    "self-generated": {"domains": ("self:any",)},
    "built-in": {"domains": ("builtin:prose", "builtin:code", "builtin:math")},
    "mix + a fifth general": {"general_share": 0.2, "general_text": "builtin:general"},
    "mix + two fifths general": {"general_share": 0.4, "general_text": "builtin:general"},
}
ROUNDS: dict[str, dict[str, Any]] = {
    "one-shot": {"rounds": 1},
    "iterative": {"rounds": 3},
    "10 rounds": {"rounds": 10},
}
METHODS: dict[str, dict[str, Any]] = {
    "flap + bias": {"criterion": "flap", "refit": "bias"},
    "flap + refit": {"criterion": "flap", "refit": "least_squares"},
    "wanda": {"criterion": "wanda", "refit": "none"},
    "wanda + refit": {"criterion": "wanda", "refit": "least_squares"},
    "wanda + refit without error feedback": {"criterion": "wanda", "refit": "least_squares", "error_feedback": 0.0},
    "obs": {"criterion": "obs", "refit": "none"},
    "obs + refit": {"criterion": "obs", "refit": "least_squares"},
    "obs_drive": {"criterion": "obs_drive", "refit": "none"},
    "obs_drive + refit": {"criterion": "obs_drive", "refit": "least_squares"},
    "taylor": {"criterion": "taylor", "refit": "none"},
    "taylor + refit": {"criterion": "taylor", "refit": "least_squares"},
    "slimllm": {"criterion": "slimllm", "refit": "slope"},
    "slimllm + refit": {"criterion": "slimllm", "refit": "least_squares"},
    "pip": {"criterion": "pip", "refit": "none"},
    "pip + refit": {"criterion": "pip", "refit": "least_squares"},
    "iterative norm": {"criterion": "iterative_norm", "refit": "none"},
    "iterative norm + refit": {"criterion": "iterative_norm", "refit": "least_squares"},
    "ddp": {"criterion": "ddp", "refit": "folded"},
    "ddp + refit": {"criterion": "ddp", "refit": "least_squares"},
    "obs by sensitivity + refit": {"criterion": "obs", "refit": "least_squares", "allocation": "sensitivity"},
    "obs_drive by sensitivity + refit": {
        "criterion": "obs_drive",
        "refit": "least_squares",
        "allocation": "sensitivity",
    },
}
# The sources that are left out together with a domain. `prose` has the docstrings of the files in `code`.
NEAR = {
    "wiki": ("encyclopedia", "countries"),
    "code": ("code", "programs", "prose"),
    "math": ("math",),
    "dialogue": ("dialogue",),
    "web": ("web", "news"),
    "stories": ("fiction",),
}


class Job(NamedTuple):
    """One run of a cell: the removed share of the FFN channels in percent, the seed, and the kind that is left out."""

    cell: str
    removed: int
    seed: int
    left_out: str | None


def all_cells(domains: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of the config of every cell, by its name."""
    names = tuple(domains)
    texts: dict[str, dict[str, Any]] = {f"{name} only": {"domains": (name,)} for name in names}
    texts.update(MIXES)
    # Of n domains with weight 1 and one with weight n / 4, the last one has a fifth of the tokens.
    texts["mix + a fifth self:any"] = {"domains": names + (f"self:any@{1 / 4 * len(names)}",)}
    texts["mix + two fifths self:any"] = {"domains": names + (f"self:any@{2 / 3 * len(names)}",)}

    cells = {}
    for text, text_fields in texts.items():
        for rounds, rounds_fields in ROUNDS.items():
            for method, method_fields in METHODS.items():
                # Only PIP prunes in ten rounds.
                if rounds == "10 rounds" and "pip" not in method:
                    continue
                fields: dict[str, Any] = {"general_share": 0.0, "domains": names}
                for part in (text_fields, rounds_fields, method_fields):
                    fields.update(part)
                cells[f"{text}, {rounds}, {method}"] = fields

    return cells


def select_cells(args: Namespace) -> dict[str, dict[str, Any]]:
    """Return the cells that match a pattern of the arguments."""
    return {name: cell for name, cell in all_cells(args.domains).items() if matches(name, args.cells)}


def config_of(
    args: Namespace, cell: dict[str, Any], width: int, seed: int, left_out: str | None = None
) -> StructPruneConfig:
    """Return the config of one run."""
    domains = calibration_domains(args, cell["domains"])
    fields = dict(cell, domains=domains, num_samples=args.samples, seq_length=args.seq_length, seed=seed)
    fields["widths"] = {"mlp": width}
    config = StructPruneConfig.from_dict(fields)
    if left_out is not None:
        config = config_without(args, config, left_out)
    return config


def config_without(args: Namespace, config: StructPruneConfig, left_out: str) -> StructPruneConfig:
    """Return the config without one kind of text and without the held-out documents of the other kinds."""
    near = NEAR.get(left_out, ())
    remaining = [domain for domain in config.domains or () if domain.name != left_out]

    domains = []
    for domain in texts_of(replace(config, domains=remaining)):
        if domain.source.startswith(BUILTIN):
            kinds = builtin_kinds(domain.source.removeprefix(BUILTIN))
            names = [name for name in kinds if name not in near]
            if names:
                domains.append(replace(domain, source=BUILTIN + "+".join(names)))
        elif domain.name in args.domains:
            calibration, _ = split_documents(args, domain.name)
            domains.append(replace(domain, source=calibration))
        elif domain.source not in near:
            domains.append(domain)

    return replace(config, domains=domains, general_share=0.0, general_text=None)


def split_documents(args: Namespace, name: str) -> tuple[list[str], list[str]]:
    """Return the documents of a calibration file to calibrate on, and the held-out documents."""
    calibration, heldout = split_lines(Path(args.data, "calibration", f"{name}.jsonl"))
    return [json.loads(line)["text"] for line in calibration], [json.loads(line)["text"] for line in heldout]


def heldout_texts(args: Namespace, tokenizer) -> dict[str, Tensor]:
    """Return the first samples of the held-out documents of every calibration file."""
    domains = []
    for name in args.domains:
        _, heldout = split_documents(args, name)
        domains.append(DomainConfig(name, heldout))
    return read_samples(domains, tokenizer, args.seq_length, args.eval_samples)


def list_jobs(args: Namespace, cells: dict[str, dict[str, Any]]) -> list[Job]:
    """Return all runs of the cells. The seed changes last, so that an interrupted run has results of every cell."""
    kinds: list[str | None] = [None]
    if args.leave_one_out:
        kinds = args.domains

    jobs = []
    for seed in args.seeds:
        for removed in args.removed:
            for name, cell in cells.items():
                for left_out in kinds:
                    # A cell with one domain has no text without this domain.
                    if cell["domains"] != (left_out,):
                        jobs.append(Job(name, removed, seed, left_out))

    return jobs


def run(args: Namespace) -> None:
    """Prune and evaluate every run that has no result."""
    cells = select_cells(args)
    if args.list:
        print("\n".join(cells))
        return
    for cell in cells.values():
        # An invalid cell fails here, before the first long run.
        config_of(args, cell, width=1, seed=0)

    names = ["model", "data", "dtype", "domains", "samples", "eval_samples", "seq_length", "leave_one_out"]
    results = load_results(args.out, args, names, runs=[])

    model, tokenizer = load_model(args)
    if args.leave_one_out:
        texts = heldout_texts(args, tokenizer)
        unseen = []
    else:
        texts, unseen = evaluation_texts(args, args.domains, tokenizer)

    if "original" not in results:
        results["unseen"] = unseen
        results["original"] = {"perplexity": perplexities(model, texts)}
    finished = {Job(row["cell"], row["removed"], row["seed"], row.get("left_out")) for row in results["runs"]}
    for job in list_jobs(args, cells):
        if job in finished:
            continue

        row = measure(args, job, cells[job.cell], model, tokenizer, texts)
        results["runs"].append(row)
        write_json(args.out, results)

        label = job.cell
        if job.left_out is not None:
            label += f" without {job.left_out}"
        print(f"{label}, {job.removed} %, seed {job.seed}: {summary(results, row)}", flush=True)


def measure(
    args: Namespace, job: Job, cell: dict[str, Any], model, tokenizer, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """Prune once and return the result."""
    size = describe(model).of("mlp")[0].size
    width = 8 * round(size * (100 - job.removed) / 100 / 8)
    config = config_of(args, cell, width, job.seed, job.left_out)
    pruned, seconds = prune_with(model, tokenizer, config)

    row = {
        "cell": job.cell,
        "removed": job.removed,
        "width": width,
        "seed": job.seed,
        "parameters": pruned.num_parameters(),
        "seconds": seconds,
        "perplexity": perplexities(pruned, texts),
    }
    if job.left_out is not None:
        row["left_out"] = job.left_out
    return row


def perplexities(model, texts: dict[str, Tensor]) -> dict[str, float]:
    """Return the perplexity on each text."""
    return {name: perplexity(model, samples) for name, samples in texts.items()}


def columns_of(results: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """Return the values of one run: perplexities relative to the original model, and the seconds."""
    original = results["original"]["perplexity"]
    ratios = {name: value / original[name] for name, value in row["perplexity"].items()}
    unseen = results["unseen"]
    if "left_out" in row:
        unseen = [row["left_out"]]

    heldout = [ratio for name, ratio in ratios.items() if name not in unseen]
    columns = {"held-out": geometric_mean(heldout), "worst": max(heldout)}
    if unseen:
        columns["unseen"] = geometric_mean(ratios[name] for name in unseen)
    columns.update(ratios)
    columns["seconds"] = row["seconds"]
    return columns


def summary(results: dict[str, Any], row: dict[str, Any]) -> str:
    """Return the main values of one run as one line."""
    columns = columns_of(results, row)
    return ", ".join(f"{name} {columns[name]:.3f}" for name in ("held-out", "worst", "unseen") if name in columns)


def merge(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of several files as one.

    Raises:
        StructPruneError: If the files have different settings.
    """
    first = files[0]
    runs = []
    for file in files:
        differences = [name for name, value in first["setting"].items() if file["setting"].get(name) != value]
        if differences:
            raise StructPruneError(f"The files have different settings: {', '.join(differences)}.")
        runs += file["runs"]

    return dict(first, runs=runs)


def print_tables(args: Namespace) -> None:
    """Print one Markdown table for each removed share of the channels."""
    results = merge([json.loads(Path(path).read_text()) for path in args.out])
    for removed in sorted({row["removed"] for row in results["runs"]}):
        print(f"\n{removed} % of the FFN channels removed\n")
        if results["setting"]["leave_one_out"]:
            print_left_out_table(results, removed, args.against)
        else:
            print_table(results, removed)


def print_table(results: dict[str, Any], removed: int) -> None:
    """Print one row for each cell. The first row is best on held-out text."""
    runs_by_cell: dict[str, list[dict[str, float]]] = {}
    for row in results["runs"]:
        if row["removed"] == removed:
            runs_by_cell.setdefault(row["cell"], []).append(columns_of(results, row))
    cells = sorted(runs_by_cell, key=lambda cell: mean_of(runs_by_cell[cell], "held-out"))

    names = list(runs_by_cell[cells[0]][0])
    print_head("cell", ["seeds"] + names)
    original = dict.fromkeys(results["original"]["perplexity"], 1.0)
    print_row("original", [""] + [original.get(name, "") for name in names])

    for cell in cells:
        runs = runs_by_cell[cell]
        values = [str(len(runs))]
        for name in names:
            values.append(spread([columns[name] for columns in runs]))
        print_row(cell, values)


def print_left_out_table(results: dict[str, Any], removed: int, against: str) -> None:
    """Print one row for each cell: the loss on the kinds that were left out and on the kinds of the calibration.

    A loss is the mean logarithm of the perplexities relative to the original model. "Of the reference's" compares
    runs of the same kind and seed, and its standard deviation is over these runs.
    """
    losses = left_out_losses(results, removed)
    reference = losses.get(against, {})
    kinds = results["setting"]["domains"]
    head = ["runs", "left out", "of the reference's", "own", "of the reference's"]
    print_head("cell", head + kinds + ["seconds"])

    for cell in sorted(losses, key=lambda name: mean_of(losses[name].values(), "left out")):
        runs = losses[cell]
        values: list[str | float] = [str(len(runs))]
        for column in ("left out", "own"):
            values.append(exp(mean_of(runs.values(), column)))
            pairs = [(run[column], reference[key][column]) for key, run in runs.items() if key in reference]
            values.append(share_of_reference(pairs))

        for kind in kinds:
            kind_runs = [run for (left_out, _), run in runs.items() if left_out == kind]
            value: str | float = ""
            if kind_runs:
                value = exp(mean_of(kind_runs, "left out"))
            values.append(value)

        values.append(f"{mean_of(runs.values(), 'seconds'):.0f}")
        print_row(cell, values)


def left_out_losses(results: dict[str, Any], removed: int) -> dict[str, dict[tuple, dict[str, float]]]:
    """Return the losses of each cell, by the kind that was left out and the seed."""
    losses: dict[str, dict[tuple, dict[str, float]]] = {}
    original = results["original"]["perplexity"]
    for row in results["runs"]:
        if row["removed"] != removed:
            continue

        by_kind = {name: log(value / original[name]) for name, value in row["perplexity"].items()}

        left_out = by_kind.pop(row["left_out"])
        columns = {"left out": left_out, "own": fmean(by_kind.values()), "seconds": row["seconds"]}
        losses.setdefault(row["cell"], {})[row["left_out"], row["seed"]] = columns

    return losses


def mean_of(runs, name: str) -> float:
    """Return the mean of one column over runs."""
    return fmean(columns[name] for columns in runs)


def share_of_reference(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the sum of the losses relative to the reference, and the standard deviation of the ratios."""
    if not pairs:
        return ""

    share = sum(loss for loss, _ in pairs) / sum(reference for _, reference in pairs)
    if len(pairs) == 1:
        return f"{share:.3f}"
    return f"{share:.3f} ± {stdev(loss / reference for loss, reference in pairs):.3f}"


def spread(values: Sequence[float]) -> str:
    """Return the mean and, of several values, the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def add_grid_arguments(parser: ArgumentParser, patterns: str, samples: int) -> None:
    """Add the arguments that select the cells of a grid and the amount of text.

    Args:
        parser: The parser of the run.
        patterns: Patterns that the help shows as examples.
        samples: The default number of calibration samples.
    """
    parser.add_argument("--cells", nargs="+", default=["*"], help=f"patterns such as {patterns}")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and stop")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), help="names of files in DATA/calibration")
    parser.add_argument("--removed", nargs="+", type=int, default=[20, 35, 50], help="FFN channels, in percent")
    parser.add_argument("--samples", type=int, default=samples, help="total number of calibration samples")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run a subcommand."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    running = commands.add_parser("run")
    running.set_defaults(command=run)
    running.add_argument("model")
    add_arguments(running)
    running.add_argument("out", help="JSON file with the results")
    add_grid_arguments(running, '"mix, *, wanda*"', samples=60)
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.add_argument("--seq-length", type=int, default=SEQ_LENGTH, help="tokens in a calibration sample")
    running.add_argument("--leave-one-out", action="store_true", help="evaluate on a kind without calibration text")

    printing = commands.add_parser("table")
    printing.set_defaults(command=print_tables)
    printing.add_argument("out", nargs="+", help="JSON files with the results")
    printing.add_argument("--against", default="mix, one-shot, obs + refit", help="the reference of --leave-one-out")

    args = parser.parse_args(argv)
    disable_progress_bar()
    args.command(args)


if __name__ == "__main__":
    main()
