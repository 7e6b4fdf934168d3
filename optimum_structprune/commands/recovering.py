"""Trains a pruned model that is loaded, and saves it; `recover` and `prune --recover` share it."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, replace
from shlex import join
from typing import TYPE_CHECKING

from .output import Result


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig
    from ..recovery.recover import Recovery

# The exit code where a training has made the model worse, so that the result is not where it was asked for.
WORSE = 1


def add_worse_argument(parser: ArgumentParser) -> None:
    """Declare the flag that takes a model which its training has made worse."""
    parser.add_argument(
        "--accept-worse",
        action="store_true",
        help="Save the trained model as the output even if it is worse on held-out text than before its training. "
        f"Otherwise it goes to OUTPUT.worse, the output is left alone, and the exit code is {WORSE}.",
    )


def recovery_for(config: RecoveryConfig, output: str, pruning: StructPruneConfig | None) -> Recovery:
    """The training of a model that goes to `output`; its checkpoints lie beside that folder while it lasts."""
    from ..recovery.recover import Recovery

    return Recovery(replace(config, training={"output_dir": _checkpoints(output), **config.training}), pruning)


def _say_worse(aside: str, output: str) -> None:
    from ..system.processes import is_first_rank

    if is_first_rank():
        sys.stderr.write(
            f"structprune: the trained model is worse, so it is in {aside}, and {output} is as it was; train it with "
            "other settings, or take it with --accept-worse.\n"
        )


def recover_and_save(
    recovery: Recovery,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str,
    *,
    pruned_folder: str,
    teacher: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept_worse: bool = False,
    trust_remote_code: bool = False,
    arch_file: str | None = None,
) -> Result:
    """Train a model, save it, and hand over what came of it.

    A model that is worse on held-out text than before is saved beside the output, which is left alone.

    Returns:
        What came of it, with the exit code 0, or `WORSE` where the model is worse and that was not accepted.
    """
    from ..recovery.outcome import WorseModelWarning
    from ..system.disk import Output, remove_checkpoints

    aside = f"{output.rstrip('/')}.worse"
    if not accept_worse:
        Output(aside, overwrite=True).check()  # before it is trained in vain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WorseModelWarning)  # the report says it
            recovered = recovery.recover_model(
                model, tokenizer, teacher, resume=resume, trust_remote_code=trust_remote_code
            )
    except KeyboardInterrupt:
        flags = {
            "--teacher": teacher,
            "--arch": arch_file,
            "--trust-remote-code": trust_remote_code,
            "--overwrite": overwrite,
            "--accept-worse": accept_worse,
            "--resume": True,
        }
        line = join(["structprune", "recover", pruned_folder, output, *_flags(flags)])
        sys.stderr.write(f"structprune: interrupted; go on with `{line}` and the same settings.\n")
        raise
    report = recovery.report
    assert report is not None
    worse = report.worse and not accept_worse
    target = aside if worse else output
    recovery.save(recovered, target, tokenizer=tokenizer, overwrite=overwrite or worse, pruned=pruned_folder)
    text, values = f"{report}\nsaved to {target}", {**asdict(report), "output": target}
    if worse:
        _say_worse(aside, output)
        return Result(text, values, WORSE)
    if recovery.config.training["output_dir"] == _checkpoints(output):
        remove_checkpoints(_checkpoints(output))
    return Result(text, values)


def _flags(values: Mapping[str, str | bool | None]) -> list[str]:
    """A command line's flags: those that are True alone, those with a text before it, and no others."""
    return [
        part for flag, value in values.items() if value for part in ((flag,) if value is True else (flag, str(value)))
    ]


def _checkpoints(output: str) -> str:
    return f"{output.rstrip('/')}.checkpoints"
