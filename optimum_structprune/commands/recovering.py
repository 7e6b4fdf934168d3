"""What `prune` and `recover` share: they train a pruned model, save it, and push the result to the Hub."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from dataclasses import asdict, replace
from shlex import join
from typing import TYPE_CHECKING

from ..errors import StructPruneError
from .arguments import switch, valued
from .output import Result


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig
    from ..recovery.recover import Recovery

# The exit code where a training has made the model worse, so that the result is not where it was asked for.
WORSE = 1
RESULT = {
    "--accept-worse": switch(
        "Save the trained model as the output even if it is worse on held-out text than before its training. "
        f"Otherwise it goes to OUTPUT.worse, the output is left alone, and the exit code is {WORSE}."
    ),
    "--push-to-hub": valued(
        "Upload the result to this repository of the Hub once it is complete on the disk, with the token of `hf auth "
        "login` or of HF_TOKEN.",
        "OWNER/NAME",
    ),
    "--private": switch("The repository is private."),
}


def check_push_arguments(args: Namespace) -> None:
    """Refuse a push that could not succeed, before work is done."""
    from ..saving.push import check_push

    if args.push_to_hub is not None:
        check_push(args.push_to_hub)
    elif args.private:
        raise StructPruneError("--private says what a repository is, and --push-to-hub names none; give both.")


def pushed(args: Namespace, result: Result) -> Result:
    """A result with the address that it was pushed to; unchanged where nothing is to be pushed, or it went aside."""
    from ..saving.push import push_to_hub
    from ..system.processes import is_first_rank

    if args.push_to_hub is None or result.code or not is_first_rank():
        return result
    url = push_to_hub(args.output, args.push_to_hub, private=args.private or None)
    return replace(result, text=f"{result.text}\npushed to {url}", values={**result.values, "pushed": url})


def recovery_for(config: RecoveryConfig, output: str, pruning: StructPruneConfig | None) -> Recovery:
    """The training of a model that goes to `output`; its checkpoints lie beside that folder while it lasts."""
    from ..recovery.recover import Recovery

    return Recovery(replace(config, training={"output_dir": _checkpoints(output), **config.training}), pruning)


def recover_and_save(
    args: Namespace,
    recovery: Recovery,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pruned_folder: str,
    teacher: str | None,
    arch_file: str | None,
    resume: bool,
    overwrite: bool,
) -> Result:
    """What came of a training that is saved; a model that it made worse is saved beside the output, with the exit code
    `WORSE`, unless `--accept-worse` is given.
    """
    from ..recovery.trainer import WorseModelWarning
    from ..system.disk import Output, remove_checkpoints

    aside = f"{args.output.rstrip('/')}.worse"
    if not args.accept_worse:
        Output(aside, overwrite=True).check()  # before it is trained in vain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WorseModelWarning)  # the report says it
            recovered = recovery.recover_model(
                model, tokenizer, teacher, resume=resume, trust_remote_code=args.trust_remote_code
            )
    except KeyboardInterrupt:
        _say_how_to_go_on(args, pruned_folder, teacher, arch_file, overwrite)
        raise
    report = recovery.report
    assert report is not None
    worse = report.worse and not args.accept_worse
    target = aside if worse else args.output
    recovery.save(recovered, target, tokenizer=tokenizer, overwrite=overwrite or worse, pruned=pruned_folder)
    text, values = f"{report}\nsaved to {target}", {**asdict(report), "output": target}
    if worse:
        _say_worse(aside, args.output)
        return Result(text, values, WORSE)
    if recovery.config.training["output_dir"] == _checkpoints(args.output):
        remove_checkpoints(_checkpoints(args.output))
    return Result(text, values)


def _say_how_to_go_on(
    args: Namespace, pruned_folder: str, teacher: str | None, arch_file: str | None, overwrite: bool
) -> None:
    flags = [part for flag, text in (("--teacher", teacher), ("--arch", arch_file)) if text for part in (flag, text)]
    switches = {
        "--trust-remote-code": args.trust_remote_code,
        "--overwrite": overwrite,
        "--accept-worse": args.accept_worse,
        "--resume": True,
    }
    flags += [flag for flag, given in switches.items() if given]
    line = join(["structprune", "recover", pruned_folder, args.output, *flags])
    sys.stderr.write(f"structprune: interrupted; go on with `{line}` and the same settings.\n")


def _say_worse(aside: str, output: str) -> None:
    from ..system.processes import is_first_rank

    if is_first_rank():
        sys.stderr.write(
            f"structprune: the trained model is worse, so it is in {aside}, and {output} is as it was; train it with "
            "other settings, or take it with --accept-worse.\n"
        )


def _checkpoints(output: str) -> str:
    return f"{output.rstrip('/')}.checkpoints"
