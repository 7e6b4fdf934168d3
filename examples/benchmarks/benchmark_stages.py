"""Measure the CPU seconds of each stage of a pruning, and compare them with the estimate of `plan --cost`.

    python examples/benchmarks/benchmark_stages.py MODEL [--runs uniform sensitivity tokens trim recovery] \
        [--text DOMAIN.jsonl ...] [--dtype bfloat16]

Each run has the default number of samples and starts with an empty cache, so that the model writes its share of the
text. `uniform` and `sensitivity` remove a quarter of the FFN channels, `tokens` divides a budget between tokens and
layers, `trim` removes a quarter of the parameters by tokens alone, and `recovery` trains after `uniform`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneConfig, StructPruner, dry_run
from optimum_structprune.arch.load import describe
from optimum_structprune.system import stages


RUNS = ("uniform", "sensitivity", "tokens", "trim", "recovery")
# Stages that remove no units. All other stages of a report are one stage of an estimate, `pruning`.
OTHER_STAGES = ("domains", "other text", "writing", "perplexity", "languages", "vocabulary", "search", "recovery")


def config_of(args: Namespace, name: str, width: int) -> StructPruneConfig:
    """Return the config of a run for a model with this FFN width."""
    fields: dict[str, Any] = {"widths": {"mlp": width * 3 // 4}}
    if name == "tokens":
        fields = {"budget": {"parameters": 0.5}, "targets": ("vocab", "mlp")}
    if name == "trim":
        fields = {"budget": {"parameters": 0.75}, "targets": ("vocab",), "languages": ("de", "en")}
    if name in ("sensitivity", "tokens"):
        fields["allocation"] = "sensitivity"
    if name == "recovery":
        fields["recovery"] = RecoveryConfig(tokens=args.tokens)

    domains = [DomainConfig(Path(path).stem, path) for path in args.text]
    return StructPruneConfig(
        domains=domains or None, num_samples=args.num_samples, seq_length=args.seq_length, **fields
    )


def compared(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, tuple[float, float]]:
    """Prune a model, and return the measured and the estimated CPU seconds of each stage."""
    plan = dry_run(model.config, config, model.dtype, cost=True, device="cpu", tokenizer=tokenizer)
    assert plan.cost is not None
    estimated = dict(plan.cost.seconds)
    # Only the command line asks questions.
    estimated.pop("answers", None)
    if plan.recovery is not None:
        estimated.update(plan.recovery.seconds)

    pruner = StructPruner(config)
    # An empty cache contains no generated text of earlier runs. The report counts CPU seconds too.
    with TemporaryDirectory() as cache, patch.object(constants, "HF_HOME", cache):
        with patch.object(stages, "perf_counter", process_time):
            pruner.prune_model(model, tokenizer)

    measured = dict.fromkeys(estimated, 0.0)
    for stage, seconds in pruner.result.report.seconds.items():
        name = stage
        if stage not in OTHER_STAGES:
            name = "pruning"
        measured[name] = measured.get(name, 0.0) + seconds
    return {stage: (seconds, estimated.get(stage, 0.0)) for stage, seconds in measured.items()}


def run(args: Namespace) -> None:
    """Prune in each way and print the table."""
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    print("| run | stage | CPU s | estimate, s | run / estimate |\n|---|---|---|---|---|")
    for name in args.runs:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        width = describe(model).of("mlp")[0].width
        by_stage = dict(compared(config_of(args, name, width), model, tokenizer))
        by_stage["all"] = tuple(map(sum, zip(*by_stage.values(), strict=True)))
        for stage, (measured, estimated) in by_stage.items():
            ratio = f"{measured / estimated:.2f}" if estimated else "–"
            print(f"| {name} | {stage} | {measured:.1f} | {estimated:.1f} | {ratio} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["uniform", "sensitivity"])
    parser.add_argument("--text", nargs="*", default=[], help="files of domains; by default the built-in text")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_000, help="training tokens of `recovery`")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
