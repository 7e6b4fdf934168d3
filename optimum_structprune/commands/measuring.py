"""Measures models: what `evaluate`, `report` and `compare` share, and the flags of `benchmark`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import SOURCES, add_arch_argument, add_loading_arguments, domain


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.evaluate import Evaluation


def add_measuring_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say what is measured, and how the models are loaded."""
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        type=domain,
        metavar="NAME=SOURCE",
        help=f"Text that is read in its own order. Repeatable. {SOURCES}",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME|FILE.jsonl",
        help="A task of lm_eval, or a file of multiple-choice items in lines of JSON. Repeatable.",
    )
    parser.add_argument(
        "--tasks", dest="task", action="extend", nargs="+", metavar="NAME|FILE.jsonl", help="Several of them."
    )
    parser.add_argument(
        "--items",
        metavar="FOLDER",
        help="A folder that keeps the answers to each item of a task, so that a run goes on where it was killed, and "
        "the dense model answers once for all models that are compared with it.",
    )
    parser.add_argument("--seq-length", type=int, default=512, metavar="N", help="Tokens per sample (512).")
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="Samples per domain at most; by default each domain is read to its end.",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="Items per task at most; by default all of them.")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="Sequences per forward pass (1).")
    add_arch_argument(parser)
    add_loading_arguments(parser)


def add_timing_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say how time is measured."""
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="Tokens to write after it (32).")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="Timed runs of each model, in turns (9).")
    parser.add_argument("--threads", type=int, metavar="N", help="Threads; by default what torch is set to.")
    parser.add_argument(
        "--clock", default="wall", help="wall (default), or cpu: time of the processor, where other jobs run too."
    )


def measured(args: Namespace, model_name: str, dense_name: str | None) -> Evaluation:
    """What the flags of `add_measuring_arguments` ask for."""
    from .loading import load_model_and_tokenizer

    loading = (args.dtype, args.device, args.trust_remote_code, args.arch_file)
    model, tokenizer = load_model_and_tokenizer(model_name, *loading)
    dense = load_model_and_tokenizer(dense_name, *loading)[0] if dense_name else None
    return measured_of(args, model, tokenizer, dense)


def measured_of(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dense: PreTrainedModel | None = None,
) -> Evaluation:
    """What `measured` gives, of models that are loaded."""
    from ..evaluation.evaluate import evaluate

    return evaluate(
        model,
        tokenizer,
        args.domain,
        args.task,
        dense,
        seq_length=args.seq_length,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        limit=args.limit,
        items=args.items,
    )


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it, numbered where that is the same too.

    The same model twice shows how far the measurement is from 1 where nothing differs.
    """
    short = Counter(Path(path).name for path in paths)
    names = [Path(path).name if short[Path(path).name] == 1 else path for path in paths]
    return [
        f"{name} ({names[:number].count(name) + 1})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]
