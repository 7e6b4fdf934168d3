"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from pathlib import Path

from ..errors import StructPruneError
from .arguments import ARCH, LOADING, OVERWRITE, Command, recovery_config, switch, valued
from .output import Result
from .recovering import RESULT, check_push_arguments, pushed, recover_and_save, recovery_for


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


FLAGS = {
    "model": valued("Folder or id of the pruned model."),
    "output": valued("Folder for the recovered model."),
    "--teacher": valued("The model to agree with, usually the dense one.", "MODEL"),
    "--resume": switch("Go on from the last checkpoint of the same command."),
    "--adapter": {
        "help": "Save the adapter and do not merge it: the same as --no-merge.",
        **{"dest": "merge", "action": "store_const", "const": False, "default": SUPPRESS},
    },
    **OVERWRITE,
    **RESULT,
    **ARCH,
    **LOADING,
}
HELP = "Train a pruned model, with or without a teacher, and save it."
COMMANDS = (Command("recover", HELP, run, FLAGS, config="RecoveryConfig"),)
