"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

from ..errors import StructPruneError
from .arguments import Command, add_config_arguments, add_loading_arguments, add_path_arguments, recovery_config
from .output import Result, add_output_arguments
from .recovering import add_result_arguments, check_push_arguments, pushed, recover_and_save, recovery_for


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
        default=SUPPRESS,
        help="Save the adapter and do not merge it: the same as --no-merge.",
    )
    add_result_arguments(parser)
    add_loading_arguments(parser, arch=True)
    add_output_arguments(parser, reads_text=True)
    add_config_arguments(parser, RecoveryConfig)


def run(args: Namespace) -> Result:
    """Train, save, and show what came of it."""
    from ..config.pruning import CONFIG_NAME, StructPruneConfig
    from ..recovery.checks import check_recovery
    from ..system.disk import Output, check_apart, used_paths
    from .loading import Loading, weights_bytes

    config = recovery_config(args)
    _check_whole(args.model)
    check_push_arguments(args)
    has_config = (Path(args.model) / CONFIG_NAME).is_file()
    pruning = StructPruneConfig.from_pretrained(args.model) if has_config else None
    # The recovered model may take the place of the pruned one; an adapter may not, since it needs that model.
    needed = None if config.merge else args.model
    used = [needed, args.teacher, args.arch_file, *used_paths(config, pruning)]
    Output(args.output, args.overwrite, used).check(weights_bytes(args.model) if config.merge else 0)
    check_apart(args.output, config)
    recovery = recovery_for(config, args.output, pruning)
    check_recovery(config, recovery.pruning, parts=1)
    model, tokenizer = Loading.of(args).model_and_tokenizer(args.model)
    result = recover_and_save(
        args,
        recovery,
        model,
        tokenizer,
        pruned_folder=args.model,
        teacher=args.teacher,
        arch_file=args.arch_file,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    return pushed(args, result)


def _check_whole(model: str) -> None:
    """Refuse a folder that holds an adapter and no model."""
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise StructPruneError(
            f"{model} holds an adapter and no model. In Python, load_adapter(pruned_model, {model!r}) puts it on the "
            "pruned model that it was trained on; merge_and_unload() and save_pretrained(…) then give a folder that "
            "this command takes."
        )


COMMANDS = (Command("recover", "Train a pruned model, with or without a teacher, and save it.", add_arguments, run),)
