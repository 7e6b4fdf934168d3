"""`structprune prune` and `structprune calibrate`: a smaller model, or what it takes to make one."""

from __future__ import annotations

import re
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import model_class
from ..calibration.stored import Statistics
from ..calibrator import calibrate as stored_statistics
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..evaluation.answers import ShortCheck
from ..pruner import RECORDS, AutoStructPruner, StructPruner
from ..recovery.checks import check_recovery
from ..system.disk import OFFLOAD, Output, check_apart, used_paths
from ..system.processes import across_processes, alone, process_index
from .arguments import pruning_config
from .loading import Loading
from .output import Result, note
from .recovering import check_push_arguments, pushed, recover_and_save, recovery_for


ID = re.compile(r"[\w.-]+/[\w.-]+")


def prune(args: Namespace) -> Result:
    """Prune, save, and show what came of it."""
    config, recovery = _configs(args)
    check_push_arguments(args)
    if args.base_model and not ID.fullmatch(args.base_model):
        raise StructPruneError(f"--base-model {args.base_model!r} is no id on the Hub; give OWNER/NAME.")
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
            note(args, f"the pruned model is saved to {args.output}; now it is trained")
            of_recover = {"model": args.output, "teacher": args.model, "arch_file": config.arch_file}
            training = Namespace(**{**vars(args), **of_recover, "overwrite": True, "resume": False})
            with alone():
                trained = recover_and_save(training, recovery_for(recovery, args.output, config), smaller, tokenizer)
            values = {**result.values, "recovery": trained.values}
            result = Result(f"{text}\n{trained.text}", values, trained.code)
        return pushed(args, result)


def _configs(args: Namespace) -> tuple[StructPruneConfig, RecoveryConfig | None]:
    """How to prune, and how to train afterwards: the pruned model is saved in between, in case of an interruption."""
    config = pruning_config(args)
    recovery = config.recovery
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
    """Refuse folders before a model is loaded in vain."""
    try:
        size = loading.bytes_after(args.model, config)
    except StructPruneError:
        size = 0  # it cannot be told yet, and the run itself will say why
    output.check(size)
    check_apart(args.output, config, recovery)
    if config.stats is not None:
        Statistics.load(config.stats)


def _prune_and_save(
    args: Namespace, output: Output, loading: Loading, pruner: StructPruner, recovery: RecoveryConfig | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The smaller model, saved, and its tokenizer."""
    config = pruner.config
    with output.beside(OFFLOAD) as scratch:
        model, tokenizer = loading.model_and_tokenizer(args.model, scratch)
        if recovery is not None:
            check_recovery(recovery, config, model)  # before it is pruned in vain
        # None where no text is read, or where a pass takes much longer than elsewhere.
        tokens = 0 if config.stats or args.offload else config.num_samples * config.seq_length
        check = ShortCheck(tokenizer, tokens)
        check.ask("dense", model)
        pruned = pruner.prune_model(model, tokenizer, inplace=True)
        assert pruner.report is not None and pruner.tokenizer is not None
        check.tokenizer = tokenizer = pruner.tokenizer
        check.ask("pruned", pruned)
        pruner.report.answers = check.items()
        said = {"base_model": args.base_model, "license": args.license}
        pruner.report.details.model |= {name: value for name, value in said.items() if value}
        if args.resume:  # who repeats the run does not go on with this one
            RECORDS[pruned] = RECORDS[pruned]._replace(config=replace(pruner.used_config, checkpoint_dir=None))
        pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
        if args.resume and process_index() == 0:
            with suppress(OSError):  # nothing was remembered; with the scratch folder it goes in one step
                _progress_folder(args.output).rename(scratch / "progress")
    return pruned, tokenizer


def _where(config: PretrainedConfig, output: str, arch_file: str | None) -> str:
    where = f"saved to {output}; it loads with {model_class(config, arch_file).__name__}.from_pretrained({output!r})"
    if config.get_text_config().is_heterogeneous:
        where += (
            "\nonce optimum_structprune is imported, or with trust_remote_code=True, since its layers differ in width"
        )
    return where


def calibrate(args: Namespace) -> Result:
    """Run the text through the model and store what pruning needs of it."""
    # How much is removed plays no part here, but a config has to say it.
    config = pruning_config(args, sparsity=0.5)
    loading = Loading.of(args, arch_file=config.arch_file)
    output = Output(args.output, args.overwrite, [args.model, *used_paths(config)])
    with across_processes(), output.locked(), output.beside(OFFLOAD) as scratch:
        output.check()
        model, tokenizer = loading.model_and_tokenizer(args.model, scratch)
        statistics = stored_statistics(model, tokenizer, config, args.output, args.overwrite)
    return Result(
        f"{statistics}\nsaved to {args.output}; prune with `structprune prune {args.model} OUT --stats {args.output}`",
        {
            "model_type": statistics.model_type,
            "calibration_tokens": statistics.tokens,
            "bytes": sum(file.size for file in statistics.files.values()),
            "output": args.output,
        },
    )
