"""Sums up the activations that hooks see in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arch.spec import Space
from ..errors import StructPruneError
from ..forward.hooks import intercept
from ..forward.layers import Batch
from .experts import Routed
from .moments import Moments


# A channel whose factor has less than this share of the mean square comes through a norm too little to be fitted.
LEAST_SHARE = 0.1


def unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of an activation that moments are taken of, shape `(tokens, n)`. `x` has the shape `(..., n)`."""
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None else x[mask.flatten().to(x.device)]


def listen(experts: nn.Module, batches: Sequence[Batch], run: Callable[[int], object]) -> tuple[Routed, ...]:
    """What an experts module is called with while `run(index)` runs each batch."""
    calls: list[Routed] = []
    current = batches[0]

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = (unmasked(x.detach(), current.mask) for x in [*args, *kwargs.values()][:3])
        calls.append(Routed(current.domain, *tokens))

    with intercept([experts], before):
        for index, batch in enumerate(batches):
            current = batch
            run(index)
    return tuple(calls)


def size_of(x: Tensor) -> Tensor:
    """The root of the mean square of each token, shape `(..., 1)`, fp32."""
    return x.float().square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def normalised(x: Tensor) -> Tensor:
    """Tokens relative to their size, fp32. `x` has the shape `(..., channels)`."""
    return x.float() / size_of(x)


class Norm(NamedTuple):
    """A norm between a consumer and the residual stream: its full name, and its factors, shape `(channels,)`."""

    module: str
    weight: Tensor

    def before(self, error: Tensor) -> Tensor:
        """The error of the norm's input, relative to the size of that, which gives an error behind the norm, shape
        `(..., channels)`; what hardly comes through the norm is left out.
        """
        square = self.weight.square()
        return error * self.weight / (square + LEAST_SHARE * square.mean())


class Accumulator:
    """Sums up the inputs of consumers in one domain by module, while `batch` says which samples are running."""

    def __init__(
        self,
        spaces: Sequence[Space],
        gram: bool,
        domain: int,
        device: torch.device,
        ways: Mapping[str, float | Norm] | None = None,
        out: int = 0,
    ):
        self.batch: Batch | None = None
        self.domain, self.ways = domain, ways or {}
        # Inputs and products of consumers whose error is known only once the layer has run to its end.
        self.pending: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.moments = {
            axis.module: Moments.empty(
                space.size * axis.per_unit, gram, device, out if axis.module in self.ways else None
            )
            for space in spaces
            for axis in space.into
        }

    def add(self, module: str, x: Tensor, product: Tensor | None = None) -> None:
        """Take in the input of a consumer and its product with the weight, or keep both until `add_error`."""
        x, product = self._counted(x), None if product is None else self._counted(product)
        if module in self.ways:
            self.pending[module] = x, product
        else:
            self.moments[module].update(x, output=product)

    def add_error(self, error: Tensor) -> None:
        """Take in the inputs that are pending, with the error of the layer's output, shape `(..., out)`."""
        error = self._counted(error)
        for module, (x, product) in self.pending.items():
            way = self.ways[module]
            if not isinstance(way, Norm):
                self.moments[module].update(x, error / way, product)
            elif product is not None:
                # The norm divides by the size of the product, so that is what an error of a token is relative to.
                self.moments[module].update(x.float() / size_of(product), way.before(error), normalised(product))
        self.pending = {}

    def of(self, space: Space) -> list[Moments]:
        """The moments of a space's consumers."""
        modules = [axis.module for axis in space.into]
        by_consumer = [self.moments[module].add_up_().checked(module, self.domain) for module in modules]
        for module, moments in zip(modules, by_consumer, strict=True):
            if moments.count == 0:
                raise StructPruneError(f"{module} never ran during calibration in domain {self.domain}.")
        return by_consumer

    def _counted(self, x: Tensor) -> Tensor:
        return unmasked(x, None if self.batch is None else self.batch.mask)
