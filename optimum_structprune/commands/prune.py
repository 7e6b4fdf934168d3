"""`structprune prune`: a model in, a smaller model out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from .arguments import add_config_arguments, add_model_arguments, add_path_arguments, pruning_config
from .output import Result, add_output_arguments, note


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig

NAME = "prune"
HELP = "Prune a model and save one that plain from_pretrained loads."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one that is given overrides the config file."""
    from ..config.pruning import StructPruneConfig
    from .recovering import add_worse_argument

    add_path_arguments(parser, "Model id or folder.", "Folder for the pruned model.")
    parser.add_argument(
        "--recover", action="store_true", help="Train afterwards, with the dense model as the teacher; see --recovery."
    )
    parser.add_argument(
        "--recovery-tokens",
        dest="recovery",
        action="append",
        type=lambda text: ("tokens", int(text)),
        metavar="N",
        help="The same, with this number of training tokens: short for --recovery tokens=N.",
    )
    add_worse_argument(parser)
    add_model_arguments(parser)
    add_output_arguments(parser, reads_text=True)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> Result:
    """Prune, save, and show what came of it."""
    from dataclasses import replace

    from ..pruner import AutoStructPruner
    from ..recovery.checks import check_recovery
    from .loading import load_model_and_tokenizer
    from .recovering import recover_and_save, recovery_for

    config = pruning_config(args)
    # The pruned model is saved before it is trained, so that an interruption loses nothing.
    recovery = None if config.recovery is None or config.recovery.every_round else config.recovery
    config = config if recovery is None else replace(config, recovery=None)
    _check_folders(args, config, recovery)
    pruner = AutoStructPruner.from_config(config)
    model, tokenizer = load_model_and_tokenizer(
        args.model, args.dtype, args.device, args.trust_remote_code, config.arch_file
    )
    if recovery is not None:
        check_recovery(recovery, config, model)  # before it is pruned in vain
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    report = pruner.report
    assert report is not None
    text = f"{report}\n{_where(pruned.config, args.output, config.arch_file)}"
    values = {**report.to_dict(), "output": args.output}
    if recovery is not None:
        note(args, f"the pruned model is saved to {args.output}; now it is trained")
        trained = recover_and_save(
            recovery_for(recovery, args.output, config),
            pruned,
            tokenizer,
            args.output,
            pruned_folder=args.output,
            teacher=args.model,
            overwrite=True,
            accept_worse=args.accept_worse,
            trust_remote_code=args.trust_remote_code,
            arch_file=config.arch_file,
        )
        return Result(f"{text}\n{trained.text}", {**values, "recovery": trained.values}, trained.code)
    return Result(text, values)


def _check_folders(args: Namespace, config: StructPruneConfig, recovery: RecoveryConfig | None) -> None:
    # Before a model is loaded in vain.
    from ..calibration.stored import Statistics
    from ..saving.target import check_apart, check_target, probe_target, used_paths

    check_target(args.output, args.overwrite, [args.model, *used_paths(config, recovery)])
    check_apart(args.output, config, recovery)
    probe_target(args.output, _result_bytes(args, config))
    if config.stats is not None:
        Statistics.load(config.stats)


def _result_bytes(args: Namespace, config: StructPruneConfig) -> int:
    """The size of the pruned model's weights; nothing where it cannot be told yet, and the run itself will say why."""
    import warnings

    from ..dryrun import dry_run
    from ..errors import StructPruneError
    from .loading import load_config, load_dtype

    dtype = load_dtype(args.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model_config = load_config(args.model, args.trust_remote_code)
            return dry_run(model_config, config, dtype, args.trust_remote_code).memory.after
    except StructPruneError:
        return 0


def _where(config: PretrainedConfig, output: str, arch_file: str | None) -> str:
    from ..arch.meta import model_class

    call = f"{model_class(config, arch_file).__name__}.from_pretrained({output!r})"
    where = f"saved to {output}; it loads with {call}"
    if config.get_text_config().is_heterogeneous:
        where += (
            "\nonce optimum_structprune is imported, or with trust_remote_code=True, since its layers differ in width"
        )
    return where
