"""Writes a model with one width for all layers, for runtimes that take nothing else."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import describe
from ..errors import StructPruneError
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME
from ..steps.resize import pad_
from ..system.disk import Output
from ..system.stages import model_bytes
from .card import leave_card
from .save import RECORD_NAMES, save_checked


@dataclass(frozen=True)
class Padding:
    """Counts parameters before and after padding, those of the dense model if known, and the bytes added."""

    before: int
    after: int
    dense: int | None = None
    bytes: int = 0

    def __str__(self) -> str:
        """Say the cost in one sentence."""
        added = self.after - self.before
        text = (
            f"padding adds {added:,} parameters that are zero ({self.bytes / 1e6:,.1f} MB, {added / self.before:.1%} "
            f"of {self.before:,})"
        )
        if self.dense is None or self.dense <= self.before:
            return text
        return f"{text} and gives back {added / (self.dense - self.before):.1%} of what pruning had removed"


def export_uniform(
    model: PreTrainedModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    arch_file: str | None = None,
) -> Padding:
    """Save a non-uniform model with one width for all layers, for runtimes that take nothing else.

    The narrower layers are filled up with zeros, so that the logits are the same. The folder appears only after plain
    `from_pretrained` has loaded it and given the outputs of `model`. The records of the pruning and of a training are
    copied where the folder that `model` was loaded from has them; they describe the model before padding.

    Args:
        model: A non-uniform model; it is left as it is.
        save_directory: The folder to write to; it is made if need be.
        tokenizer: The tokenizer to save beside the model.
        overwrite: Whether a folder that exists is replaced; the one that `model` was loaded from never is.
        arch_file: A YAML file that describes architectures of your own, in the form of the files in `arch/families`.

    Raises:
        StructPruneError: If the model is uniform already, the folder exists and may not be replaced, or the saved
            model gives other outputs.
    """
    used = [model.name_or_path, arch_file]
    Output(save_directory, overwrite, used).check()
    if not model.config.is_heterogeneous:
        raise StructPruneError(f"All layers of this {model.config.model_type} model have the same width already.")
    uniform = deepcopy(model)
    pad_(uniform, describe(uniform, arch_file))

    def write(folder: Path) -> None:
        for name in (*RECORD_NAMES, RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME):
            if model.name_or_path and (record := Path(model.name_or_path, name)).is_file():
                shutil.copyfile(record, folder / name)
        leave_card(folder, save_directory, uniform, arch_file)

    save_checked(uniform, save_directory, tokenizer, overwrite, write, used, like=model)
    dense, added = None, model_bytes(uniform) - model_bytes(model)
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is no report, or it is of another program
        report = Path(model.name_or_path or "", REPORT_NAME).read_text(encoding="utf-8")
        dense = int(json.loads(report)["parameters"]["before"])
    return Padding(model.num_parameters(), uniform.num_parameters(), dense, added)
