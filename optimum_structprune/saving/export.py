"""Writes a model in a form for runtimes that cannot read what pruning gave."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..arch.load import describe
from ..errors import StructPruneError
from ..surgery.resize import pad_
from .hub import REPORT_NAME, check_reload, save_checked
from .staging import check_target


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Padding:
    """What one width for all layers costs.

    Attributes:
        before: Parameters of the non-uniform model.
        after: Parameters of the padded one.
        dense: Parameters before pruning; None where that is not known.
    """

    before: int
    after: int
    dense: int | None = None

    def __str__(self) -> str:
        """One sentence."""
        added = self.after - self.before
        text = f"padding adds {added:,} parameters that are zero ({added / self.before:.1%} of {self.before:,})"
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
    `from_pretrained` has loaded it and given the outputs of `model`.

    Args:
        model: Non-uniform; it is left as it is.
        save_directory: Where to.
        tokenizer: Saved beside the model.
        overwrite: Replace a folder that exists.
        arch_file: Descriptions of your own, see `families.yaml`.

    Raises:
        StructPruneError: If the model is uniform already, the folder exists, or the saved model gives other outputs.
    """
    check_target(save_directory, overwrite)
    if not model.config.is_heterogeneous:
        raise StructPruneError(f"All layers of this {model.config.model_type} model have the same width already.")
    padded = deepcopy(model)
    pad_(padded, describe(padded, arch_file))
    save_checked(
        padded,
        save_directory,
        tokenizer,
        overwrite,
        lambda folder: None,
        lambda _, folder: check_reload(model, folder),
    )
    return Padding(model.num_parameters(), padded.num_parameters(), _dense_parameters(model.name_or_path))


def _dense_parameters(folder: str | None) -> int | None:
    """Parameters before pruning, from the report beside a model."""
    if not folder or not (path := Path(folder) / REPORT_NAME).is_file():
        return None
    return json.loads(path.read_text())["parameters"]["before"]
