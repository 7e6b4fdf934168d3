"""Runs calibration text through a dense model once, and keeps what pruning needs of it in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import tqdm

from .arch.load import describe
from .arch.plain import check_model, dequantized
from .arch.spec import ArchSpec
from .calibration.gradients import saliencies
from .calibration.moments import save_moments
from .calibration.passes import batches_of, passes_over
from .calibration.stored import HELDOUT, Statistics, StoredDomain, StoredFile, key, layer_name
from .config.pruning import StructPruneConfig
from .criteria import CRITERIA
from .domains.load import Domain, calibration_domains
from .domains.manifest import MANIFEST_NAME, Manifest
from .errors import StructPruneError
from .fingerprint import fingerprint, vocabulary_hash
from .saving.staging import check_target, staged


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: StructPruneConfig,
    folder: str | Path,
    overwrite: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> Statistics:
    """Gather the statistics of a dense model once, for any number of prunings with `StructPruneConfig.stats`.

    Every space that could shrink is covered, with Gram matrices, and gradients where the config's criterion needs
    them. How much the config removes plays no part.

    Args:
        model: The dense model; it is left as it is.
        tokenizer: Its tokenizer; reads the domains.
        config: Names the domains, and says how many samples of what length. Its `stats` play no part.
        folder: Where to.
        overwrite: Replace a folder that exists.
        inputs: Calibration inputs by domain, in place of the text that the config names; see `prune_model`.

    Raises:
        StructPruneError: If the folder exists, the disk is too small, a domain cannot be read, or the model has
            experts.
    """
    check_target(folder, overwrite)
    config = replace(config, stats=None, adaptive_rate=0.0, objective="mean")  # no rounds, so nothing to weigh anew
    model = dequantized(model, inplace=False)
    check_model(model, config)
    arch = describe(model, config.arch_file)
    _check_moments(arch)
    domains = calibration_domains(config, model, tokenizer, inputs)
    _check_room(arch, len(domains), Path(folder))
    training = model.training
    try:
        with staged(folder, overwrite) as staging:
            saliency = _write_moments(model.eval(), arch, config, domains, staging)
            save_file({str(i): domain.heldout.contiguous() for i, domain in enumerate(domains)}, staging / HELDOUT)
            Manifest.of(config, domains, tokenizer).save(staging / MANIFEST_NAME)
            written = Statistics(
                staging,
                model.config.model_type,
                fingerprint(model),
                None if tokenizer is None else vocabulary_hash(tokenizer),
                saliency,
                [StoredDomain(domain.name, domain.weight, list(domain.samples.shape)) for domain in domains],
                {path.name: StoredFile.of(path) for path in sorted(staging.iterdir())},
            )
            written.save()
    finally:
        model.train(training)
    return replace(written, folder=Path(folder))


def _write_moments(
    model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig, domains: Sequence[Domain], folder: Path
) -> bool:
    """One file for each layer; says whether it holds what the loss says."""
    batches = batches_of(domains, config.batch_size)
    gradient = CRITERIA.get(config.scored_by).needs_gradient
    losses = saliencies(model, arch, batches) if gradient else {}
    passes = passes_over(model, arch, batches)
    for layer in tqdm(range(arch.num_layers), desc="calibration", unit="layer"):
        found = {}
        for space in arch.at(layer):
            for axis, parts in zip(space.into, passes.gather(layer, space, gram=True), strict=True):
                for index, part in enumerate(parts):
                    loss = losses[axis.module][index] if gradient else None
                    found[key(axis.module, index)] = replace(part, saliency=loss)
        save_moments(found, folder / layer_name(layer))
        passes.advance(layer)
    return gradient


def _check_moments(arch: ArchSpec) -> None:
    if inside := next((space for space in arch.spaces if space.experts is not None), None):
        raise StructPruneError(
            f"This {arch.model_type} model has experts ({inside.experts}), which are judged by the tokens that are "
            "routed to them in a run; only the moments of dense models are stored. Prune it without stats."
        )


def _check_room(arch: ArchSpec, num_domains: int, folder: Path) -> None:
    taps = {axis.module: space.size * axis.per_unit for space in arch.spaces for axis in space.into}
    # A Gram matrix in fp32, and three vectors in fp64.
    need = num_domains * sum(4 * size * size + 24 * size for size in taps.values())
    parent = next(path for path in folder.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise StructPruneError(
            f"The statistics of {num_domains} domains take {need / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB "
            "left; choose another place, or fewer domains."
        )
