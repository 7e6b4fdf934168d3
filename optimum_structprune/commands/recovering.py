"""What `prune` and `recover` share: they train a pruned model, save it, and push the result to the Hub."""

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
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..evaluation.answers import ShortCheck
from ..record.answers import Items
from ..record.report import REPORT_NAME
from ..recovery.recover import Recovery
from ..recovery.trainer import NothingGainedWarning
from ..saving.page import write_page_or_warn
from ..saving.push import push_to_hub
from ..system.disk import remove_checkpoints, resolved
from ..system.processes import is_first_rank
from .output import Result


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
