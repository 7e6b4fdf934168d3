"""`structprune recover`: a pruned model in, the same model trained out; `prune` trains by it too."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from shlex import join
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.fields import read_json
from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..evaluation.answers import ShortCheck
from ..record.answers import Items
from ..record.report import REPORT_NAME
from ..recovery.checks import check_recovery
from ..recovery.recover import Recovery
from ..recovery.trainer import NothingGainedWarning
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
    # The recovered model may take the place of the pruned one; an adapter may not, since it needs that model.
    needed = None if config.merge else args.model
    used = [needed, args.teacher, args.arch_file, *used_paths(config, pruning)]
    output = Output(args.output, args.overwrite, used)
    output.check(weights_bytes(args.model) if config.merge else 0)
    check_apart(args.output, config)
    with output.locked():
        with unchanging(folder):
            recovery = recovery_for(config, args, pruning)
            loading = Loading.of(args)
            check_recovery(config, recovery.pruning, loading.without_weights(args.model))
            model, tokenizer = loading.model_and_tokenizer(args.model)
        return pushed(args, recover_and_save(args, recovery, model, tokenizer))


def pushed(args: Namespace, result: Result) -> Result:
    """A result with the address that it was pushed to; unchanged where nothing is to be pushed."""
    if args.push_to_hub is None or result.code or not is_first_rank():
        return result
    url = push_to_hub(args.output, args.push_to_hub, private=args.private or None)
    return replace(result, text=f"{result.text}\npushed to {url}", values={**result.values, "pushed": url})


def recovery_for(config: RecoveryConfig, args: Namespace, pruning: StructPruneConfig | None) -> Recovery:
    """The training that the arguments of `recover` ask for; its checkpoints lie beside the output while it lasts."""
    training = {"output_dir": _checkpoints(args.output), **config.training}
    return Recovery(replace(config, training=training), pruning, pruned=args.model)


def recover_and_save(
    args: Namespace, recovery: Recovery, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Result:
    """What came of a training with the arguments of `recover`, once it is saved."""
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
        _say_how_to_go_on(args)
        raise
    report = recovery.report
    assert report is not None
    check = ShortCheck(tokenizer, report.tokens)
    trained: Any = recovered.get_base_model() if isinstance(recovered, PeftModel) else recovered
    check.ask("recovered", trained)
    report.answers = check.items(earlier)
    recovery.save(recovered, args.output, tokenizer=tokenizer, overwrite=args.overwrite)
    write_page_or_warn(args.output)
    if recovery.config.training["output_dir"] == (checkpoints := _checkpoints(args.output)):
        remove_checkpoints(checkpoints)
    return Result(f"{report}\nsaved to {args.output}", {**asdict(report), "output": args.output})


def _say_how_to_go_on(args: Namespace) -> None:
    words = ["structprune", "recover", args.model, args.output]
    for flag, value in (("--teacher", args.teacher), ("--arch", args.arch_file)):
        words += [flag, value] if value else []
    words += [f"--{name.replace('_', '-')}" for name in ("trust_remote_code", "overwrite") if vars(args)[name]]
    sys.stderr.write(f"structprune: interrupted; go on with `{join([*words, '--resume'])}` and the same settings.\n")


def _checkpoints(output: str) -> str:
    """The folder of checkpoints beside the output, which may be written in any way, such as `a/..`."""
    return f"{resolved(output)}.checkpoints"
