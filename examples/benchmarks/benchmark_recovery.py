"""Measure the recovery of a pruned model by the number of training tokens, with and without a teacher.

    python examples/benchmarks/benchmark_recovery.py MODEL DATA [--tokens 25000 50000 100000 200000] [--bf16]
    python examples/benchmarks/benchmark_recovery.py MODEL DATA --ways text "text and answers" ...

The script trains once in each way, on the last number of tokens, and measures the model at the other numbers during
this training. It prints a Markdown table.

DATA contains `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. `heldout/` has other
documents of the training domains. `unseen/` has domains that neither the calibration nor the training uses. "Closed"
is the recovered share of the log-perplexity gap between the original and the pruned model. With `--left-out`, the
script evaluates on files of `calibration/` only and does not calibrate or train on them, so that a choice needs no
look at the evaluation text.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from math import log
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter
from typing import Any

import torch
from quality import DOMAINS, calibration_domains, print_head, print_row, unseen_files, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, Recovery, RecoveryConfig, StructPruneConfig, perplexity, prune_model
from optimum_structprune.domains.load import load_domains
from optimum_structprune.recovery.text import sample_length


# The fields of the config for each way of training. "LoRA" has no teacher.
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "text": {"answer_share": 0.0},
    "answers": {"answer_share": 1.0},
    "text and answers": {},
    "text and answers, all weights": {"train": "full"},
}


class Curve(TrainerCallback):
    """Measures a model during the training, and excludes the time of the measurements.

    Args:
        marks: The numbers of training tokens at which to measure.
        measure: A function of the model, the training tokens and the seconds of training.
        seq_length: The number of tokens in each sample.
    """

    def __init__(self, marks: list[int], measure: Callable[[torch.nn.Module, int, float], None], seq_length: int):
        self.marks = sorted(marks)
        self.measure = measure
        self.seq_length = seq_length
        self.measuring = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        tokens = state.global_step * samples_per_step * self.seq_length
        if not self.marks or tokens < self.marks[0]:
            return

        self.marks = [mark for mark in self.marks if mark > tokens]
        start = perf_counter()
        self.measure(model, tokens, start - self.start - self.measuring)
        self.measuring += perf_counter() - start


class Table:
    """Measures models and prints one row for each.

    Args:
        args: The arguments of the benchmark.
        texts: The samples of each text.
        groups: The names of the texts by group, `heldout` or `unseen`.
    """

    def __init__(self, args: Namespace, texts: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]):
        self.args = args
        self.texts = texts
        self.groups = groups
        self.results: dict[str, dict[str, Any]] = {}

    def print_head(self) -> None:
        """Print the head of the table."""
        names = [group.replace("heldout", "held-out") for group in self.groups]
        columns = names + [f"{name} closed" for name in names]
        print_head("row", columns + list(self.texts) + ["seconds"])

    def add(self, name: str, model, seconds: float = 0.0) -> None:
        """Measure a model and print its row."""
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.args.bf16):
            perplexities = {text: perplexity(model, samples) for text, samples in self.texts.items()}

        result: dict[str, Any] = {"perplexity": perplexities}
        for group, names in self.groups.items():
            result[group] = geometric_mean(perplexities[text] for text in names)
        result["seconds"] = seconds
        self.results[name] = result

        values: list[str | float] = [result[group] for group in self.groups]
        values += [self.closed_gap(group, result[group]) for group in self.groups]
        values += perplexities.values()
        values.append(f"{seconds:.0f}")
        print_row(name, values)
        if self.args.json:
            write_json(self.args.json, self.results)

    def closed_gap(self, group: str, value: float) -> float:
        """Return the recovered share of the log-perplexity gap between the original and the pruned model."""
        if "pruned" not in self.results:
            return float("nan")
        original = log(self.results["original"][group])
        pruned = log(self.results["pruned"][group])
        return (pruned - log(value)) / (pruned - original)


def evaluation_samples(folder: Path, names: Sequence[str], tokenizer, args: Namespace) -> dict[str, Tensor]:
    """Return samples of the named files in a folder."""
    if not names:
        return {}

    config = StructPruneConfig(
        sparsity=0.5,
        domains=[DomainConfig(name=name, source=str(folder / f"{name}.jsonl")) for name in names],
        num_samples=args.eval_samples * len(names),
        seq_length=args.seq_length,
        general_share=0.0,
    )
    return {domain.name: domain.samples for domain in load_domains(config, tokenizer)}


def new_table(args: Namespace, kinds: Sequence[str], tokenizer) -> Table:
    """Read the evaluation text and return a table without rows.

    Args:
        args: The arguments of the benchmark.
        kinds: The domains of the calibration and of the training.
        tokenizer: The tokenizer of the model.
    """
    data = Path(args.data)
    if args.left_out:
        groups = {"unseen": args.left_out}
        return Table(args, evaluation_samples(data / "calibration", args.left_out, tokenizer, args), groups)

    groups = {
        "heldout": [name for name in kinds if ":" not in name],
        "unseen": [path.stem for path in unseen_files(data)],
    }
    groups = {group: names for group, names in groups.items() if names}
    texts = {}
    for group, names in groups.items():
        texts.update(evaluation_samples(data / group, names, tokenizer, args))
    return Table(args, texts, groups)


def run(args: Namespace) -> None:
    """Prune once, then recover and evaluate a copy in each way."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=args.device)

    kinds = [name for name in args.domains if name not in args.left_out]
    table = new_table(args, kinds, tokenizer)
    table.print_head()
    table.add("original", model)

    pruning = StructPruneConfig(
        widths={"mlp": args.mlp},
        domains=calibration_domains(args, kinds),
        general_share=0.0,
        num_samples=args.samples * len(kinds),
        seq_length=args.seq_length,
    )
    pruned = prune_model(model, pruning, tokenizer)
    table.add("pruned", pruned)

    for way in args.ways:
        teacher = model
        if way == "LoRA":
            teacher = None
        recover(args, way, pruning, pruned, tokenizer, teacher, table)


