"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import join

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..evaluation.answers import ShortCheck
from ..record.report import REPORT_NAME, Report
from ..record.summary import next_command, recovery_lines, report_lines
from ..record.verdict import judge
from ..recovery.recover import NothingGainedWarning, Recovery, check_recovery
from ..recovery.teacher import tokens_of_teacher
from ..saving.page import write_page_or_warn
from ..saving.push import push_to_hub
from ..system.disk import Output, check_apart, remove_checkpoints, resolved, used_paths
from ..system.processes import is_first_rank
from .arguments import recovery_config
from .loading import Loading, weights_bytes
from .output import Result
from .saved import result_lines


def recover(args: Namespace) -> Result:
    """Train, save, and show the result."""
    config, folder = recovery_config(args), Path(args.model)
    pruning = StructPruneConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
    output = Output(args.output, args.overwrite, [args.teacher, args.arch_file, *used_paths(config, pruning)])
    output.check(weights_bytes(args.model))
    check_apart(args.output, config)
    with output.locked():
        recovery = recovery_for(config, args, pruning)
        loading = Loading.of(args)
        small = loading.without_weights(args.model)
        check_recovery(config, recovery.pruning, small)
        if args.teacher is not None:
            tokens_of_teacher(loading.without_weights(args.teacher), small, loading.tokenizer(args.model))
        model, tokenizer = loading.model_and_tokenizer(args.model)
        return pushed(args, recover_and_save(args, recovery, model, tokenizer))


def pushed(args: Namespace, result: Result) -> Result:
    """Push a result to the Hub if the arguments ask for it, and return it with the address."""
    if args.push_to_hub is None or not is_first_rank():
        return result
    url = push_to_hub(args.output, args.push_to_hub, private=args.private or None)
    return replace(result, text=f"{result.text}\nPushed to {url}", values={**result.values, "pushed": url})


def recovery_for(config: RecoveryConfig, args: Namespace, pruning: StructPruneConfig | None) -> Recovery:
    """Return the training for the arguments of `recover`; its checkpoints lie beside the output."""
    training = {"output_dir": _checkpoints(args.output), **config.training}
    return Recovery(replace(config, training=training), pruning, pruned=args.model)


def recover_and_save(
    args: Namespace, recovery: Recovery, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Result:
    """Train and save a model with the arguments of `recover`, and return the report."""
    try:
        with warnings.catch_warnings():
            # The report says it too.
            warnings.simplefilter("ignore", NothingGainedWarning)
            recovered = recovery.recover_model(
                model, tokenizer, args.teacher, resume=args.resume, trust_remote_code=args.trust_remote_code
            )
    except KeyboardInterrupt:
        _say_how_to_go_on(args, Path(recovery.config.training["output_dir"]))
        raise

    report = recovery.report
    assert report is not None
    pruning = _pruning_report(args.model)
    check = ShortCheck(tokenizer, report.tokens)
    check.ask("recovered", recovered)
    report.answers = check.result(None if pruning is None else pruning.answers)
    recovery.save(recovered, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    write_page_or_warn(args.output)
    checkpoints = _checkpoints(args.output)
    if recovery.config.training["output_dir"] == checkpoints:
        remove_checkpoints(checkpoints)

    lines = recovery_lines(report)
    if pruning is not None:
        pruning.recovery = report
        lines = report_lines(pruning)
    lines += result_lines(args.output, recovered.config, recovery.pruning.arch_file)
    suggestion = ""
    if pruning is not None:
        dense = args.teacher or pruning.model.name or "ORIGINAL"
        suggestion = next_command(judge(pruning), dense, args.output, is_recovered=True)
    return Result("\n".join(lines), {**report.to_dict(), "output": args.output}, suggestion)


def _pruning_report(folder: str) -> Report | None:
    """Return the report of the pruning of a model, or None if it has no report that can be read."""
    with suppress(StructPruneError):
        return Report.load(Path(folder, REPORT_NAME))
    return None


def _say_how_to_go_on(args: Namespace, checkpoints: Path) -> None:
    words = ["structprune", "recover", args.model, args.output]
    for flag, value in (("--teacher", args.teacher), ("--arch", args.arch_file)):
        words += [flag, value] if value else []
    words += [f"--{name.replace('_', '-')}" for name in ("trust_remote_code", "overwrite") if vars(args)[name]]
    words += ["--resume"] if any(checkpoints.glob("checkpoint-*")) else []
    sys.stderr.write(f"structprune: interrupted; go on with `{join(words)}` and the same settings.\n")


def _checkpoints(output: str) -> str:
    """Return the folder of checkpoints beside the output, whose path may be written as `a/..`."""
    return f"{resolved(output)}.checkpoints"
