"""Writes a non-uniform model in a form for runtimes that take one width for all layers."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import describe
from ..errors import StructPruneError
from ..plain_json import replace_json
from ..record.report import REPORT_NAME
from ..surgery.resize import pad_
from ..system.disk import EXPORT_NAME, Output
from ..system.memory import model_bytes
from .card import leave_card
from .hub import RECORDS, check_reload, save_checked


@dataclass(frozen=True)
class Padding:
    """What one width for all layers costs: the parameters of the non-uniform, of the padded and, where it is known, of
    the dense model, and the bytes of those that were added.
    """

    before: int
    after: int
    dense: int | None = None
    bytes: int = 0

    def __str__(self) -> str:
        """The cost in one sentence."""
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
    `from_pretrained` has loaded it and given the outputs of `model`. The config, plan, report and manifest of the
    pruning are copied where the folder that `model` was loaded from has them; they describe the model before padding.

    Args:
        model: A non-uniform model; it is left as it is.
        save_directory: The folder to write to; it is made if need be.
        tokenizer: The tokenizer to save beside the model.
        overwrite: Whether a folder that exists is replaced; the one that `model` was loaded from never is.
        arch_file: A YAML file that describes architectures of your own, in the form of `families.yaml`.

    Raises:
        StructPruneError: If the model is uniform already, the folder exists and may not be replaced, or the saved
            model gives other outputs.
    """
    used = [model.name_or_path, arch_file]
    Output(save_directory, overwrite, used).check()
    if not model.config.is_heterogeneous:
        raise StructPruneError(f"All layers of this {model.config.model_type} model have the same width already.")
    dense = _dense_parameters(model.name_or_path)
    padded = deepcopy(model)
    pad_(padded, describe(padded, arch_file))

    def write(folder: Path) -> None:
        for name in RECORDS:
            if model.name_or_path and (record := Path(model.name_or_path, name)).is_file():
                shutil.copyfile(record, folder / name)
        # By this record the folder is known as a result, and may be replaced.
        parameters = {"before": padding.before, "after": padding.after}
        replace_json(folder / EXPORT_NAME, {"form": "uniform", "parameters": parameters})
        leave_card(folder, save_directory, padded.config, model.name_or_path, arch_file)

    padding = Padding(model.num_parameters(), padded.num_parameters(), dense, model_bytes(padded) - model_bytes(model))
    save_checked(
        padded, save_directory, tokenizer, overwrite, write, lambda _, folder: check_reload(model, folder), used
    )
    return padding


def _dense_parameters(folder: str | None) -> int | None:
    """The number of parameters before pruning, from the report beside a model; None where there is no such report."""
    if not folder or not (path := Path(folder, REPORT_NAME)).is_file():
        return None
    try:
        return int(json.loads(path.read_text())["parameters"]["before"])
    except (OSError, ValueError, KeyError, TypeError):  # the file is of another program
        return None
