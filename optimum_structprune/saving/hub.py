"""Writes a pruned model to disk, and only calls it saved once plain `from_pretrained` has read it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arch.heterogeneous import heterogeneous
from ..config.pruning import StructPruneConfig
from ..domains.manifest import MANIFEST_NAME, Manifest
from ..errors import StructPruneError
from ..forward.metrics import outputs_of, run_model
from ..surgery.plan import Plan
from .report import Report
from .staging import check_target, staged


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN_NAME = "pruning_plan.json"
REPORT_NAME = "report.json"


def save_pruned(
    model: PreTrainedModel,
    save_directory: str | Path,
    config: StructPruneConfig,
    plan: Plan | None,
    report: Report | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    manifest: Manifest | None = None,
) -> None:
    """Save a pruned model with its config, plan, report, manifest and tokenizer; see `save_checked`.

    Raises:
        StructPruneError: If the folder exists, nothing was pruned, or the saved model does not come back the same.
    """
    check_target(save_directory, overwrite)
    if plan is None or report is None:
        raise StructPruneError("There is nothing to save: call prune_model first.")

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        plan.save(folder / PLAN_NAME)
        report.save(folder / REPORT_NAME)
        if manifest is not None:
            manifest.save(folder / MANIFEST_NAME)

    save_checked(model, save_directory, tokenizer, overwrite, write, check_reload)


def save_checked(
    model: PreTrainedModel | PeftModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    write: Callable[[Path], None],
    check: Callable[[Any, Path], Any],
) -> None:
    """Save a model, and make the folder appear only once it has been read back.

    Everything is written to a temporary folder beside the target, reloaded and compared, and then moved into place, so
    that a failure leaves whatever was there before.

    Args:
        model: To be saved.
        save_directory: Where to.
        tokenizer: Saved beside the model.
        overwrite: Replace a folder that exists.
        write: Puts further files into the folder.
        check: Holds the folder against the model; raises where they differ.

    Raises:
        StructPruneError: If the folder exists, something cannot be written, or the saved model does not come back the
            same.
    """
    with staged(save_directory, overwrite) as staging:
        with heterogeneous():
            model.save_pretrained(str(staging))
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write(staging)
        check(model, staging)


@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: str | Path) -> None:
    """Load a saved model with plain `from_pretrained` and compare logits, or hidden states where it has no head.

    Raises:
        StructPruneError: If it does not load or its outputs differ.
    """
    with heterogeneous():
        again = type(model).from_pretrained(folder, dtype=model.dtype, device_map=model.device)
    probe = _probe(model)
    training = model.training
    ours, theirs = (outputs_of(run_model(one.eval(), probe)).float() for one in (model, again))
    difference = float((ours - theirs).abs().max())
    model.train(training)
    if not difference <= 1e-4:
        raise StructPruneError(f"The model saved to {folder} gives other outputs: they differ by {difference:.2g}.")


def _probe(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return torch.randn(1, config.num_channels, size, size, generator=generator).to(model.dtype)
    return torch.randint(config.get_text_config().vocab_size, (1, 16), generator=generator)
