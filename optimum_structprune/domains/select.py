"""Which samples of a pool are calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arch.load import describe, layer_list
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..forward.hooks import intercept
from ..forward.metrics import evaluating, perplexity, run_model
from .packing import Frame, Packed, Tokens


if TYPE_CHECKING:
    from transformers import PreTrainedModel

KMEANS_STEPS = 50


class Selector:
    """Packs a pool of documents, and chooses samples of it.

    Args:
        config: The config that says how to choose, and how large the pool is.
        model: The model that sees the samples, where they are chosen by what it makes of them.
    """

    def __init__(self, config: StructPruneConfig, model: PreTrainedModel | None):
        self.config, self.model = config, model
        self.factor = 1 if config.select == "random" else config.pool_factor

    def pack(self, frame: Frame, pool: Sequence[Tokens], count: int) -> Packed:
        """`count` samples out of a pool that fills at least as many.

        Raises:
            StructPruneError: If choosing takes a model, and there is none that will do.
        """
        how = self.config.select
        if how == "length":
            pool = sorted(pool, key=lambda document: len(document.ids), reverse=True)
        if how in ("random", "length"):
            return frame.pack(pool, count)
        if self.model is None:
            raise StructPruneError(f"select={how!r} runs the model over the text, and there is none; use 'random'.")
        packed = frame.pack(pool, count * self.factor)
        with evaluating(self.model):
            chosen = (self._diverse if how == "diverse" else self._middling)(packed.samples, count)
        return packed.select(sorted(chosen))

    def _diverse(self, samples: Tensor, count: int) -> list[int]:
        assert self.model is not None
        vectors = mean_activations(self.model, samples, self.config.batch_size, self.config.arch_file)
        return nearest_to_centres(vectors, count, self.config.seed)

    def _middling(self, samples: Tensor, count: int) -> list[int]:
        assert self.model is not None
        if not describe(self.model, self.config.arch_file).causal:
            raise StructPruneError("select='perplexity' takes a causal language model; use 'diverse' or 'random'.")
        order = torch.tensor([perplexity(self.model, sample[None]) for sample in samples]).argsort()
        first = (len(samples) - count) // 2
        return order[first : first + count].tolist()


@torch.no_grad()
def mean_activations(model: PreTrainedModel, samples: Tensor, batch_size: int, arch_file: str | None = None) -> Tensor:
    """What enters each layer of the model, averaged over the tokens of each sample.

    Args:
        model: A model in evaluation mode.
        samples: The token ids, shape `(n, seq_length)`.
        batch_size: The number of samples in a forward pass.
        arch_file: A YAML file that describes architectures of your own.

    Returns:
        The means, shape `(n, num_layers * hidden)`, fp32. Those of every layer have the same total variance, since
        later hidden states are larger.
    """
    rows: list[Tensor] = []
    base: Any = model.base_model

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        means.append(hidden.float().mean(1).cpu())

    with intercept(layer_list(model, describe(model, arch_file)), before):
        for ids in samples.split(batch_size):
            means: list[Tensor] = []
            run_model(base, ids)
            rows.append(torch.stack(means, dim=1))
    vectors = torch.cat(rows)
    vectors = vectors - vectors.mean(0)
    spread = vectors.square().sum(-1, keepdim=True).mean(0).sqrt()
    return (vectors / spread.clamp(min=torch.finfo(vectors.dtype).tiny)).flatten(1)


def nearest_to_centres(vectors: Tensor, count: int, seed: int) -> list[int]:
    """One vector for each of `count` clusters: the nearest to each centre of k-means (COLA, arXiv 2510.10618).

    Args:
        vectors: The vectors, shape `(n, d)` with n ≥ count.
        count: The number of clusters.
        seed: The seed of the first centres, which k-means++ draws.

    Returns:
        `count` different indices.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    while len(centres) < count:
        gaps = torch.cdist(vectors, centres).amin(1).square()
        # Vectors that repeat one another leave no gap: any of them will do.
        odds = gaps if float(gaps.sum()) > 0 else torch.ones_like(gaps)
        centres = torch.cat([centres, vectors[torch.multinomial(odds, 1, generator=generator)]])
    for _ in range(KMEANS_STEPS):
        members = torch.cdist(vectors, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, members, vectors)
        sizes = members.bincount(minlength=count)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    distances = torch.cdist(centres, vectors)
    chosen: list[int] = []
    for row in distances:
        row[chosen] = torch.inf
        chosen.append(int(row.argmin()))
    return chosen
