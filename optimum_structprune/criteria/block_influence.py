"""ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, https://arxiv.org/abs/2403.03853."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..arch.hooks import first_of, hidden_states_of, intercept
from ..arch.modules import layer_list
from ..arch.spec import LAYER, ArchSpec
from ..method.layers import Batch, run_model
from ..system.processes import all_reduce_
from .registry import DEFAULT_CRITERIA, register_criterion


@register_criterion(DEFAULT_CRITERIA[LAYER], judges=LAYER, paper="ShortGPT, Men et al. 2024, arXiv:2403.03853")
@torch.no_grad()
def block_influence(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
    """Return the mean of 1 - cos(input, output) over tokens for each layer, shape `(layers,)`, fp64.

    This is equation 1 of ShortGPT.
    """
    distances: list[list[Tensor]] = [[] for _ in range(arch.num_layers)]
    inputs: dict[int, Tensor] = {}
    batch = batches[0]

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = hidden_states_of(args, kwargs)

    def on_return(index: int, output: Any) -> None:
        layer_output = batch.counted(first_of(output).double())
        layer_input = batch.counted(inputs.pop(index).double())
        # A layer of a model on several devices may return its output on another device.
        similarity = cosine_similarity(layer_input.to(layer_output.device), layer_output, dim=-1)
        distances[index].append((1 - similarity).sum())

    count = 0
    with intercept(layer_list(model, arch), on_call, on_return):
        for batch in batches:
            run_model(model.base_model, batch.ids)  # type: ignore[arg-type]
            count += batch.ids.numel() * batch.counts

    total = torch.stack([torch.stack(by_batch).sum().cpu() for by_batch in distances])
    tokens = torch.tensor(float(count), dtype=torch.float64)
    all_reduce_([total, tokens])
    return total / tokens
