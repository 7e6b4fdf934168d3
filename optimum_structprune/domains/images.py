"""The domains of a config as images, some of them held out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..config.domains import DomainConfig
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError, one_line
from ..system.fingerprint import tensor_hash
from .domain import Domain
from .load import num_heldout, split_samples
from .manifest import Manifest
from .packing import HELDOUT, USED
from .resolve import resolve, texts_of
from .sources import images


def image_domains(config: StructPruneConfig, processor: Any, seen: Manifest | None = None) -> list[Domain]:
    """The domains of a config as pixels, shape `(samples, channels, height, width)`; each image has one use, also over
    all domains and what an earlier run has `seen`.
    """
    if processor is None:
        raise StructPruneError("The domains are images, and reading them takes an image processor; pass the model's.")
    domains, uses = resolve(texts_of(config)), {} if seen is None else seen.uses()
    weights = [domain.weight for domain in domains]

    def needs(index: int, num_samples: int) -> list[int]:
        count = split_samples(num_samples, weights)[index]
        return [num_heldout(count, float(config.holdout)), count]

    loaded = []
    for index, domain in enumerate(domains):
        asked, pixels = needs(index, config.num_samples), _pixels(domain, config.seed, processor)
        heldout, pixels = _taken(pixels, asked[0], HELDOUT, uses)
        used, _ = _taken(pixels, asked[1], USED, uses)
        if (have := len(heldout) + len(used)) < sum(asked):
            fewer = range(config.num_samples, len(domains) - 1, -1)
            enough = next((f"num_samples={few} would do." for few in fewer if sum(needs(index, few)) <= have), "")
            raise StructPruneError(
                f"The domain {domain.name!r} has {have} images that differ and serve nothing else, and calibration "
                f"and held-out samples take {sum(asked)}. {enough or 'Give it more.'}"
            )
        loaded.append(
            Domain(
                domain.name,
                domain.weight / sum(weights),
                torch.stack([*used.values()]),
                torch.stack([*heldout.values()]),
                origin=domain,
                documents=tuple(used),
                heldout_documents=tuple(heldout),
            )
        )
    return loaded


def _taken(
    pixels: Iterator[Tensor], need: int, use: str, uses: dict[str, str]
) -> tuple[dict[str, Tensor], Iterator[Tensor]]:
    """The first images for one use by hash, `need` of them as far as there are, and all others; `uses` grows."""
    taken: dict[str, Tensor] = {}
    passed: list[Tensor] = []
    while len(taken) < need and (sample := next(pixels, None)) is not None:
        if uses.setdefault(name := tensor_hash(sample), use) == use:
            taken[name] = sample
        else:
            passed.append(sample)
    return taken, chain(passed, pixels)


def _pixels(domain: DomainConfig, seed: int, processor: Any) -> Iterator[Tensor]:
    """What the processor makes of each image, all of one shape."""
    shape = None
    for image in images(domain, seed):
        colours = image.convert("RGB") if hasattr(image, "convert") else image
        try:
            pixels = processor(colours, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # whatever code of many authors makes of an odd image
            reason = one_line(error)
            raise StructPruneError(f"The domain {domain.name!r}: an image cannot be read: {reason}") from error
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise StructPruneError(
                f"The domain {domain.name!r}: the image processor gives images of the shapes {tuple(shape)} and "
                f"{tuple(pixels.shape)}, and samples have one; let it resize them to one size."
            )
        yield pixels
