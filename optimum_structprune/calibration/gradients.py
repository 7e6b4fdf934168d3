"""How the loss depends on the input of every consumer: one backward pass through the whole model per batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from ..forward.clock import Clock
from ..forward.hooks import observe
from ..forward.processes import add_up_
from .tally import Batch


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The label of a token that no loss is taken of.
IGNORED = -100


def saliencies(
    model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None
) -> dict[str, Tensor]:
    """Σ|x ∂L/∂x| of every consumer's input x, per predicted token, by module, shape `(domains, n)`, fp64.

    L is the sum of the next-token losses, so that the scale does not depend on the batch size; where a
    domain has a mask, of its tokens alone. A whole batch's activations are held at a time, as in training, but no
    gradient of any weight.

    Args:
        model: A causal language model.
        arch: Its description.
        batches: The calibration samples.
        clock: Takes the time of each domain.

    Raises:
        StructPruneError: If the model does not predict the next token, or has experts.
    """
    check_gradients(arch)
    modules = sorted({axis.module for space in arch.spaces for axis in space.into})
    domains, clock = 1 + max(batch.domain for batch in batches), clock or Clock(model.device)
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(domains, dtype=torch.float64)
    with _frozen(model):
        for batch in batches:
            labels = batch.ids if batch.mask is None else batch.ids.masked_fill(~batch.mask, IGNORED)
            predicted = int((labels[:, 1:] != IGNORED).sum())
            if not predicted:
                continue
            counts[batch.domain] += predicted
            with clock.running(batch.domain):
                gradients = _backward(model, modules, batch.ids, labels, predicted)
            for name, sum_of_batch in gradients.items():
                total = sums.setdefault(name, torch.zeros(domains, len(sum_of_batch), dtype=torch.float64))
                total[batch.domain] += sum_of_batch.cpu()
    add_up_([counts, *(sums[name] for name in sorted(sums))])
    return {name: total / counts.clamp(min=1)[:, None] for name, total in sums.items()}


@torch.enable_grad()
def _backward(
    model: PreTrainedModel, modules: Sequence[str], ids: Tensor, labels: Tensor, predicted: int
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x.retain_grad()
        seen[name] = x

    ids = ids.to(model.device)
    # The weights are frozen, so the graph has to begin at the embeddings.
    start = model.get_input_embeddings()(ids).detach().requires_grad_()
    with observe(model, modules, see):
        loss = model(inputs_embeds=start, labels=labels.to(ids.device), use_cache=False).loss
    (loss * predicted).backward()
    return {
        name: (x.detach() * x.grad).abs().double().flatten(0, -2).sum(0)
        for name, x in seen.items()
        if x.grad is not None
    }


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def check_gradients(arch: ArchSpec) -> None:
    """Refuse models whose gradients are not gathered.

    Raises:
        StructPruneError: If the model does not predict the next token, or has experts.
    """
    if not arch.causal or any(space.experts for space in arch.spaces):
        raise StructPruneError(
            f"Gradients are gathered for dense models that predict the next token, not for {arch.model_type!r}; "
            "choose criterion='obs' or 'wanda'."
        )
