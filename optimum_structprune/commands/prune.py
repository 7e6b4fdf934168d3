"""`structprune prune`: a model in, a smaller model out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from .arguments import (
    add_calibration_arguments,
    add_config_arguments,
    add_model_arguments,
    add_path_arguments,
    budget,
    width,
)


NAME = "prune"
HELP = "Prune a model and save one that plain from_pretrained loads."
# Fields of the config that a flag overrides, by the flag's name.
FIELDS = {
    "target": "targets",
    "domain": "domains",
    "arch": "arch_file",
    "skip_layer": "skip_layers",
    **{
        name: name
        for name in (
            "allocation round_to criterion normalisation aggregation refit damping error_feedback rounds schedule "
            "stats adaptive_rate objective max_perplexity_ratio checkpoint_dir keep_rounds "
            "select num_samples seq_length batch_size seed"
        ).split()
    },
}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one given overrides the config file."""
    add_path_arguments(parser, "Model id or folder.", "Folder for the pruned model.")
    add_amount_arguments(parser)
    add_round_arguments(parser)
    parser.add_argument("--stats", metavar="FOLDER", help="What `calibrate` wrote, in place of running text.")
    add_calibration_arguments(parser)
    parser.add_argument("--recover", action="store_true", help="Train afterwards, the dense model being the teacher.")
    parser.add_argument("--recovery-tokens", type=int, metavar="N", help="Training tokens in all; implies --recover.")
    add_model_arguments(parser)


def add_round_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say what happens from round to round."""
    parser.add_argument("--rounds", type=int, help="Times that calibration and removal are repeated.")
    parser.add_argument("--schedule", help="How the rounds divide the removal: linear, geometric or cubic.")
    parser.add_argument("--adaptive-rate", type=float, help="How fast domains that lose more come to count more.")
    parser.add_argument("--objective", help="mean, or worst so that no domain is left behind.")
    parser.add_argument(
        "--max-perplexity-ratio", type=float, metavar="R", help="Stop before a domain's perplexity exceeds R x dense."
    )
    parser.add_argument("--checkpoint-dir", metavar="DIR", help="Remembers each round; the same call goes on from it.")
    parser.add_argument(
        "--keep-rounds", action="store_const", const=True, help="Also leave the model of each round there."
    )


def add_amount_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that say what is removed and how."""
    add_config_arguments(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, help="Share of the layers' parameters to remove, such as 0.2.")
    amount.add_argument(
        "--width", action="append", type=width, metavar="SPACE=N", help="Units to keep, such as mlp=1152; repeatable."
    )
    amount.add_argument(
        "--budget",
        type=budget,
        metavar="WHAT=N",
        help="Most that the model may have: parameters=110e6, bytes=300e6 or cache_bytes_per_token=9000.",
    )
    parser.add_argument("--target", action="append", metavar="SPACE", help="Space that may shrink; repeatable.")
    parser.add_argument("--allocation", help="uniform: one width for all layers; global, sensitivity: its own.")
    parser.add_argument("--skip-layer", type=int, action="append", metavar="N", help="Block left whole; repeatable.")
    parser.add_argument("--round-to", type=int, metavar="N", help="Chosen channel widths are multiples of this.")
    parser.add_argument("--normalisation", help="Scale of the domains' evidence: none, energy, zscore or rank.")
    parser.add_argument("--aggregation", help="One score from many domains: mean, max, harmonic or quantile.")
    parser.add_argument("--refit", help="How kept weights make up for removed ones.")
    parser.add_argument("--damping", type=float, help="Ridge of the refit toward the original weights.")
    parser.add_argument(
        "--error-feedback", type=float, help="Share of the stream's error so far that refits make up for."
    )


def run(args: Namespace) -> int:
    """Prune, save, and show what came of it."""
    from dataclasses import replace

    from ..calibration.stored import Statistics
    from ..pruner import AutoStructPruner
    from ..saving.staging import check_target
    from .loading import load_model_and_tokenizer
    from .recover import heal

    config = config_from(args)
    # The pruned model is saved before it is trained, so that an interruption loses nothing.
    later = None if config.recovery is None or config.recovery.every_round else config.recovery
    config = config if later is None else replace(config, recovery=None)
    check_target(args.output, args.overwrite)
    if config.stats is not None:
        Statistics.load(config.stats)  # before a model is loaded for nothing
    pruner = AutoStructPruner.from_config(config)
    model, tokenizer = load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, config.arch_file
    )
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    print(pruner.report)
    where = f"AutoModelForCausalLM.from_pretrained({args.output!r})"
    print(f"saved to {args.output}; it loads with {where}")
    if pruned.config.get_text_config().is_heterogeneous:
        print("once optimum_structprune is imported, or with trust_remote_code=True, since its layers differ in width")
    if later is None:
        return 0
    return heal(args, later, config, pruned, tokenizer, args.model, args.output, overwrite=True)


def config_from(args: Namespace, sparsity: float | None = None):
    """The config file, if any, with the flags laid over it.

    Args:
        args: The flags.
        sparsity: Stands where neither the file nor a flag says how much is removed.
    """
    from ..config.fields import read_yaml
    from ..config.pruning import AMOUNTS, StructPruneConfig

    given = {name: value for name, value in vars(args).items() if value is not None}
    values: dict[str, Any] = dict(read_yaml(args.config)) if args.config else {}
    amounts = {"sparsity": given.get("sparsity"), "widths": dict(given.get("width", ())) or None}
    amounts["budget"] = dict([given["budget"]]) if "budget" in given else None
    if any(value is not None for value in amounts.values()):
        values.update(amounts)
    if all(values.get(name) is None for name in AMOUNTS):
        values["sparsity"] = sparsity
    if given.get("recover") or "recovery_tokens" in given:
        tokens = {"tokens": given["recovery_tokens"]} if "recovery_tokens" in given else {}
        values["recovery"] = {**(values.get("recovery") or {}), **tokens}
    values.update({field: given[flag] for flag, field in FIELDS.items() if flag in given})
    return StructPruneConfig.from_dict(values)
