"""`structprune prune`: a smaller model."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from dataclasses import replace

from ..config.pruning import RunOptions, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.load import calibration_domains
from ..evaluation.answers import ShortCheck
from ..functional import prune as prune_in_one_call
from ..pruner import PruneResult
from ..record.summary import next_command, report_lines
from ..record.verdict import judge
from ..recovery.recover import check_recovery
from ..saving.gguf_file import check_gguf
from ..saving.page import write_page_or_warn
from ..system.disk import OFFLOAD, Output, check_apart, used_paths
from ..system.processes import across_processes, process_index, unshared
from .checks import progress_folder, prune_configs
from .export import with_gguf
from .loading import Loading
from .output import Result, note
from .recover import pushed, recover_and_save, recovery_for
from .saved import result_lines


def prune(args: Namespace) -> Result:
    """Prune, save, and show what came of it."""
    config, recovery, options = prune_configs(args)
    loading = Loading.of(args, arch_file=config.arch_file)
    # Processes that were started together share the work.
    output = Output(args.output, args.overwrite, [args.model, *used_paths(config, recovery, options)])
    with across_processes(), output.locked():
        _check_folders(args, output, loading, config, options, recovery)
        pruned = _prune_and_save(args, output, loading, config, options)
        smaller = pruned.model
        tokenizer = pruned.tokenizer
        report = pruned.report
        assert tokenizer is not None
        if recovery is not None:
            note(args, f"The pruned model is saved to {args.output}. Training begins.")
            of_recover = {"model": args.output, "teacher": args.model, "arch_file": config.arch_file}
            training = Namespace(**{**vars(args), **of_recover, "overwrite": True, "resume": False})
            with unshared():
                result = recover_and_save(training, recovery_for(recovery, training, config), smaller, tokenizer)
            result = replace(result, values={**report.to_dict(), "recovery": result.values, "output": args.output})
        else:
            lines = [*report_lines(report), *result_lines(args.output, smaller.config, config.arch_file)]
            suggestion = next_command(judge(report), args.model, args.output)
            result = Result("\n".join(lines), {**report.to_dict(), "output": args.output}, suggestion)
        del smaller, pruned  # the next step reads the folder, which may have been trained
        return pushed(args, with_gguf(args, result, loading, report.dense.parameters))


def _check_folders(
    args: Namespace,
    output: Output,
    loading: Loading,
    config: StructPruneConfig,
    options: RunOptions,
    recovery: RecoveryConfig | None,
) -> None:
    """Refuse what the run would refuse, before a model is loaded."""
    request = loading.ask(args.model, config, options)
    model, small = request.model_info.plain_model, request.smaller
    output.check(small.num_parameters() * model.dtype.itemsize)
    tokenizer = loading.tokenizer(args.model)
    if args.gguf is not None:
        check_gguf(small.config, args.gguf, tokenizer)
    check_apart(args.output, config, recovery, options)
    if recovery is not None:
        check_recovery(recovery, config, model)
    calibration_domains(config, model, tokenizer, writes=False)  # last, as it reads the text


def _prune_and_save(
    args: Namespace, output: Output, loading: Loading, config: StructPruneConfig, options: RunOptions
) -> PruneResult:
    """Prune the model, save it, and return the result."""
    with output.sibling(OFFLOAD) as scratch:
        model, tokenizer = loading.model_and_tokenizer(args.model, scratch)
        # None where a pass takes much longer than elsewhere.
        tokens = 0 if args.offload else config.num_samples * config.seq_length
        check = ShortCheck(tokenizer, tokens)
        check.ask("dense", model)
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
            with suppress(OSError):  # nothing was remembered; with the scratch folder it goes in one step
                progress_folder(args.output).rename(scratch / "progress")
    return result
