"""`structprune prune`: prune a model and save it."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from dataclasses import replace

from ..arch.meta import reads_text
from ..config.pruning import RunOptions, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.load import calibration_domains
from ..domains.manifest import Manifest
from ..evaluation.answers import ShortCheck
from ..pruner import PruneResult
from ..pruner import prune as prune_in_one_call
from ..record.view import View
from ..recovery.encoders import can_recover
from ..recovery.recover import check_recovery
from ..recovery.text import check_training_text
from ..saving.gguf_file import check_gguf
from ..saving.page import write_page_or_warn
from ..system.disk import OFFLOAD, Output, check_apart, used_paths
from ..system.processes import across_processes, process_index, unshared
from .checks import progress_folder, prune_configs
from .export import add_gguf, disk_bytes
from .loading import Loading
from .output import Result, note
from .recover import loading_flags, recover_and_save, recovery_for, result_lines


def prune(args: Namespace) -> Result:
    """Prune a model, save it, and return its report."""
    config, recovery, options = prune_configs(args)
    loading = Loading.of(args, arch_file=config.arch_file)
    input_paths = [args.model]
    input_paths += used_paths(config, recovery, options)
    output = Output(args.output, args.overwrite, input_paths)

    # Processes that were started together share the work.
    with across_processes(), output.locked():
        _check_folders(args, output, loading, config, options, recovery)
        pruned = _prune_and_save(args, output, loading, config, options)
        report = pruned.report
        gguf_type = pruned.config.gguf
        if recovery is None:
            result = _result(args, pruned)
        else:
            result = _recovered_result(args, pruned, recovery)

        # Writing a GGUF file loads the model from the folder, which may have been trained.
        del pruned
        return add_gguf(args, result, loading, gguf_type, report)


def _check_folders(
    args: Namespace,
    output: Output,
    loading: Loading,
    config: StructPruneConfig,
    options: RunOptions,
    recovery: RecoveryConfig | None,
) -> None:
    """Raise `StructPruneError` if the run could not be finished. Call this before the weights are loaded."""
    request = loading.ask(args.model, config, options)
    model = request.model_info.plain_model
    smaller = request.smaller
    need_bytes = smaller.num_parameters() * model.dtype.itemsize
    if request.config.gguf is not None:
        check_gguf(smaller.config, request.config.gguf)
        need_bytes += disk_bytes(smaller, request.config.gguf)
    output.check(need_bytes)

    tokenizer = loading.tokenizer(args.model)
    check_apart(args.output, config, recovery, options)
    if recovery is not None:
        check_recovery(recovery, config, model)

    # The last checks, because they read the text.
    text_config, domains = calibration_domains(config, model, tokenizer, writes=False)
    if recovery is not None:
        check_training_text(recovery, text_config, model, tokenizer, Manifest.of(text_config, domains, tokenizer))


def _prune_and_save(
    args: Namespace, output: Output, loading: Loading, config: StructPruneConfig, options: RunOptions
) -> PruneResult:
    """Prune the model, save it, and return the result."""
    with output.sibling(OFFLOAD) as scratch:
        model, tokenizer = loading.model_and_tokenizer(args.model, scratch)
        # Offloaded models answer no questions, because a forward pass takes too long.
        asks = options.measure and not args.offload
        num_tokens = config.num_samples * config.seq_length if asks else 0
        check = ShortCheck(tokenizer, num_tokens)
        check.ask("original", model)

        result = prune_in_one_call(model, config, tokenizer, inplace=True, options=options)
        assert result.tokenizer is not None
        check.tokenizer = result.tokenizer
        check.ask("pruned", result.model)

        result.report.answers = check.result()
        result.report.model.base_model = args.base_model or ""
        result.report.model.license = args.license or ""
        result.save(args.output, result.tokenizer, overwrite=args.overwrite)
        write_page_or_warn(args.output)

        if args.resume and process_index() == 0:
            # The progress is removed with the scratch folder. There is none if no layer was finished.
            with suppress(OSError):
                progress_folder(args.output).rename(scratch / "progress")

    return result


def _result(args: Namespace, pruned: PruneResult) -> Result:
    """Return the result of a pruning without a training."""
    report = pruned.report
    view = View(report)
    lines = view.lines()
    lines += result_lines(args.output, pruned.model.config, pruned.config.arch_file)

    values = report.to_dict()
    values["output"] = args.output
    flags = loading_flags(pruned.config.arch_file, args.trust_remote_code)
    suggestion = ""
    if reads_text(pruned.model):
        suggestion = view.next_command(args.model, args.output, can_recover(pruned.model), flags)
    return Result("\n".join(lines), values, suggestion)


def _recovered_result(args: Namespace, pruned: PruneResult, recovery: RecoveryConfig) -> Result:
    """Train the pruned model, save it in its place, and return the result."""
    note(args, f"The pruned model is saved to {args.output}. Training begins.")
    training_args = Namespace(**vars(args))
    training_args.model = args.output
    training_args.teacher = args.model
    training_args.teacher_cache = None
    training_args.arch_file = pruned.config.arch_file
    training_args.overwrite = True
    training_args.resume = False

    assert pruned.tokenizer is not None
    with unshared():
        # This config is saved with the model, so `recover` reads the same text.
        training = recovery_for(recovery, training_args, pruned.config)
        result = recover_and_save(training_args, training, pruned.model, pruned.tokenizer)

    report = training.pruning_report or pruned.report
    values = report.to_dict()
    values["recovery"] = result.values
    values["output"] = args.output
    return replace(result, values=values)
