"""What each stage of a whole pruning costs in CPU seconds, as multiples of F: what plain forward passes of the decoder
over the calibration samples take.

    python examples/benchmarks/benchmark_stages.py MODEL [--runs uniform sensitivity tokens] [--num-samples 24]

The runs are a pruning to one width, one whose widths follow from measured losses, and one in which tokens and layers
compete for a budget. Prose, code and maths are built in, and a fifth of the text is the model's own.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from time import process_time
from unittest.mock import patch

import torch
from benchmark_cost import forward_seconds
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import builtin_domains
from optimum_structprune.system import stages


def runs(width: int) -> dict[str, Mapping[str, object]]:
    """The fields of the config of each run, for an FFN of this width."""
    three_quarters = {"widths": {"mlp": width * 3 // 4}}
    return {
        "uniform": three_quarters,
        "sensitivity": {**three_quarters, "allocation": "sensitivity"},
        "tokens": {"budget": {"parameters": 0.5}, "targets": ("vocab", "mlp"), "allocation": "sensitivity"},
    }


def run(args: Namespace) -> None:
    """Prune and print."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer, fields = AutoTokenizer.from_pretrained(args.model), runs(describe(model).of("mlp")[0].width)
    samples = torch.randint(1000, (args.num_samples, args.seq_length)) % model.config.get_text_config().vocab_size
    forward_seconds(model, samples[:4], 4)
    print("| run | CPU s | of which F | x F | stages, x F |\n|---|---|---|---|---|")
    for name in args.runs:
        text = {"domains": builtin_domains(), "num_samples": args.num_samples, "seq_length": args.seq_length}
        pruner = StructPruner(StructPruneConfig(**text, **fields[name]))
        before = forward_seconds(model, samples, 4, process_time)
        with TemporaryDirectory() as home, patch.object(constants, "HF_HOME", home):
            with patch.object(stages, "perf_counter", process_time):
                start = process_time()
                pruner.prune_model(model, tokenizer)
                spent = process_time() - start
        forward = (before + forward_seconds(model, samples, 4, process_time)) / 2
        parts = ", ".join(f"{stage} {seconds / forward:.2f}" for stage, seconds in pruner.report.seconds.items())
        print(f"| {name} | {spent:.1f} | {forward:.1f} | {spent / forward:.2f} | {parts} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--runs", nargs="+", choices=runs(4), default=["uniform", "sensitivity"])
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--seq-length", type=int, default=256)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
