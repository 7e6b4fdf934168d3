"""Is a model that was calibrated on a mix of domains better at tasks than one calibrated on a single domain?

    python examples/benchmarks/benchmark_tasks.py run MODEL DATA OUT [--cells "mix*" ...] [--removed 20 35 50]
    python examples/benchmarks/benchmark_tasks.py table OUT [--metric logprob]

DATA is as for `benchmark_table.py`, with multiple-choice items in `tasks/`. A cell is a calibration text and a
method: our defaults on the mix and on each single domain, published methods on the mix, and the mix with recovery.
Every cell is calibrated on the same number of tokens, and asked all items of all tasks. `run` keeps in the folder OUT
what each model scores in each item, so it can be interrupted, go on at the next cell, and be called again with other
cells. `table` compares every cell with the dense model and with the mix on the same items: by McNemar's exact test of
accuracies, by a t test of log-probabilities.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmark_domains import METHODS, add_grid_arguments
from quality import SEQ_LENGTH, add_arguments, begin, calibration, load, pruned_by, show, write_json
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import RecoveryConfig, StructPruneConfig, recover
from optimum_structprune.arch.load import describe
from optimum_structprune.evaluation.evaluate import ALL, paired_tasks
from optimum_structprune.evaluation.paired import Paired
from optimum_structprune.evaluation.tasks import Tasks, TaskScores


MIX = "mix"
ON_THE_MIX = ("flap global + bias", "taylor", "slimllm", "obs by sensitivity + refit")
RECOVERED = "mix + recovery"
# What the defaults make of five domains.
GENERAL = "mix + a fifth self:any"


def cells(domains: list[str]) -> dict[str, dict[str, Any]]:
    """Every cell: its name and its part of the config."""
    rows: dict[str, dict[str, Any]] = {MIX: {}, RECOVERED: {}, GENERAL: {"general_share": 0.2}}
    rows |= {f"{name} only": {"domains": (name,)} for name in domains}
    rows |= {f"mix, {method}": METHODS[method] for method in ON_THE_MIX}
    return {name: {"domains": tuple(domains), **fields} for name, fields in rows.items()}


def config_of(args: Namespace, cell: dict[str, Any], width: int) -> StructPruneConfig:
    """The whole config of one cell."""
    cell = {"general_share": 0.0, **cell}
    more = {"widths": {"mlp": width}, "num_samples": args.samples, "seq_length": SEQ_LENGTH, "seed": args.seed}
    return StructPruneConfig.from_dict({**cell, **more, "domains": calibration(args, cell["domains"])})


def run(args: Namespace) -> None:
    """Prune, and ask what has not been asked."""
    every = cells(args.domains)
    names = [name for name in every if any(fnmatchcase(name, pattern) for pattern in args.cells)]
    if args.list:
        print("\n".join(names))
        return
    for name in names:
        config_of(args, every[name], 1)  # an illegal cell shows before hours have gone by
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    same = ("model", "data", "dtype", "domains", "samples", "seed", "recovery_tokens", "limit", "tasks")
    write_json(folder / "setting.json", begin(folder / "setting.json", args, same))
    model, tokenizer = load(args)
    tasks = Tasks(args.tasks or sorted((Path(args.data) / "tasks").glob("*.jsonl")))

    def keep(path: Path, asked, **row: Any) -> None:
        start = perf_counter()
        answers = tasks.score(asked, tokenizer, limit=args.limit)
        write_json(path, {**row, **asdict(answers), "task_seconds": perf_counter() - start})
        print(f"{path.stem}: {summary(answers)}", flush=True)

    if not (folder / "dense.json").exists():
        keep(folder / "dense.json", model)
    size = describe(model).of("mlp")[0].size
    for removed in args.removed:
        for name in names:
            path = folder / f"{name}, {removed} %.json"
            if path.exists():
                continue
            config = config_of(args, every[name], 8 * round(size * (100 - removed) / 100 / 8))
            pruned, seconds = pruned_by(model, tokenizer, config)
            if name == RECOVERED:
                training = RecoveryConfig(tokens=args.recovery_tokens, domains=config.domains, seq_length=SEQ_LENGTH)
                pruned = recover(pruned, tokenizer, training, teacher=model)
            keep(path, pruned, cell=name, removed=removed, widths=config.widths, seconds=seconds)


def answers_of(path: Path) -> tuple[dict[str, Any], TaskScores]:
    """A cell as it was kept, with its answers; JSON has turned the numbers of the items into text."""
    row = json.loads(path.read_text())
    items = {
        task: {metric: {int(item): score for item, score in scores.items()} for metric, scores in metrics.items()}
        for task, metrics in row["items"].items()
    }
    return row, TaskScores(row["scores"], items)


def summary(answers: TaskScores) -> str:
    """The accuracies in a line."""
    scores = answers.scores.items()
    return ", ".join(f"{task} {found['acc']:.3f} / {found['acc_norm']:.3f}" for task, found in scores)


def table(args: Namespace) -> None:
    """One Markdown table for each share of channels removed."""
    folder = Path(args.out)
    _, dense = answers_of(folder / "dense.json")
    rows = [answers_of(path) for path in sorted(folder.glob("*, * %.json"))]
    tasks = list(dense.scores)
    for removed in sorted({row["removed"] for row, _ in rows}):
        found = {row["cell"]: answers for row, answers in rows if row["removed"] == removed}
        print(f"\n{removed} % of the FFN channels removed; {args.metric}, all items\n")
        show("cell", [*tasks, "minus dense", "p", "", "minus mix", "p", ""])
        show("---", ["---"] * (len(tasks) + 6))
        show("dense", [*scores(dense, tasks, args.metric), *[""] * 6])
        order = sorted(found, key=lambda name: -difference(found[name], dense, args.metric).difference)
        for name in order:
            to_mix = difference(found[name], found[MIX], args.metric) if MIX in found and name != MIX else None
            compared = [*shown(difference(found[name], dense, args.metric)), *shown(to_mix)]
            show(name, [*scores(found[name], tasks, args.metric), *compared])


def scores(answers: TaskScores, tasks: list[str], metric: str) -> list[str]:
    """The score of each task with its standard error."""
    found = [answers.scores[task] for task in tasks]
    return [f"{score[metric]:.3f} ± {score[f'{metric}_stderr']:.3f}" for score in found]


def difference(answers: TaskScores, other: TaskScores, metric: str) -> Paired:
    """How two cells differ over the items of all tasks."""
    pairs = paired_tasks(answers, other)
    return pairs.get(ALL, next(iter(pairs.values())))[metric]


def shown(found: Paired | None) -> list[str]:
    """A difference in three cells of the table."""
    if found is None:
        return ["", "", ""]
    return [f"{found.difference:+.3f} ± {found.stderr:.3f}", f"{found.p_value:.4f}", found.verdict]


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run or show."""
    parser = ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(required=True)
    running, showing = modes.add_parser("run"), modes.add_parser("table")
    running.set_defaults(mode=run)
    showing.set_defaults(mode=table)
    running.add_argument("model")
    add_arguments(running)
    for one in (running, showing):
        one.add_argument("out", help="folder with the results")
    showing.add_argument("--metric", default="logprob", choices=("acc", "acc_norm", "logprob"))
    add_grid_arguments(running, '"mix*" or "* only"', samples=128)
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--recovery-tokens", type=int, default=200_000, help="for the cell with recovery")
    running.add_argument("--limit", type=int, help="items per task; by default all of them")
    running.add_argument("--tasks", nargs="+", help="files or names of tasks, in place of DATA/tasks/*.jsonl")
    args = parser.parse_args(argv)
    disable_progress_bar()
    args.mode(args)


if __name__ == "__main__":
    main()
