"""`structprune prune`: a model in, a smaller model out."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import LOADING, OFFLOAD, OVERWRITE, Command, pruning_config, switch, valued, yaml_value
from .output import Result, note
from .recovering import RESULT, check_push_arguments, pushed, recover_and_save, recovery_for


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig
    from ..pruner import StructPruner
    from ..system.disk import Output
    from .loading import Loading


def run(args: Namespace) -> Result:
    """Prune, save, and show what came of it."""
    from ..pruner import AutoStructPruner
    from ..system.disk import Output, used_paths
    from ..system.processes import across_processes
    from .loading import Loading

    config, recovery = _configs(args)
    check_push_arguments(args)
    loading = Loading.of(args, arch_file=config.arch_file)
    pruner = AutoStructPruner.from_config(config)
    # Processes that were started together share the work.
    output = Output(args.output, args.overwrite, [args.model, *used_paths(config, recovery)])
    with across_processes(), output.locked():
        _check_folders(args, output, loading, config, recovery)
        smaller, tokenizer = _prune_and_save(args, output, loading, pruner, recovery)
        report = pruner.report
        assert report is not None
        text = f"{report}\n{_where(smaller.config, args.output, config.arch_file)}"
        result = Result(text, {**report.to_dict(), "output": args.output})
        if recovery is not None:
            trained = _trained(args, recovery, config, smaller, tokenizer)
            values = {**result.values, "recovery": trained.values}
            result = Result(f"{text}\n{trained.text}", values, trained.code)
        return pushed(args, result)


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


def _check_folders(
    args: Namespace, output: Output, loading: Loading, config: StructPruneConfig, recovery: RecoveryConfig | None
) -> None:
    # Before a model is loaded in vain.
    from ..calibration.stored import Statistics
    from ..system.disk import check_apart

    output.check(_result_bytes(args.model, loading, config))
    check_apart(args.output, config, recovery)
    if config.stats is not None:
        Statistics.load(config.stats)


def _result_bytes(model: str, loading: Loading, config: StructPruneConfig) -> int:
    """The size of the pruned model's weights; nothing where it cannot be told yet, and the run itself will say why."""
    import warnings

    from ..dryrun import dry_run
    from ..errors import StructPruneError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = dry_run(loading.config(model), config, loading.torch_dtype, loading.trust_remote_code)
            return outcome.memory.after
    except StructPruneError:
        return 0


def _prune_and_save(
    args: Namespace, output: Output, loading: Loading, pruner: StructPruner, recovery: RecoveryConfig | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The smaller model, saved, and its tokenizer."""
    from contextlib import suppress

    from ..recovery.checks import check_recovery
    from ..system.disk import OFFLOAD
    from ..system.processes import process_index

    with output.beside(OFFLOAD) as scratch:
        model, tokenizer = loading.model_and_tokenizer(args.model, scratch)
        if recovery is not None:
            check_recovery(recovery, pruner.config, model)  # before it is pruned in vain
        pruned = pruner.prune_model(model, tokenizer, inplace=True)
        pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
        if args.resume and process_index() == 0:
            with suppress(OSError):  # nothing was remembered; with the scratch folder it goes in one step
                _progress_folder(args.output).rename(scratch / "progress")
    return pruned, tokenizer


def _trained(
    args: Namespace,
    recovery: RecoveryConfig,
    config: StructPruneConfig,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Result:
    """What came of the training that follows."""
    from ..system.processes import alone

    note(args, f"the pruned model is saved to {args.output}; now it is trained")
    with alone():
        return recover_and_save(
            args,
            recovery_for(recovery, args.output, config),
            pruned,
            tokenizer,
            pruned_folder=args.output,
            teacher=args.model,
            arch_file=config.arch_file,
            resume=False,
            overwrite=True,
        )


def _where(config: PretrainedConfig, output: str, arch_file: str | None) -> str:
    from ..arch.meta import model_class

    where = f"saved to {output}; it loads with {model_class(config, arch_file).__name__}.from_pretrained({output!r})"
    if config.get_text_config().is_heterogeneous:
        where += (
            "\nonce optimum_structprune is imported, or with trust_remote_code=True, since its layers differ in width"
        )
    return where


FLAGS = {
    "model": valued("Model id or folder."),
    "output": valued("Folder for the pruned model."),
    "--recover": switch("Train afterwards, with the dense model as the teacher; see --recovery."),
    "--recovery-tokens": valued(
        "The same, with this number of training tokens: short for --recovery tokens=N.",
        "N",
        type=lambda text: ("tokens", yaml_value(text)),
        **{"dest": "recovery", "action": "append", "default": SUPPRESS},
    ),
    "--resume": switch(
        "Remember every finished layer in a folder beside the output, and go on from there if a run with the same "
        "settings was killed."
    ),
    **OVERWRITE,
    **RESULT,
    **LOADING,
    **OFFLOAD,
}
HELP = "Prune a model and save one that plain from_pretrained loads."
COMMANDS = (Command("prune", HELP, run, FLAGS, config="StructPruneConfig"),)
