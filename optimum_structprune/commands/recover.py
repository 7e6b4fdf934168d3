"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .arguments import (
    add_arch_argument,
    add_config_arguments,
    add_model_arguments,
    add_path_arguments,
    recovery_config,
)


NAME = "recover"
HELP = "Train a pruned model with LoRA, with or without a teacher, and save it."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one that is given overrides the config file."""
    from ..config.recovery import RecoveryConfig

    add_path_arguments(parser, "Folder or id of the pruned model.", "Folder for the recovered model.")
    parser.add_argument("--teacher", metavar="MODEL", help="The model to agree with, usually the dense one.")
    parser.add_argument("--resume", action="store_true", help="Go on from the last checkpoint of the same command.")
    parser.add_argument(
        "--adapter",
        dest="merge",
        action="store_const",
        const=False,
        help="Save the adapter and do not merge it: the same as --no-merge.",
    )
    add_arch_argument(parser)
    add_model_arguments(parser)
    add_config_arguments(parser, RecoveryConfig)


def run(args: Namespace) -> int:
    """Train, save, and show what came of it."""
    from ..config.pruning import CONFIG_NAME, StructPruneConfig
    from ..recovery.checks import check_recovery
    from ..recovery.recover import Recovery
    from ..saving.staging import check_target
    from .loading import load_model_and_tokenizer, load_tokenizer
    from .recovering import recover_and_save

    config = recovery_config(args)
    check_target(args.output, args.overwrite)
    known = (Path(args.model) / CONFIG_NAME).is_file()
    pruning = StructPruneConfig.from_pretrained(args.model) if known else None
    if config.teacher_logits is not None and args.teacher is not None:
        # Before the model is loaded, so that the two are never in memory together.
        recovery = Recovery(config, pruning)
        check_recovery(config, recovery.pruning)
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        recovery.write_teacher_logits(args.teacher, tokenizer, trust_remote_code=args.trust_remote_code)
    model, tokenizer = load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, args.arch_file
    )
    recover_and_save(
        model,
        tokenizer,
        config,
        args.output,
        pruned_folder=args.model,
        pruning=pruning,
        teacher=args.teacher,
        resume=args.resume,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        arch_file=args.arch_file,
    )
    return 0
