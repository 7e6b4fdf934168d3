"""What training after pruning brings back, over tokens, with and without a teacher, as a Markdown table.

    python examples/benchmarks/benchmark_recovery.py MODEL DATA [--tokens 25000 50000 100000 200000] [--bf16]
    python examples/benchmarks/benchmark_recovery.py MODEL DATA --ways text "text and answers" ...

Each way of training is one run over as many tokens as the last number says, measured on the way at the others.

DATA holds `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. `heldout/` has other documents
of the training domains, `unseen/` has domains that neither calibration nor training saw. Beside the perplexities
stands the share of the log-perplexity gap between dense and pruned that is closed. With `--left-out`, a kind of
text in `calibration/` that nothing is calibrated or trained on is all that is measured, so that a choice can be made
without the evaluation text.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from copy import deepcopy
from math import log
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter
from typing import Any

import torch
from quality import DOMAINS, calibration, show, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, Recovery, RecoveryConfig, StructPruneConfig, perplexity, prune_model
from optimum_structprune.domains.load import load_domains
from optimum_structprune.recovery.text import sample_length


# What the rows train, and by what.
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},  # without a teacher
    "text": {"answer_share": 0.0},
    "answers": {"answer_share": 1.0},
    "text and answers": {},
    "text and answers, all weights": {"train": "full"},
}


class Curve(TrainerCallback):
    """Measures a model while it trains, and does not count the time that this takes.

    Args:
        marks: Training tokens after which to measure.
        measure: Gets the model, the tokens seen and the seconds of training so far.
        seq_length: The number of tokens in each sample.
    """

    def __init__(self, marks: list[int], measure: Callable[[torch.nn.Module, int, float], None], seq_length: int):
        self.marks, self.measure, self.seq_length = sorted(marks), measure, seq_length
        self.measuring = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seen = state.global_step * per_step * self.seq_length
        if not self.marks or seen < self.marks[0]:
            return
        self.marks = [mark for mark in self.marks if mark > seen]
        start = perf_counter()
        self.measure(model, seen, start - self.start - self.measuring)
        self.measuring += perf_counter() - start


def evaluation_samples(folder: Path, names: list[str], tokenizer, args: Namespace) -> dict[str, torch.Tensor]:
    """Samples of each file in a folder, the same for every row."""
    domains = [DomainConfig(name=name, source=str(folder / f"{name}.jsonl")) for name in names]
    samples = args.eval_samples * len(names)
    fields = {"domains": domains, "num_samples": samples, "seq_length": args.seq_length, "general_share": 0.0}
    config = StructPruneConfig(sparsity=0.5, **fields)
    return {domain.name: domain.samples for domain in load_domains(config, tokenizer)}


def run(args: Namespace) -> dict[str, dict]:
    """Prune once, then recover a copy for each row and evaluate it."""
    data = Path(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=args.device)
    unseen = args.left_out or sorted(path.stem for path in (data / "unseen").glob("*.jsonl"))
    kinds = [name for name in args.domains if name not in args.left_out]
    seen = [] if args.left_out else [name for name in kinds if ":" not in name]
    texts = evaluation_samples(data / "heldout", seen, tokenizer, args) if seen else {}
    if unseen:
        texts |= evaluation_samples(data / ("calibration" if args.left_out else "unseen"), unseen, tokenizer, args)
    domains = calibration(args, kinds)
    pruning = StructPruneConfig(
        widths={"mlp": args.mlp},
        domains=domains,
        general_share=0.0,
        num_samples=args.samples * len(domains),
        seq_length=args.seq_length,
    )
    results: dict[str, dict] = {}

    def row(name: str, measured, seconds: float = 0.0) -> None:
        with torch.autocast(measured.device.type, torch.bfloat16, enabled=args.bf16):
            ppl = {text: perplexity(measured, samples) for text, samples in texts.items()}
        means = {part: geometric_mean(ppl[n] for n in names) for part, names in parts.items()}
        results[name] = {"perplexity": ppl, **means, "seconds": seconds}
        closed = {part: closed_gap(results, part, means[part]) for part in means}
        show(name, [*means.values(), *closed.values(), *ppl.values(), f"{seconds:.0f}"])
        if args.json:
            write_json(args.json, results)

    parts = {part: names for part, names in (("heldout", seen), ("unseen", unseen)) if names}
    heads = ["held-out" if part == "heldout" else part for part in parts]
    show("row", [*heads, *(f"{head} closed" for head in heads), *texts, "seconds"])
    show("---", ["---"] * (2 * len(parts) + len(texts) + 1))
    row("dense", model)
    pruned = prune_model(model, pruning, tokenizer)
    row("pruned", pruned)
    for way in args.ways:
        settings = recovery_config(args, way)
        curve = Curve(
            args.tokens[:-1],
            lambda trained, seen, seconds, way=way: row(f"{way}, {seen:,} tokens", trained, seconds),
            sample_length(settings, pruned),
        )
        recovery = Recovery(settings, pruning, [curve])
        recovered = recovery.recover_model(deepcopy(pruned), tokenizer, None if way == "LoRA" else model)
        row(f"{way}, {recovery.report.tokens:,} tokens", recovered, recovery.report.seconds - curve.measuring)
        print(recovery.report)
    return results


def recovery_config(args: Namespace, way: str) -> RecoveryConfig:
    """The defaults, and what the flags say."""
    given = {"learning_rate": args.learning_rate, "lr_scheduler_type": args.schedule}
    training = {name: value for name, value in given.items() if value is not None}
    training |= {"bf16": args.bf16, "disable_tqdm": True}
    if args.batch_size is not None:
        training["per_device_train_batch_size"] = args.batch_size
    return RecoveryConfig(tokens=args.tokens[-1], training=training, seed=args.seed, **WAYS[way])


def closed_gap(results: dict[str, dict], part: str, value: float) -> float:
    """Share of the log-perplexity gap between dense and pruned that is gone."""
    if "pruned" not in results:
        return float("nan")
    dense, pruned = (log(results[name][part]) for name in ("dense", "pruned"))
    return (pruned - log(value)) / (pruned - dense)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--mlp", type=int, default=1152, help="FFN width to keep")
    parser.add_argument(
        "--domains", nargs="+", default=list(DOMAINS), help="files of DATA/calibration, or sources such as self:any"
    )
    parser.add_argument("--left-out", nargs="+", default=[], help="files of DATA/calibration that are only measured")
    parser.add_argument("--tokens", nargs="+", type=int, default=[25_000, 50_000, 100_000, 200_000], help="rows")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=["LoRA", "text and answers"])
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
    parser.add_argument("--json")
    disable_progress_bar()
    args = parser.parse_args(argv)
    args.tokens.sort()
    run(args)


if __name__ == "__main__":
    main()
