"""How much whole layers matter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import exp, log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..arch.load import layer_list
from ..arch.spec import ArchSpec
from ..calibration.tally import Batch, unmasked
from ..errors import StructPruneError
from ..forward.hooks import bypass, intercept
from ..forward.metrics import perplexity, run_model
from ..registry import Registry


if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_INFLUENCE = "block_influence"


class LayerCriterion(ABC):
    """Judges the layers of a model by what it does with text."""

    @abstractmethod
    def score(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
        """One positive score per layer, higher = keep.

        Args:
            model: The model, in eval mode.
            arch: Its description.
            batches: Text of one domain.

        Returns:
            Shape `(layers,)`.
        """


LAYER_CRITERIA: Registry[LayerCriterion] = Registry("layer criterion", "optimum_structprune.layer_criteria")


@LAYER_CRITERIA.register(BLOCK_INFLUENCE)
class BlockInfluence(LayerCriterion):
    """1 - cos(input, output) of a layer, in the mean over tokens (ShortGPT, Men et al. 2024, eq. 1)."""

    @torch.no_grad()
    def score(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
        """See `LayerCriterion.score`."""
        total = torch.zeros(arch.num_layers, dtype=torch.float64)
        inputs: dict[int, Tensor] = {}
        count, mask = 0, batches[0].mask

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        def after(index: int, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            left, right = (unmasked(x.double(), mask) for x in (inputs.pop(index), hidden))
            total[index] += float((1 - cosine_similarity(left, right, dim=-1)).sum())

        with intercept(layer_list(model, arch), before, after):
            for batch in batches:
                mask = batch.mask
                run_model(model, batch.ids)
                count += batch.ids.numel() if mask is None else int(mask.sum())
        return total / count


@LAYER_CRITERIA.register("loss_increase")
class LossIncrease(LayerCriterion):
    """Perplexity without the layer over perplexity with it: e to the increase of the loss.

    One pass over the text for every layer, where `BlockInfluence` takes one for all of them. The loss is that of all
    tokens.
    """

    def score(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
        """See `LayerCriterion.score`."""
        if not arch.causal:
            raise StructPruneError(
                f"'loss_increase' is the loss at predicting the next token, which a {arch.model_type} model does not "
                f"do; use {BLOCK_INFLUENCE!r}."
            )
        text = torch.cat([batch.ids for batch in batches])
        dense = log(perplexity(model, text))
        scores = []
        for layer in layer_list(model, arch):
            with bypass(layer):
                scores.append(exp(log(perplexity(model, text)) - dense))
        return torch.tensor(scores, dtype=torch.float64)
