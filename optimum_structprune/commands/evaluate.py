"""`structprune evaluate`: perplexity by domain, closeness to the dense model, and tasks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .arguments import add_arch_argument, add_loading_arguments, add_text_arguments
from .output import Result, add_output_arguments


NAME = "evaluate"
HELP = "Measure a model by perplexity and tasks, alone or against the dense one."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", help="Model id or folder.")
    parser.add_argument("--against", metavar="DENSE", help="The dense model to compare with.")
    add_text_arguments(parser)
    add_arch_argument(parser)
    add_loading_arguments(parser)
    add_output_arguments(parser, file=True, reads_text=True)


def run(args: Namespace) -> Result:
    """Measure the model."""
    from ..evaluation.evaluate import evaluate
    from .loading import load_model_and_tokenizer

    loading = (args.dtype, args.device, args.trust_remote_code, args.arch_file)
    model, tokenizer = load_model_and_tokenizer(args.model, *loading)
    dense = load_model_and_tokenizer(args.against, *loading)[0] if args.against else None
    evaluation = evaluate(
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
    return Result(str(evaluation), evaluation.to_dict())
