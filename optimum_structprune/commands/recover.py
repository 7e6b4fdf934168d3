"""`structprune recover`: a pruned model in, the same model trained to make up for the loss out."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from shlex import join

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.fields import read_json
from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..evaluation.answers import ShortCheck
from ..record.answers import Items
from ..record.remarks import judged, verdict
from ..record.report import REPORT_NAME
from ..recovery.recover import NothingGainedWarning, Recovery, check_recovery
from ..recovery.teacher import tokens_of_teacher
from ..saving.card import Records
from ..saving.page import write_page_or_warn
from ..saving.push import push_to_hub
from ..system.disk import Output, check_apart, remove_checkpoints, resolved, unchanging, used_paths
from ..system.processes import is_first_rank
from .arguments import recovery_config
from .loading import Loading, weights_bytes
from .output import Result


def recover(args: Namespace) -> Result:
    """Train, save, and show what came of it."""
    config, folder = recovery_config(args), Path(args.model)
    pruning = StructPruneConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
    output = Output(args.output, args.overwrite, [args.teacher, args.arch_file, *used_paths(config, pruning)])
    output.check(weights_bytes(args.model))
    check_apart(args.output, config)
    with output.locked():
        with unchanging(folder):
            recovery = recovery_for(config, args, pruning)
            loading = Loading.of(args)
            small = loading.without_weights(args.model)
            check_recovery(config, recovery.pruning, small)
            if args.teacher is not None:
                tokens_of_teacher(loading.without_weights(args.teacher), small, loading.tokenizer(args.model))
            model, tokenizer = loading.model_and_tokenizer(args.model)
        return pushed(args, recover_and_save(args, recovery, model, tokenizer))


def pushed(args: Namespace, result: Result) -> Result:
    """Pushes a result to the Hub if asked to, and gives it with the address."""
    if args.push_to_hub is None or not is_first_rank():
        return result
    url = push_to_hub(args.output, args.push_to_hub, private=args.private or None)
    return replace(result, text=f"{result.text}\npushed to {url}", values={**result.values, "pushed": url})


def recovery_for(config: RecoveryConfig, args: Namespace, pruning: StructPruneConfig | None) -> Recovery:
    """Makes the training that the arguments of `recover` ask for; its checkpoints lie beside the output."""
    training = {"output_dir": _checkpoints(args.output), **config.training}
    return Recovery(replace(config, training=training), pruning, pruned=args.model)


def recover_and_save(
    args: Namespace, recovery: Recovery, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Result:
    """Trains and saves a model with the arguments of `recover`, and gives the report."""
    earlier: Items = []
    with suppress(StructPruneError):  # the pruning has no record, or one that cannot be read
        earlier = read_json(Path(args.model, REPORT_NAME)).get("answers") or []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingGainedWarning)  # the report says it
            recovered = recovery.recover_model(
                model, tokenizer, args.teacher, resume=args.resume, trust_remote_code=args.trust_remote_code
            )
    except KeyboardInterrupt:
        _say_how_to_go_on(args, Path(recovery.config.training["output_dir"]))
        raise
    report = recovery.report
    assert report is not None
    check = ShortCheck(tokenizer, report.tokens)
    check.ask("recovered", recovered)
    report.answers = check.items(earlier)
    recovery.save(recovered, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    write_page_or_warn(args.output)
    if recovery.config.training["output_dir"] == (checkpoints := _checkpoints(args.output)):
        remove_checkpoints(checkpoints)
    saved = Records.read(args.output).report
    lines = [str(report), *(verdict(saved) if judged(saved) is not saved else []), f"saved to {args.output}"]
    return Result("\n".join(lines), {**asdict(report), "output": args.output})


def _say_how_to_go_on(args: Namespace, checkpoints: Path) -> None:
    words = ["structprune", "recover", args.model, args.output]
    for flag, value in (("--teacher", args.teacher), ("--arch", args.arch_file)):
        words += [flag, value] if value else []
    words += [f"--{name.replace('_', '-')}" for name in ("trust_remote_code", "overwrite") if vars(args)[name]]
    words += ["--resume"] if any(checkpoints.glob("checkpoint-*")) else []
    sys.stderr.write(f"structprune: interrupted; go on with `{join(words)}` and the same settings.\n")


def _checkpoints(output: str) -> str:
    """Gives the folder of checkpoints beside the output, however that is written, such as `a/..`."""
    return f"{resolved(output)}.checkpoints"
