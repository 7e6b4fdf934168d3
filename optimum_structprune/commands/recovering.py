"""Trains a pruned model that is loaded, and saves it; `recover` and `prune --recover` share it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from shlex import join
from typing import TYPE_CHECKING

from ..recovery.recover import Recovery


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.pruning import StructPruneConfig
    from ..config.recovery import RecoveryConfig


def recover_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RecoveryConfig,
    output: str,
    *,
    pruned_folder: str,
    pruning: StructPruneConfig | None = None,
    teacher: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    arch_file: str | None = None,
) -> None:
    """Train a model, save it, and show what came of it. Checkpoints lie beside the output while training lasts.

    Args:
        model: The pruned model; it is trained itself.
        tokenizer: Its tokenizer.
        config: How the model is trained.
        output: The folder to write to.
        pruned_folder: The id or the folder that the pruned model was loaded from, or saved to.
        pruning: How the model was pruned, where that is known.
        teacher: The id or the folder of the model to agree with.
        resume: Whether training goes on from the last checkpoint.
        overwrite: Whether an output folder that exists is replaced.
        trust_remote_code: Whether code that comes with the teacher is run.
        arch_file: Descriptions of your own that the model was loaded with.

    Raises:
        StructPruneError: If the model cannot be trained or saved as the config says.
        KeyboardInterrupt: If the user interrupts the training; how it can go on is written to the standard error.
    """
    checkpoints = f"{output.rstrip('/')}.checkpoints"
    recovery = Recovery(replace(config, training={"output_dir": checkpoints, **config.training}), pruning)
    try:
        recovered = recovery.recover_model(
            model, tokenizer, teacher, resume=resume, trust_remote_code=trust_remote_code
        )
    except KeyboardInterrupt:
        again = ["structprune", "recover", pruned_folder, output]
        again += ["--teacher", teacher] if teacher else []
        again += ["--arch", arch_file] if arch_file else []
        again += ["--trust-remote-code"] if trust_remote_code else []
        again += ["--overwrite"] if overwrite else []
        line = join([*again, "--resume"])
        sys.stderr.write(f"structprune: interrupted; go on with `{line}` and the same settings.\n")
        raise
    recovery.save(recovered, output, tokenizer=tokenizer, overwrite=overwrite, pruned=pruned_folder)
    if "output_dir" not in config.training:
        shutil.rmtree(checkpoints, ignore_errors=True)
    print(recovery.report)
    print(f"saved to {output}")
