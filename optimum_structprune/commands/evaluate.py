"""`structprune evaluate`: perplexity by domain, closeness to the dense model, and tasks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .arguments import add_loading_arguments, domain


NAME = "evaluate"
HELP = "Measure a model by perplexity and tasks, alone or against the dense one."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", help="Model id or folder.")
    parser.add_argument("--against", metavar="DENSE", help="Dense model to compare with.")
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        type=domain,
        metavar="NAME=SOURCE",
        help="Text, read in its own order: whatever `prune` takes; repeatable.",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME|FILE.jsonl",
        help="Task that lm_eval has, or multiple-choice items in lines of JSON; repeatable.",
    )
    parser.add_argument("--seq-length", type=int, default=512, help="Tokens per sample (512).")
    parser.add_argument("--num-samples", type=int, help="Samples per domain at most; all that there are by default.")
    parser.add_argument("--limit", type=int, help="Items per task at most.")
    parser.add_argument("--batch-size", type=int, default=1, help="Sequences per forward pass (1).")
    parser.add_argument("--json", metavar="FILE", help="Write the numbers here as well.")
    add_loading_arguments(parser)


def run(args: Namespace) -> int:
    """Measure and show."""
    from ..errors import StructPruneError
    from ..evaluation.evaluate import evaluate
    from .loading import load_model_and_tokenizer

    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise StructPruneError(f"--json {args.json}: there is no folder {Path(args.json).parent}.")
    how = (args.dtype, args.device, args.trust_remote_code)
    model, tokenizer = load_model_and_tokenizer(args.model, *how)
    dense = load_model_and_tokenizer(args.against, *how)[0] if args.against else None
    found = evaluate(
        model,
        tokenizer,
        args.domain,
        args.task,
        dense,
        seq_length=args.seq_length,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        limit=args.limit,
    )
    if args.json:
        found.save(args.json)
    print(found)
    return 0
