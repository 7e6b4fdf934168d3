"""Measure the removal of whole experts, by score and with or without the refit of the remaining experts.

    python examples/benchmarks/benchmark_experts.py MODEL DATA OUT.json [--kept 12 8] [--seeds 0 1 2] [--rows "reap*"]

MODEL is a mixture of experts, such as one of `train_mixture.py`. DATA has the structure that `benchmark_table.py`
describes. Every cell is KL(original || pruned) per token, on held-out and on unseen text. The seed selects the
calibration text. OUT.json keeps all cells, and the script skips them when it runs a second time. The table shows the
mean over the seeds and, in percent, its ratio to plain REAP with the same seed and the same amount of text.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from quality import (
    DOMAINS,
    add_arguments,
    calibration_domains,
    evaluation_domains,
    load_model,
    load_results,
    matches,
    print_head,
    print_row,
    read_samples,
    unseen_files,
    write_json,
)
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import RecoveryConfig, RunOptions, StructPruneConfig, StructPruner
from optimum_structprune.domains.load import load_domains
from optimum_structprune.measure.losses import measure as measure_text
from optimum_structprune.measure.losses import totals
from optimum_structprune.measure.text import Text
from optimum_structprune.recovery.recover import Recovery


# The result is the divergence from the original model, so the loss is this divergence alone.
DISTILLED = RecoveryConfig(tokens=50_000)
ROWS: dict[str, dict[str, Any]] = {
    "reap": {"criterion": "reap", "refit": "none"},
    "reap_sum": {"criterion": "reap_sum", "refit": "none"},
    "reap + refit": {"criterion": "reap"},
    "reap + refit, error_feedback=0": {"criterion": "reap", "error_feedback": 0.0},
    "reap + refit, error_feedback=1": {"criterion": "reap", "error_feedback": 1.0},
    "reap_sum + refit": {"criterion": "reap_sum"},
    "reap + refit + distilled": {"criterion": "reap", "recovery": DISTILLED},
    "reap, little text": {"criterion": "reap", "refit": "none", "num_samples": 5},
    "reap + refit, little text": {"criterion": "reap", "num_samples": 5},
    "reap_sum + refit, little text": {"criterion": "reap_sum", "num_samples": 5},
    "reap + refit, code alone": {"criterion": "reap", "domains": ["code"]},
}
# The divergence on each text, by the key of a cell.
Results = Mapping[str, Mapping[str, float]]


class Cell(NamedTuple):
    """A row, the number of remaining experts, and the seed."""

    row: str
    experts: int
    seed: int

    @property
    def key(self) -> str:
        """Return the name in the file of results."""
        return f"{self.row} | {self.experts} | {self.seed}"


def select_cells(args: Namespace) -> list[Cell]:
    """Return the cells that match a pattern of the arguments. The seed changes last."""
    grid = product(args.seeds, args.kept, ROWS)
    return [Cell(row, experts, seed) for seed, experts, row in grid if matches(row, args.rows)]


def run(args: Namespace) -> None:
    """Run the cells that have no result, and print the table."""
    disable_progress_bar()
    names = ["model", "data", "domains", "samples", "seq_length", "eval_samples"]
    results = load_results(args.out, args, names, cells={})
    missing = [cell for cell in select_cells(args) if cell.key not in results["cells"]]
    if missing:
        model, tokenizer = load_model(args)
        domains = evaluation_domains(args.data, args.domains)
        texts = read_samples(domains, tokenizer, args.seq_length, args.eval_samples)

    for cell in missing:
        divergences = measure(args, cell, model, tokenizer, texts)
        results["cells"][cell.key] = divergences
        write_json(args.out, results)
        print(cell.key, {name: round(value, 4) for name, value in divergences.items()}, flush=True)

    print_table(args, results["cells"])
    print_exceptions(args, results["cells"])


def measure(args: Namespace, cell: Cell, model, tokenizer, texts: Mapping[str, Tensor]) -> dict[str, float]:
    """Prune once and return the divergence from the original model on each text."""
    fields = dict(ROWS[cell.row])
    recovery = fields.pop("recovery", None)
    domains = calibration_domains(args, fields.pop("domains", args.domains))
    fields.setdefault("num_samples", args.samples)

    config = StructPruneConfig(
        widths={"expert": cell.experts},
        domains=domains,
        seed=cell.seed,
        general_share=0.0,
        seq_length=args.seq_length,
        **fields,
    )

    pruned = deepcopy(model)
    pruner = StructPruner(config, RunOptions(batch_size=args.batch_size))
    pruner.prune_to_(pruned, load_domains(config, tokenizer), config.widths)
    if recovery is not None:
        pruned = Recovery(recovery, config).recover_model(pruned, tokenizer, model)

    divergences = {}
    for name, samples in texts.items():
        measured = measure_text(pruned, Text(list(samples)), model, tokens=args.batch_size * args.seq_length)
        divergences[name] = float(totals(measured.kl).sum() / samples[:, 1:].numel())
    return divergences


def evaluation_kinds(args: Namespace) -> dict[str, list[str]]:
    """Return the names of the held-out and of the unseen texts."""
    return {"held-out": args.domains, "unseen": [path.stem for path in unseen_files(args.data)]}


def print_table(args: Namespace, results: Results) -> None:
    """Print the means over the seeds, and their ratio to plain REAP."""
    kinds = evaluation_kinds(args)
    columns = list(product(args.kept, kinds))
    print_head("row", [f"{experts} kept, {kind}" for experts, kind in columns])

    for row in ROWS:
        if matches(row, args.rows):
            print_row(row, [mean_text(args, results, row, experts, kinds[kind]) for experts, kind in columns])


def mean_text(args: Namespace, results: Results, row: str, experts: int, names: Sequence[str]) -> str:
    """Return the mean divergence of a row, and in percent its mean, least and largest ratio to plain REAP."""
    plain_row = "reap"
    if "little" in row:
        plain_row = "reap, little text"

    divergences = []
    percentages = []
    for seed in args.seeds:
        cell = results.get(Cell(row, experts, seed).key)
        plain = results.get(Cell(plain_row, experts, seed).key)
        if cell is not None and plain is not None:
            divergence = fmean(cell[name] for name in names)
            divergences.append(divergence)
            percentages.append(100 * divergence / fmean(plain[name] for name in names))

    if not divergences:
        return "-"
    low = min(percentages)
    high = max(percentages)
    return f"{fmean(divergences):.4f} ({fmean(percentages):.0f}, {low:.0f}-{high:.0f})"


def print_exceptions(args: Namespace, results: Results) -> None:
    """Print the unseen texts on which a refit is worse than plain REAP."""
    exceptions = []
    for cell in select_cells(args):
        if "refit" not in cell.row or "code" in cell.row or "little" in cell.row:
            continue

        refitted = results.get(cell.key)
        plain = results.get(cell._replace(row="reap").key)
        if refitted is None or plain is None:
            continue
        for name in evaluation_kinds(args)["unseen"]:
            if refitted[name] > plain[name]:
                exceptions.append(f"{cell.row}, {cell.experts} kept, {name}")

    print(f"unseen kinds worse than with plain REAP: {', '.join(exceptions) or 'none'}")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    add_arguments(parser)
    parser.add_argument("out")
    parser.add_argument("--kept", nargs="+", type=int, default=[12, 8], help="numbers of remaining experts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=["*"], help='patterns, such as "reap*"')
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--samples", type=int, default=65, help="total number of calibration samples")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.set_defaults(eval_samples=16)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
