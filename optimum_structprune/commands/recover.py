"""`structprune recover`: train a pruned model."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from shlex import join

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import predicts_next
from ..arch.per_layer import is_non_uniform
from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..distillation.teacher import tokens_of_teacher
from ..evaluation.answers import ShortCheck
from ..record.view import View
from ..recovery.encoders import check_has_teacher
from ..recovery.recover import NothingGainedWarning, Recovery, check_recovery
from ..saving.card import loader_of
from ..saving.page import PAGE_NAME, write_page_or_warn
from ..system.disk import Output, check_apart, remove_checkpoints, resolved, used_paths
from ..system.errors import StructPruneError
from .arguments import recovery_config
from .loading import Loading, weights_bytes
from .output import Result


def recover(args: Namespace) -> Result:
    """Train a pruned model, save it, and return its report."""
    config = recovery_config(args)
    folder = Path(args.model)
    pruning = None
    if (folder / CONFIG_NAME).is_file():
        pruning = StructPruneConfig.from_pretrained(folder)

    input_paths = [args.teacher, args.teacher_cache, args.arch_file]
    input_paths += used_paths(config, pruning)
    output = Output(args.output, args.overwrite, input_paths)
    output.check(weights_bytes(args.model))
    check_apart(args.output, config)

    with output.locked():
        recovery = recovery_for(config, args, pruning)
        loading = Loading.of(args)
        meta_model = loading.without_weights(args.model)
        check_recovery(config, recovery.pruning, meta_model)
        check_has_teacher(meta_model, args.teacher)
        if args.teacher is not None and predicts_next(meta_model):
            tokens_of_teacher(loading.without_weights(args.teacher), meta_model, loading.tokenizer(args.model))
        if args.teacher_cache is not None:
            # The teacher and the model are never in memory together.
            reader = loading.tokenizer(args.model)
            recovery.cache_teacher(meta_model, reader, args.teacher, args.teacher_cache, args.trust_remote_code)

        model, tokenizer = loading.model_and_tokenizer(args.model)
        return recover_and_save(args, recovery, model, tokenizer)


def recovery_for(config: RecoveryConfig, args: Namespace, pruning: StructPruneConfig | None) -> Recovery:
    """Return the training for the arguments of `recover`. By default its checkpoints are next to the output."""
    training = {"output_dir": _checkpoints(args.output)}
    training.update(config.training)
    return Recovery(replace(config, training=training), pruning, pruned=args.model)


def recover_and_save(
    args: Namespace, recovery: Recovery, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Result:
    """Train and save a model with the arguments of `recover`, and return the report."""
    checkpoints = recovery.config.training["output_dir"]
    try:
        with warnings.catch_warnings():
            # The report has the same information.
            warnings.simplefilter("ignore", NothingGainedWarning)
            recovered = recovery.recover_model(
                model,
                tokenizer,
                args.teacher,
                resume=args.resume,
                trust_remote_code=args.trust_remote_code,
                teacher_cache=args.teacher_cache,
            )

        report = recovery.report
        assert report is not None
        pruning_report = recovery.pruning_report
        check = ShortCheck(tokenizer, report.tokens, None if pruning_report is None else pruning_report.answers)
        check.ask("recovered", recovered)
        report.answers = check.result()
        recovery.save(recovered, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    except (KeyboardInterrupt, StructPruneError) as error:
        # A training that has ended need not be repeated if its result cannot be saved.
        if isinstance(error, KeyboardInterrupt) or recovery.report is not None:
            _say_how_to_resume(args, Path(checkpoints))
        raise

    write_page_or_warn(args.output)
    if checkpoints == _checkpoints(args.output):
        remove_checkpoints(checkpoints)

    if pruning_report is None:
        lines = [str(report)]
        suggestion = ""
    else:
        pruning_report.recovery = report
        view = View(pruning_report)
        lines = view.lines()
        name = pruning_report.model.name or ""
        # A report has the id of a model on the Hub, but not the path of a local folder.
        flags = loading_flags(recovery.pruning.arch_file, args.trust_remote_code)
        original = args.teacher or (name if "/" in name else "")
        suggestion = view.next_command(original, args.output, False, flags)

    lines += result_lines(args.output, recovered.config, recovery.pruning.arch_file)
    values = report.to_dict()
    values["output"] = args.output
    return Result("\n".join(lines), values, suggestion)


def _say_how_to_resume(args: Namespace, checkpoints: Path) -> None:
    """Print the command that resumes an interrupted training."""
    command = ["structprune", "recover", args.model, args.output]
    if args.teacher:
        command += ["--teacher", args.teacher]
    if args.teacher_cache:
        command += ["--teacher-cache", args.teacher_cache]
    command += loading_flags(args.arch_file, args.trust_remote_code)
    if args.overwrite:
        command.append("--overwrite")
    if any(checkpoints.glob("checkpoint-*")):
        command.append("--resume")

    sys.stderr.write(f"structprune: interrupted; go on with `{join(command)}` and the same settings.\n")


def _checkpoints(output: str) -> str:
    """Return the folder of checkpoints next to the output, whose path may be written as `a/..`."""
    return f"{resolved(output)}.checkpoints"


def result_lines(output: str, config: PretrainedConfig, arch_file: str | None) -> list[str]:
    """Return the call that loads a saved result, and the path of its report.

    Args:
        output: The folder of the result.
        config: The config of the model.
        arch_file: The file that describes the architecture.
    """
    loader = loader_of(output, config, arch_file)
    line = f"Saved to {output}; load it with {loader}({output!r})"
    if is_non_uniform(config):
        line += " after import optimum_structprune, or with trust_remote_code=True"

    lines = [line]
    page = Path(output, PAGE_NAME)
    if page.is_file():
        lines.append(f"Report: {page}")
    return lines


def loading_flags(arch_file: str | None, trust_remote_code: bool) -> list[str]:
    """Return the flags that a next command needs to load the same models."""
    flags = []
    if arch_file is not None:
        flags += ["--arch", arch_file]
    if trust_remote_code:
        flags.append("--trust-remote-code")
    return flags
