"""What is kept of the activations that come by during calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arch.spec import Space
from ..errors import StructPruneError
from .collect import intercept
from .experts import Routed
from .stats import Moments


def listen(experts: nn.Module, domains: Sequence[int], run: Callable[[int], object]) -> tuple[Routed, ...]:
    """What an experts module is called with while `run(index)` runs each batch.

    Args:
        experts: The module.
        domains: Of each batch.
        run: Runs one batch through the module.
    """
    found: list[Routed] = []
    current = 0

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, choice, gates = [*args, *kwargs.values()][:3]
        found.append(Routed(current, hidden.detach().reshape(-1, hidden.shape[-1]), choice, gates))

    with intercept([experts], before):
        for index, domain in enumerate(domains):
            current = domain
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
    """Moments by tap and domain; `domain` says which one is running."""

    def __init__(self, spaces: Sequence[Space], gram: bool, num_domains: int, device: torch.device):
        self.domain = 0
        self.taps = {
            axis.module: [Moments.empty(space.size * axis.block, gram, device) for _ in range(num_domains)]
            for space in spaces
            for axis in space.into
        }

    def see(self, tap: str, x: Tensor) -> None:
        """Take in one activation."""
        self.taps[tap][self.domain].update(x)

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
