"""`structprune prune`: a model in, a smaller model out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any


NAME = "prune"
HELP = "Prune a model and save one that plain from_pretrained loads."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one given overrides the config file."""
    parser.add_argument("model", help="Model id or folder.")
    parser.add_argument("output", help="Folder for the pruned model.")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the fields of StructPruneConfig.")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, help="Share of the blocks' parameters to remove, such as 0.2.")
    amount.add_argument(
        "--width", action="append", type=_width, metavar="SPACE=N", help="Units to keep, such as mlp=1152; repeatable."
    )
    parser.add_argument("--target", action="append", metavar="SPACE", help="Space that may shrink; repeatable.")
    parser.add_argument("--criterion", help="How units are scored, such as wanda.")
    parser.add_argument("--refit", help="How kept weights make up for removed ones.")
    parser.add_argument("--rounds", type=int, help="Times that calibration and removal are repeated.")
    parser.add_argument(
        "--domain",
        action="append",
        type=_domain,
        metavar="NAME=SOURCE[@WEIGHT]",
        help="Calibration text: a file, glob, folder, builtin:prose|code|math or Hub dataset; repeatable.",
    )
    parser.add_argument("--num-samples", type=int, help="Calibration blocks in all.")
    parser.add_argument("--seq-length", type=int, help="Tokens per block.")
    parser.add_argument("--batch-size", type=int, help="Blocks per forward pass.")
    parser.add_argument("--seed", type=int, help="Seed of everything random.")
    parser.add_argument("--arch", metavar="FILE", help="YAML file that describes an architecture of your own.")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16.")
    parser.add_argument("--device", help="Such as cpu or cuda; by default cuda where there is one.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the model.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output folder.")


def run(args: Namespace) -> int:
    """Prune, save, and show what came of it."""
    from ..hub import check_target
    from ..pruner import AutoStructPruner
    from .loading import load_model_and_tokenizer

    config = config_from(args)
    check_target(args.output, args.overwrite)
    pruner = AutoStructPruner.from_config(config)
    model, tokenizer = load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, config.arch_file
    )
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    print(pruner.report)
    print(f"saved to {args.output}; it loads with AutoModelForCausalLM.from_pretrained({args.output!r})")
    return 0


def config_from(args: Namespace):
    """The config file, if any, with the flags laid over it."""
    from ..config import StructPruneConfig, read_yaml

    values: dict[str, Any] = dict(read_yaml(args.config)) if args.config else {}
    if args.sparsity is not None:
        values.update(sparsity=args.sparsity, widths=None)
    if args.width:
        values.update(widths=dict(args.width), sparsity=None)
    flags = {
        "targets": args.target,
        "domains": args.domain,
        "arch_file": args.arch,
        **{
            name: getattr(args, name)
            for name in ("criterion", "refit", "rounds", "num_samples", "seq_length", "batch_size", "seed")
        },
    }
    values.update({name: value for name, value in flags.items() if value is not None})
    return StructPruneConfig.from_dict(values)


def _width(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, int(number)


def _domain(text: str) -> dict[str, Any]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise ValueError(f"expected NAME=SOURCE[@WEIGHT], got {text!r}")
    head, at, weight = source.rpartition("@")
    try:
        return {"name": name, "source": head, "weight": float(weight)} if at else {"name": name, "source": source}
    except ValueError:
        return {"name": name, "source": source}
