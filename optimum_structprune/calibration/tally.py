"""What is kept of the activations that come by during calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arch.spec import Space
from ..errors import StructPruneError
from ..forward.hooks import intercept
from .experts import Routed
from .moments import Moments


def evidence(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of an activation that statistics are taken from.

    Args:
        x: Shape `(..., n)`.
        mask: One value per token; None for all of them.
    """
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None else x[mask.flatten().to(x.device)]


@dataclass(frozen=True)
class Batch:
    """Samples of one domain.

    Attributes:
        domain: Its number.
        ids: Shape `(batch, seq_length)`.
        mask: Tokens that give evidence, of the same shape; None for all.
    """

    domain: int
    ids: Tensor
    mask: Tensor | None = None


def listen(experts: nn.Module, batches: Sequence[Batch], run: Callable[[int], object]) -> tuple[Routed, ...]:
    """What an experts module is called with while `run(index)` runs each batch.

    Args:
        experts: The module.
        batches: What is run.
        run: Runs one batch through the module.
    """
    found: list[Routed] = []
    current = batches[0]

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = (evidence(x.detach(), current.mask) for x in [*args, *kwargs.values()][:3])
        found.append(Routed(current.domain, *tokens))

    with intercept([experts], before):
        for index, batch in enumerate(batches):
            current = batch
            run(index)
    return tuple(found)


def finite(space: Space, parts: list[Moments]) -> list[Moments]:
    """The moments of a consumer, by domain, as they are.

    Raises:
        StructPruneError: If a NaN or an infinity came in.
    """
    for domain, moments in enumerate(parts):
        if not moments.finite:
            raise StructPruneError(
                f"NaN or infinite activations at {space.into[0].module} in domain {domain}; "
                "load the model in float32 or bfloat16, or check its weights."
            )
    return parts


class Tally:
    """Moments by tap and domain; `batch` says what is running.

    Args:
        spaces: Their consumers are the taps.
        gram: Whether to gather Gram matrices.
        num_domains: How many domains there are.
        device: Where the moments are.
        gains: Of the taps whose consumer makes up for errors: what one unit of its output adds to where these are.
        out: Size of an error.
    """

    def __init__(
        self,
        spaces: Sequence[Space],
        gram: bool,
        num_domains: int,
        device: torch.device,
        gains: Mapping[str, float] | None = None,
        out: int = 0,
    ):
        self.batch: Batch | None = None
        self.gains = gains or {}
        self.waiting: dict[str, Tensor] = {}
        self.taps = {
            axis.module: [
                Moments.empty(space.size * axis.per_unit, gram, device, out if axis.module in self.gains else None)
                for _ in range(num_domains)
            ]
            for space in spaces
            for axis in space.into
        }

    def see(self, tap: str, x: Tensor) -> None:
        """Take in one activation, or keep it until its error is known."""
        assert self.batch is not None
        x = evidence(x, self.batch.mask)
        if tap in self.gains:
            self.waiting[tap] = x
        else:
            self.taps[tap][self.batch.domain].update(x)

    def settle(self, error: Tensor) -> None:
        """Take in what waits, with the error of its batch, shape `(..., out)`."""
        assert self.batch is not None
        error = evidence(error, self.batch.mask)
        for tap, x in self.waiting.items():
            self.taps[tap][self.batch.domain].update(x, error / self.gains[tap])
        self.waiting = {}

    def of(self, space: Space) -> list[list[Moments]]:
        """The moments of a space's consumers.

        Raises:
            StructPruneError: If a NaN or an infinity came in, or a tap saw nothing.
        """
        for axis in space.into:
            for domain, moments in enumerate(finite(space, self.taps[axis.module])):
                if moments.count == 0:
                    raise StructPruneError(f"{axis.module} never ran during calibration in domain {domain}.")
        return [self.taps[axis.module] for axis in space.into]
