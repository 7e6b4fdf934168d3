"""Export a model with the same width in all layers, for runtimes that require it."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import describe
from ..method.resize import pad_
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME, Report
from ..system.disk import Output
from ..system.errors import StructPruneError
from ..system.stages import model_bytes
from .card import write_card
from .save import RECORD_NAMES, save_checked


@dataclass(frozen=True)
class Padding:
    """The cost of padding.

    Attributes:
        before: The number of parameters before padding.
        after: The number of parameters after padding.
        original: The number of parameters of the original model; None if it is unknown.
        bytes: The number of bytes that padding adds.
    """

    before: int
    after: int
    original: int | None = None
    bytes: int = 0

    def __str__(self) -> str:
        """Return the cost in one sentence."""
        added = self.after - self.before
        share = added / self.before
        size = f"{self.bytes / 1e6:,.1f} MB, {share:.1%} of {self.before:,}"
        text = f"padding adds {added:,} zero parameters ({size})"

        if self.original is not None and self.original > self.before:
            share_of_removed = added / (self.original - self.before)
            text += f", {share_of_removed:.1%} of the parameters that pruning had removed"
        return text


def export_uniform(
    model: PreTrainedModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    arch_file: str | None = None,
) -> Padding:
    """Save a non-uniform model with the same width in all layers, for runtimes that require it.

    Narrower layers are padded with zeros, which does not change the logits. The folder appears only after plain
    `from_pretrained` has loaded it and reproduced the outputs of `model`. If `model` was loaded from a folder with
    records of pruning or recovery, these are copied. They describe the model before padding.

    Args:
        model: A non-uniform model. It is not modified.
        save_directory: The folder to write. Missing parent folders are created.
        tokenizer: The tokenizer to save with the model.
        overwrite: Replace an existing folder. The folder that `model` was loaded from is never replaced.
        arch_file: A YAML file that describes your own architectures.

    Returns:
        The cost of padding.

    Raises:
        StructPruneError: If the model is uniform, the folder exists and `overwrite` is false, or the saved model has
            other outputs.
    """
    input_paths = [model.name_or_path, arch_file]
    Output(save_directory, overwrite, input_paths).check()

    if not model.config.is_heterogeneous:
        raise StructPruneError(f"All layers of this {model.config.model_type} model have the same width already.")

    uniform = deepcopy(model)
    pad_(uniform, describe(uniform, arch_file))

    def write_records(folder: Path) -> None:
        if model.name_or_path:
            _copy_records(Path(model.name_or_path), folder)
        write_card(folder, save_directory, uniform, arch_file)

    save_checked(uniform, save_directory, tokenizer, overwrite, write_records, input_paths, like=model)
    added_bytes = model_bytes(uniform) - model_bytes(model)
    return Padding(
        model.num_parameters(), uniform.num_parameters(), _original_parameters(model.name_or_path), added_bytes
    )


def _copy_records(source: Path, target: Path) -> None:
    """Copy the records of pruning and recovery that a folder has."""
    names = list(RECORD_NAMES)
    names += [RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME]

    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _original_parameters(folder: str | None) -> int | None:
    """Return the number of parameters of the original model, from the report in a folder, or None without a report."""
    try:
        report = Report.load(Path(folder or "", REPORT_NAME))
    except StructPruneError:
        return None

    if report is None:
        return None
    return report.original.parameters
