"""`structprune prune`: a model in, a smaller model out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_config_arguments, add_model_arguments, add_path_arguments, pruning_config
from .output import Result, add_output_arguments, note


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig
    from ..pruner import StructPruner
    from ..system.disk import Output

NAME = "prune"
HELP = "Prune a model and save one that plain from_pretrained loads."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the flags; each one that is given overrides the config file."""
    from ..config.pruning import StructPruneConfig
    from .pushing import add_push_arguments
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Remember every finished layer in a folder beside the output, and go on from there if a run with the "
        "same settings was killed.",
    )
    add_push_arguments(parser)
    add_model_arguments(parser)
    add_output_arguments(parser, reads_text=True)
    add_config_arguments(parser, StructPruneConfig)


def run(args: Namespace) -> Result:
    """Prune, save, and show what came of it."""
    from ..pruner import AutoStructPruner
    from ..system.disk import Output, used_paths
    from ..system.processes import across_processes
    from .pushing import check_push_arguments, pushed

    config, recovery = _configs(args)
    check_push_arguments(args)
    pruner = AutoStructPruner.from_config(config)
    # Processes that were started together share the work.
    output = Output(args.output, args.overwrite, [args.model, *used_paths(config, recovery)])
    with across_processes(), output.locked():
        _check_folders(args, output, config, recovery)
        smaller, tokenizer = _prune_and_save(args, output, pruner, recovery)
        return pushed(args, _result(args, pruner, recovery, smaller, tokenizer))


def _result(
    args: Namespace,
    pruner: StructPruner,
    recovery: RecoveryConfig | None,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Result:
    """What came of it, with the training that may follow."""
    from ..system.processes import alone
    from .recovering import recover_and_save, recovery_for

    config, report = pruner.config, pruner.report
    assert report is not None
    text = f"{report}\n{_where(pruned.config, args.output, config.arch_file)}"
    values = {**report.to_dict(), "output": args.output}
    if recovery is None:
        return Result(text, values)
    note(args, f"the pruned model is saved to {args.output}; now it is trained")
    with alone():
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


def _configs(args: Namespace) -> tuple[StructPruneConfig, RecoveryConfig | None]:
    """How to prune, and how to train afterwards; the pruned model is saved in between, so that an interruption of the
    training loses nothing.
    """
    from dataclasses import replace

    from ..errors import StructPruneError

    config = pruning_config(args)
    recovery = None if config.recovery is None or config.recovery.every_round else config.recovery
    config = config if recovery is None else replace(config, recovery=None)
    if args.resume:
        if config.checkpoint_dir is not None:
            raise StructPruneError(
                f"checkpoint_dir={config.checkpoint_dir!r} remembers a run, and --resume does the same in a folder "
                "beside the output; leave out either."
            )
        config = replace(config, checkpoint_dir=str(_progress_folder(args.output)))
    if args.offload is not None and recovery is not None:
        raise StructPruneError(
            f"--offload {args.offload} prunes a model that does not fit, and recovery trains it in memory; leave out "
            f"recovery, and afterwards run `structprune recover {args.output} OUT --teacher {args.model}`."
        )
    return config, recovery


def _progress_folder(output: str) -> Path:
    """Where `--resume` remembers a run: a hidden folder beside the output."""
    path = Path(output).resolve()
    return path.with_name(f".{path.name}.progress")


def _prune_and_save(
    args: Namespace, output: Output, pruner: StructPruner, recovery: RecoveryConfig | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The smaller model, saved, and its tokenizer."""
    from contextlib import suppress

    from ..recovery.checks import check_recovery
    from ..system.disk import OFFLOAD
    from ..system.processes import process_index
    from .loading import load_offloaded

    config = pruner.config
    with output.beside(OFFLOAD) as scratch:
        model, tokenizer = load_offloaded(args, config.arch_file, scratch)
        if recovery is not None:
            check_recovery(recovery, config, model)  # before it is pruned in vain
        pruned = pruner.prune_model(model, tokenizer, inplace=True)
        pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
        if args.resume and process_index() == 0:
            with suppress(OSError):  # nothing was remembered; with the scratch folder it goes in one step
                _progress_folder(args.output).rename(scratch / "progress")
    return pruned, tokenizer


def _check_folders(
    args: Namespace, output: Output, config: StructPruneConfig, recovery: RecoveryConfig | None
) -> None:
    # Before a model is loaded in vain.
    from ..calibration.stored import Statistics
    from ..system.disk import check_apart

    output.check(_result_bytes(args, config))
    check_apart(args.output, config, recovery)
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
