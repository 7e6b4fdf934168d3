"""Criteria for whole layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..arch.hooks import first_of, hidden_states_of, intercept
from ..arch.modules import layer_list
from ..arch.spec import ArchSpec
from ..config.pruning import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..method.layers import Batch, run_model
from ..system.processes import all_reduce_


class LayerCriterion(ABC):
    """Scores the layers of a model by running it on text."""

    @abstractmethod
    def score(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
        """One positive score per layer, higher = keep.

        Args:
            model: The model, in eval mode.
            arch: The description of the model.
            batches: The text of one domain; of several processes that share the samples, what this one runs. A mean
                over all text takes `system.processes.all_reduce_`; what differs between processes counts as the first
                has it.

        Returns:
            The scores, shape `(layers,)`, fp64.
        """


@LAYER_CRITERIA.register(BLOCK_INFLUENCE)
class BlockInfluence(LayerCriterion):
    """The score is the mean of 1 - cos(input, output) of a layer over tokens (ShortGPT, Men et al. 2024, eq. 1)."""

    @torch.no_grad()
    def score(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
        """See `LayerCriterion.score`."""
        lost: list[list[Tensor]] = [[] for _ in range(arch.num_layers)]
        inputs: dict[int, Tensor] = {}
        count, batch = 0, batches[0]

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = hidden_states_of(args, kwargs)

        def after(index: int, output: Any) -> None:
            states = (inputs.pop(index), first_of(output))
            entering, leaving = (batch.counted(x.double()) for x in states)
            lost[index].append((1 - cosine_similarity(entering, leaving, dim=-1)).sum())

        with intercept(layer_list(model, arch), before, after):
            for batch in batches:
                run_model(model, batch.ids)
                count += batch.ids.numel() if batch.mask is None else int(batch.mask.sum())
        total = torch.stack([torch.stack(of_layer).sum().cpu() for of_layer in lost])
        tokens = torch.tensor(float(count), dtype=torch.float64)
        all_reduce_([total, tokens])
        return total / tokens
