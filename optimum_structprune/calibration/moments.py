"""Running sufficient statistics of the input of one consumer, for one domain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import StructPruneError
from ..system.processes import add_up_, process_count
from .linalg import add_product_, operand, submatrix, update_gram_


# The fields of Moments that not every run gathers and that files may hold.
OPTIONAL = ("gram", "energy")
# The fields of ErrorMoments.
ERROR = ("mean", "cross")
# So many tokens are in memory in fp64 at a time.
PRECISE_TOKENS = 256


@dataclass
class ErrorMoments:
    """Of the error e that error feedback asks a consumer with the input x to make up for: the mean E[e], shape
    `(out,)`, and the cross-moment E[e xᵀ], `(out, n)`, in fp32.
    """

    mean: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, out: int, size: int, device: torch.device | str = "cpu") -> ErrorMoments:
        """Moments of no errors, shape `(out,)` each, beside inputs of shape `(size,)`."""
        return cls(mean=torch.zeros(out, device=device), cross=torch.zeros(out, size, device=device))

    @torch.no_grad()
    def update(self, error: Tensor, x: Tensor, share: float) -> None:
        """Take in errors, shape `(tokens, out)`, with inputs, shape `(tokens, n)`."""
        error, x = (tensor.to(self.cross.device) for tensor in (error, x))
        self.mean.lerp_(error.float().mean(0), share)
        add_product_(self.cross, error, x, share)


@dataclass
class Moments:
    """Count, mean and second moment of the inputs of a consumer.

    Kept as running *means*, not sums, so that fp32 does not lose digits however many tokens there are.

    Attributes:
        count: The number of tokens seen.
        mean: The mean E[x], shape `(n,)`, fp64.
        square: The second moment E[x²] of each component, shape `(n,)`, fp64.
        gram: The Gram matrix E[x xᵀ], shape `(n, n)`, fp32; None where only the diagonal is kept.
        saliency: What `Criterion.watches` says of each component, shape `(n,)`, fp64; None where it is None.
        producer_norms: The norms of the weights that give each component, shape `(n,)`; None where no criterion needs
            them, or units are no single channels.
        energy: The output energy E‖W x‖² with the dense weight W of the consumer, shape `()`, fp64; None where no
            output was seen.
        error: The error that error feedback asks the consumer to make up for; None where there is none.
    """

    count: int
    mean: Tensor
    square: Tensor
    gram: Tensor | None = None
    saliency: Tensor | None = None
    producer_norms: Tensor | None = None
    energy: Tensor | None = None
    error: ErrorMoments | None = None

    @classmethod
    def empty(
        cls, size: int, gram: bool = False, device: torch.device | str = "cpu", out: int | None = None
    ) -> Moments:
        """Moments of no tokens."""
        return cls(
            count=0,
            mean=torch.zeros(size, dtype=torch.float64, device=device),
            square=torch.zeros(size, dtype=torch.float64, device=device),
            gram=torch.zeros(size, size, device=device) if gram else None,
            error=None if out is None else ErrorMoments.empty(out, size, device),
        )

    @torch.no_grad()
    def update(self, x: Tensor, error: Tensor | None = None, output: Tensor | None = None) -> Moments:
        """Take in inputs, and return these moments. `x` has the shape `(..., n)`, the others `(..., out)`."""
        x = x.detach().reshape(-1, x.shape[-1])
        if len(x) == 0:
            return self
        self.count += len(x)
        share = len(x) / self.count
        x = operand(x.to(self.mean.device))
        mean, square = _precise_means(x)
        self.mean.lerp_(mean, share)
        self.square.lerp_(square, share)
        if self.gram is not None:
            update_gram_(self.gram, x, share)
        if self.error is not None and error is not None:
            self.error.update(error.reshape(-1, error.shape[-1]), x, share)
        if output is not None:
            energy = output.detach().float().square().sum(-1).double().mean().to(self.mean.device)
            self.energy = energy if self.energy is None else self.energy.lerp_(energy, share)
        return self

    @torch.no_grad()
    def add_up_(self) -> Moments:
        """Add up the tokens of all processes, see `processes.across_processes`, and return these moments."""
        if process_count() == 1:
            return self
        local_count = self.count
        totals = torch.tensor([local_count, self.energy is not None], device=self.mean.device)
        add_up_([totals])
        self.count = int(totals[0])
        if self.energy is None and totals[1]:
            self.energy = self.mean.new_zeros(())  # no token came here, and every process has to take part
        tensors = list(_tensors_of(self).values())
        for tensor in tensors:
            tensor.mul_(local_count / max(self.count, 1))
        add_up_(tensors)
        return self

    def select(self, columns: Sequence[int] | Tensor) -> Moments:
        """The moments of some components only."""
        index = torch.as_tensor(columns, device=self.mean.device)
        gram = None if self.gram is None else submatrix(self.gram, index, index)
        saliency, norms = (None if of is None else of[index] for of in (self.saliency, self.producer_norms))
        error = None if self.error is None else replace(self.error, cross=self.error.cross[:, index])
        return Moments(self.count, self.mean[index], self.square[index], gram, saliency, norms, error=error)

    @property
    def variance(self) -> Tensor:
        """Var[x], shape `(n,)`, fp64."""
        return (self.square - self.mean.square()).clamp(min=0)

    def full_gram(self) -> Tensor:
        """The Gram matrix, where it was gathered; a ValueError otherwise."""
        if self.gram is None:
            raise ValueError("these moments were gathered without a Gram matrix")
        return self.gram

    def checked(self, module: str, domain: int) -> Moments:
        """These moments of the input of a module in a domain; NaN and infinity are refused."""
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.square).all()):
            raise StructPruneError(
                f"NaN or infinite activations at {module} in domain {domain}; load the model in float32 or bfloat16, "
                "or check its weights."
            )
        return self


def _precise_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """E[x] and E[x²] over tokens in fp64, shape `(n,)` each."""
    mean, square = (x.new_zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
    for part in x.split(PRECISE_TOKENS):
        precise = part.double()
        share = precise.new_full((len(part),), 1 / len(x))
        mean.add_(share @ precise)
        square.add_(share @ precise.square_())
    return mean, square


class WeightedMean:
    """The weighted average of moments that come one after the other; in memory is the average alone."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._total, self._count = 0.0, 0

    @torch.no_grad()
    def add(self, part: Moments, weight: float, take: bool = False) -> None:
        """Take in one part; with `take` its matrices are let go."""
        self._total, self._count = self._total + weight, self._count + part.count
        for name, tensor in _tensors_of(part).items():
            if name in self._sums:
                self._sums[name].add_(tensor, alpha=weight)
            else:
                self._sums[name] = tensor.mul_(weight) if take and name == "gram" else tensor * weight
        if take:
            part.gram = part.error = None

    def moments(self) -> Moments:
        """The average."""
        means = {name: tensor.div_(self._total) for name, tensor in self._sums.items()}
        self._sums = {}
        seen = {name: means.pop(f"error.{name}") for name in ERROR} if "error.mean" in means else {}
        error = ErrorMoments(**seen) if seen else None
        return Moments(self._count, means.pop("mean"), means.pop("square"), error=error, **means)


def _tensors_of(moments: Moments) -> dict[str, Tensor]:
    """The tensors of moments by the name of their field."""
    tensors = {name: getattr(moments, name) for name in ("mean", "square", *OPTIONAL)}
    if moments.error is not None:
        tensors |= {f"error.{name}": getattr(moments.error, name) for name in ERROR}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def save_moments(moments_by_name: Mapping[str, Moments], path: str | Path) -> None:
    """Write moments, by name, to one safetensors file."""
    tensors = {f"{name}/count": torch.tensor(moments.count) for name, moments in moments_by_name.items()}
    for name, moments in moments_by_name.items():
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in _tensors_of(moments).items()}
    save_file(tensors, path)


def load_moments(path: str | Path, names: Collection[str], device: torch.device | str = "cpu") -> dict[str, Moments]:
    """The moments of these names that `save_moments` wrote."""
    with safe_open(path, "pt", str(device)) as file:
        fields: dict[str, dict[str, Any]] = {name: {} for name in names}
        for key in file.keys():  # noqa: SIM118  # it is no mapping
            name, _, part = key.rpartition("/")
            if name in fields:
                fields[name][part] = file.get_tensor(key)
    return {name: Moments(int(of_name.pop("count")), **of_name) for name, of_name in fields.items()}
