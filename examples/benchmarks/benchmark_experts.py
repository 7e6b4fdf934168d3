"""What the removal of whole experts costs, by score and with or without the refit of those that stay.

    python examples/benchmarks/benchmark_experts.py MODEL DATA OUT.json [--kept 12 8] [--seeds 0 1 2] [--rows "reap*"]

MODEL is a mixture of experts, such as one of `train_mixture.py`; DATA is laid out as for `benchmark_table.py`. Every
cell is KL(dense || pruned) per token, on the kinds that were calibrated on (other documents) and on others. The seed
chooses the calibration text. OUT.json keeps all cells; one that is there is not run again. The table has the mean over
the seeds and, in percent, the share of what plain REAP on as much text loses with the same seed.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from copy import deepcopy
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from quality import DOMAINS, add_arguments, begin, calibration, load, show, write_json
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, RecoveryConfig, RunOptions, StructPruneConfig, StructPruner
from optimum_structprune.domains.load import load_domains
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import compare
from optimum_structprune.recovery.recover import Recovery


PLAIN, SHORT = {"refit": "none"}, {"num_samples": 5}
# The figure is the divergence from the dense model, so that alone is the loss.
DISTILLED = RecoveryConfig(tokens=50_000)
ROWS: dict[str, dict[str, Any]] = {
    "reap": {"criterion": "reap", **PLAIN},
    "reap_sum": {"criterion": "reap_sum", **PLAIN},
    "reap + refit": {"criterion": "reap"},
    "reap + refit, error_feedback=0": {"criterion": "reap", "error_feedback": 0.0},
    "reap + refit, error_feedback=1": {"criterion": "reap", "error_feedback": 1.0},
    "reap_sum + refit": {"criterion": "reap_sum"},
    "reap + refit + distilled": {"criterion": "reap", "recovery": DISTILLED},
    "reap, little text": {"criterion": "reap", **PLAIN, **SHORT},
    "reap + refit, little text": {"criterion": "reap", **SHORT},
    "reap_sum + refit, little text": {"criterion": "reap_sum", **SHORT},
    "reap + refit, code alone": {"criterion": "reap", "domains": ["code"]},
}


def cells(args: Namespace) -> Iterator[tuple[str, str, int, int]]:
    """The key of every cell with its row, the number of experts and the seed; seeds come last."""
    for seed, kept, row in product(args.seeds, args.kept, ROWS):
        if any(fnmatchcase(row, pattern) for pattern in args.rows):
            yield f"{row} | {kept} | {seed}", row, kept, seed


def run(args: Namespace) -> None:
    """Run the cells that are not there."""
    disable_progress_bar()
    same = ("model", "data", "domains", "samples", "seq_length", "eval_samples")
    results = begin(args.out, args, same, cells={})
    todo = [cell for cell in cells(args) if cell[0] not in results["cells"]]
    if todo:
        model, tokenizer = load(args)
        texts = evaluation(args, tokenizer)
    for key, row, kept, seed in todo:
        fields = {"num_samples": args.samples, "general_share": 0.0, "seq_length": args.seq_length, **ROWS[row]}
        recovery, names = fields.pop("recovery", None), fields.pop("domains", args.domains)
        config = StructPruneConfig(widths={"expert": kept}, domains=calibration(args, names), seed=seed, **fields)
        small = deepcopy(model)
        pruner = StructPruner(config, RunOptions(batch_size=args.batch_size))
        pruner.prune_to_(small, load_domains(config, tokenizer), config.widths)
        if recovery is not None:
            small = Recovery(recovery, config).recover_model(small, tokenizer, model)
        results["cells"][key] = {
            name: compare(small, model, ids, args.batch_size)[1][0] for name, ids in texts.items()
        }
        write_json(args.out, results)
        print(key, {name: round(value, 4) for name, value in results["cells"][key].items()}, flush=True)
    table(args, results["cells"])


def evaluation(args: Namespace, tokenizer) -> dict[str, Any]:
    """Samples of the files that are measured, by kind."""
    data = Path(args.data)
    paths = [data / "heldout" / f"{name}.jsonl" for name in args.domains]
    texts = [DomainConfig(name=path.stem, source=str(path)) for path in [*paths, *others(args)]]
    return {text.name: read_heldout(text, tokenizer, args.seq_length, args.eval_samples).samples for text in texts}


def others(args: Namespace) -> list[Path]:
    """The files of kinds that are not calibrated on."""
    return sorted((Path(args.data) / "unseen").glob("*.jsonl"))


def table(args: Namespace, found: dict[str, dict[str, float]]) -> None:
    """Print the means over the seeds, and their shares of plain REAP's."""
    kinds = {"held-out": args.domains, "unseen": [path.stem for path in others(args)]}
    show("row", [f"{kept} kept, {kind}" for kept in args.kept for kind in kinds])
    show("---", ["---"] * (len(args.kept) * len(kinds)))
    for row in dict.fromkeys(row for _, row, _, _ in cells(args)):
        plain, shown = "reap, little text" if "little" in row else "reap", []
        for kept, names in product(args.kept, kinds.values()):
            keys = [(f"{row} | {kept} | {seed}", f"{plain} | {kept} | {seed}") for seed in args.seeds]
            pairs = [[fmean(found[key][n] for n in names) for key in pair] for pair in keys if {*pair} <= {*found}]
            shares = [100 * ours / reap for ours, reap in pairs]
            shown += (
                [f"{fmean(ours for ours, _ in pairs):.4f} ({fmean(shares):.0f}, {min(shares):.0f}-{max(shares):.0f})"]
                if pairs
                else ["-"]
            )
        show(row, shown)
    worse = [
        f"{row}, {kept} kept, {name}"
        for _, row, kept, seed in cells(args)
        for name in kinds["unseen"]
        if "refit" in row and "code" not in row and "little" not in row
        for ours, reap in [(found.get(f"{row} | {kept} | {seed}"), found.get(f"reap | {kept} | {seed}"))]
        if ours and reap and ours[name] > reap[name]
    ]
    print(f"unseen kinds worse than with plain REAP: {', '.join(worse) or 'none'}")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    add_arguments(parser)
    parser.add_argument("out")
    parser.add_argument("--kept", nargs="+", type=int, default=[12, 8], help="numbers of experts that stay")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=["*"], help='patterns, such as "reap*"')
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--samples", type=int, default=65, help="calibration samples in all")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.set_defaults(eval_samples=16)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