def recover(args: Namespace, way: str, pruning: StructPruneConfig, pruned, tokenizer, teacher, table: Table) -> None:
    """Train a copy of the pruned model in one way, and add its rows to the table."""

    def measure(model, tokens, seconds):
        table.add(f"{way}, {tokens:,} tokens", model, seconds)

    config = recovery_config(args, way)
    curve = Curve(args.tokens[:-1], measure, sample_length(config, pruned))

    recovery = Recovery(config, pruning, [curve])
    recovered = recovery.recover_model(deepcopy(pruned), tokenizer, teacher)
    measure(recovered, recovery.report.tokens, recovery.report.seconds - curve.measuring)
    print(recovery.report)


def recovery_config(args: Namespace, way: str) -> RecoveryConfig:
    """Return the default config with the values of the flags."""
    training = {"bf16": args.bf16, "disable_tqdm": True}
    if args.learning_rate is not None:
        training["learning_rate"] = args.learning_rate
    if args.schedule is not None:
        training["lr_scheduler_type"] = args.schedule
    if args.batch_size is not None:
        training["per_device_train_batch_size"] = args.batch_size
    return RecoveryConfig(tokens=args.tokens[-1], training=training, seed=args.seed, **WAYS[way])


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--mlp", type=int, default=1152, help="FFN width of the pruned model")
    parser.add_argument(
        "--domains", nargs="+", default=list(DOMAINS), help="files of DATA/calibration, or sources such as self:any"
    )
    parser.add_argument("--left-out", nargs="+", default=[], help="files of DATA/calibration to evaluate on only")
    parser.add_argument("--tokens", nargs="+", type=int, default=[25_000, 50_000, 100_000, 200_000], help="rows")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["LoRA", "text and answers"])
    parser.add_argument("--samples", type=int, default=12, help="calibration samples per domain")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=24, help="samples per evaluation file")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--schedule", help="of the learning rate, such as constant_with_warmup")
    parser.add_argument("--batch-size", type=int, help="samples in a step; by default it grows with the tokens")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--bf16", action="store_true", help="train and measure in bfloat16; the weights stay as loaded"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for all results")

    args = parser.parse_args(argv)
    disable_progress_bar()
    args.tokens.sort()
    run(args)


if __name__ == "__main__":
    main()
