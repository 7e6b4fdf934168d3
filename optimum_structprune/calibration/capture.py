"""How a model calls its blocks, and what enters the first of them: seen once, so that blocks can run by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arch.load import block_list
from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from ..metrics import run_model
from .calls import Call, equal, first_of
from .collect import StopForward, intercept


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotSequentialError(StructPruneError):
    """The model's blocks cannot be run one by one."""


@torch.no_grad()
def capture(model: PreTrainedModel, spec: ArchSpec, ids: Tensor, whole: bool) -> tuple[Tensor, list[Call]]:
    """The hidden states that enter the first block, and how the model calls its blocks.

    The calls carry masks and rotary embeddings, which may differ by layer type.

    Args:
        model: The model.
        spec: Its description.
        ids: Token ids, shape `(batch, seq_length)`.
        whole: Whether to see every block's call, or to stop at the first.

    Raises:
        NotSequentialError: If a block's input is not just the output of the block before it.
    """
    first: list[Tensor] = []
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if by_name else args[0]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if index and not equal(hidden, outputs[-1]):
            raise NotSequentialError(f"the model changes hidden states between blocks {index - 1} and {index}")
        if not index:
            first.append(hidden)
        calls.append(Call(args if by_name else args[1:], rest, by_name))
        # What follows the last block, such as the logits of a large vocabulary, takes more memory than all before it.
        if not whole or len(calls) == spec.num_blocks:
            raise StopForward

    def after(index: int, output: Any) -> None:
        outputs[:] = [first_of(output)]

    with intercept(block_list(model, spec), before, after):
        try:
            run_model(model, ids)
        except StopForward:
            pass
    return first[0], calls
