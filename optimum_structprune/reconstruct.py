"""A few training steps per block toward the output of the dense block: the bridge between a refit and recovery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibration.taps import evidence


@dataclass(frozen=True)
class Reconstruction:
    """What the steps have brought in one block.

    Attributes:
        before: Error on the batches that are held out, relative to the energy that the dense block adds to its input.
        after: The same with the weights that are kept.
        epochs: Passes over the batches until then.
    """

    before: float
    after: float
    epochs: int


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """A module whose weights are fp32 for a while: steps are too small for half precision."""
    dtype = next(module.parameters()).dtype
    module.float()
    try:
        yield
    finally:
        module.to(dtype)


def reconstruct_(
    block: nn.Module,
    run: Callable[[int], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    domains: Sequence[int],
    masks: Sequence[Tensor | None],
    shares: Sequence[float],
    epochs: int,
    learning_rate: float,
) -> Reconstruction:
    """Train all weights of a block that has been shrunk and refitted (2510.14444, section 3).

    The error of a batch is `‖output - target‖² / ‖target - input‖²`, so that domains are on one scale. The last batch
    of each domain that has several is held out: training stops once its error no longer falls, and the best weights
    are kept.

    Args:
        block: The block, in fp32.
        run: Output of the block for the batch of an index, shape `(batch, seq_length, hidden)`.
        inputs: The block's input, by batch.
        targets: The dense block's output, by batch.
        domains: Of each batch.
        masks: Tokens of each batch that count, shape `(batch, seq_length)`; None for all.
        shares: Weight of each domain.
        epochs: Passes over the batches at most.
        learning_rate: Of Adam.
    """
    of = [[index for index, domain in enumerate(domains) if domain == which] for which in set(domains)]
    held = [indices[-1] for indices in of if len(indices) > 1]
    train = [index for index in range(len(domains)) if index not in held]

    def loss(index: int) -> Tensor:
        mask = masks[index]
        target, given = (evidence(x.float(), mask) for x in (targets[index], inputs[index]))
        energy = (target - given.to(target.device)).square().mean()
        error = (evidence(run(index).float(), mask) - target).square().mean()
        return shares[domains[index]] * error / energy.clamp(min=torch.finfo(energy.dtype).tiny)

    def measure() -> float:
        with torch.no_grad():
            return float(sum(loss(index) for index in held or train))

    trained = [parameter for parameter in block.parameters() if parameter.is_floating_point()]
    wanted = [parameter.requires_grad for parameter in trained]
    before = best = measure()
    kept, reached = [parameter.detach().clone() for parameter in trained], 0
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    with torch.enable_grad():
        for epoch in range(1, epochs + 1):
            for index in train:
                optimizer.zero_grad()
                loss(index).backward()
                optimizer.step()
            if (now := measure()) >= best:
                break
            best, reached = now, epoch
            kept = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter, values, flag in zip(trained, kept, wanted, strict=True):
            parameter.copy_(values)
            parameter.grad = None
            parameter.requires_grad_(flag)
    return Reconstruction(before, best, reached)
