"""Runs calibration text through a dense model once, and keeps what pruning needs of it in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arch.load import ModelInfo
from .arch.meta import dequantized
from .arch.spec import ArchSpec
from .config.pruning import StructPruneConfig
from .domains.manifest import MANIFEST_NAME
from .forward.metrics import evaluating, own_settings
from .pruning.checks import CALIBRATE, check, check_arguments, check_config_kind
from .pruning.room import with_batch_size
from .sources.data import CalibrationData
from .sources.stored import HELDOUT, Statistics, StoredDomain, StoredFile, moments_name, save_moments
from .system.disk import Output, used_paths
from .system.fingerprint import fingerprint, vocabulary_hash
from .system.stages import progress, stage


@own_settings()
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
        tokenizer: The tokenizer of the model; it reads the domains.
        config: Names the domains, and says how many samples of what length. Its `stats` play no part.
        folder: The folder to write to; it is made if need be.
        overwrite: Whether a folder that exists is replaced.
        inputs: Calibration inputs by domain, in place of the text that the config names; see `prune_model`.

    Raises:
        StructPruneError: If the folder exists, the disk is too small, a domain cannot be read, or the model has
            experts.
    """
    check_config_kind(config)
    check_arguments(model, tokenizer, inputs)
    output = Output(folder, overwrite, [model.name_or_path, *used_paths(config)])
    output.check()
    # One pass over the dense model: there are no rounds in which weights could move, and no error to feed back.
    config = replace(config, stats=None, objective="mean", error_feedback=0.0)
    described = ModelInfo.of(model, config.arch_file)
    check(config, described, {}, CALIBRATE, has_tokenizer=tokenizer is not None, has_inputs=inputs is not None)
    model, arch = dequantized(model, inplace=False), described.arch
    with stage("domains", {}):
        data = CalibrationData.read(config, model, tokenizer, inputs)
    data = with_batch_size(data, arch, model, dict.fromkeys(arch.names, 1))  # the moments of every space
    need_bytes = len(data.domains) * _moments_bytes(arch)
    with evaluating(model), output.staged(need_bytes) as staging:
        _write_moments(model, arch, data, staging)
        heldout = {str(index): domain.heldout.contiguous() for index, domain in enumerate(data.domains)}
        save_file(heldout, staging / HELDOUT)
        data.manifest(tokenizer).save(staging / MANIFEST_NAME)
        written = Statistics(
            staging,
            model.config.model_type,
            fingerprint(model),
            None if tokenizer is None else vocabulary_hash(tokenizer),
            [StoredDomain(domain.name, domain.weight, list(domain.samples.shape)) for domain in data.domains],
            {path.name: StoredFile.of(path) for path in sorted(staging.iterdir())},
        )
        written.save()
    return replace(written, folder=Path(folder))


def _write_moments(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, folder: Path) -> None:
    """One file for each layer and domain."""
    source = data.source(model, arch, fixed=True)
    for layer in progress(range(arch.num_layers), desc="calibration", unit="layer"):
        spaces = list(arch.at(layer))
        with source.at(layer):
            streams = [source.moments(layer, space, gram=True) for space in spaces]
            for domain, by_space in enumerate(zip(*streams, strict=True)):
                by_module = {
                    axis.module: moments
                    for space, by_consumer in zip(spaces, by_space, strict=True)
                    for axis, moments in zip(space.consumers, by_consumer, strict=True)
                }
                save_moments(by_module, folder / moments_name(layer, domain))
            source.advance(layer)


def _moments_bytes(arch: ArchSpec) -> int:
    """What the moments of a domain take: a Gram matrix in fp32, and three vectors in fp64, of each consumer."""
    sizes = {axis.module: space.size * axis.per_unit for space in arch.spaces for axis in space.consumers}
    return sum(4 * size * size + 24 * size for size in sizes.values())
