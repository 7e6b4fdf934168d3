"""Running sufficient statistics of one tap, for one domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import StructPruneError


# Of the fields of Moments, those that not every run gathers and that files may hold.
OPTIONAL = ("gram", "saliency")


@dataclass
class ErrorMoments:
    """What a consumer would have to put out beside the dense output, and how that goes with its input x.

    Attributes:
        mean: E[e] of this error e, shape `(out,)`, fp32.
        cross: E[e xᵀ], shape `(out, n)`, fp32.
    """

    mean: Tensor
    cross: Tensor

    @torch.no_grad()
    def update(self, error: Tensor, x: Tensor, share: float) -> None:
        """Take in errors, shape `(tokens, out)`, and inputs, `(tokens, n)`, which are a share of all so far."""
        error, x = (tensor.to(self.cross.device, torch.float32) for tensor in (error, x))
        self.mean.lerp_(error.mean(0), share)
        self.cross.lerp_(error.T @ x / len(x), share)


@dataclass
class Moments:
    """Count, mean and second moment of a stream of vectors.

    Kept as running *means*, not sums, so that fp32 does not lose digits however long the stream is.

    Attributes:
        count: Number of vectors seen.
        mean: E[x], shape `(n,)`, fp64.
        square: E[x²], shape `(n,)`, fp64.
        gram: E[x xᵀ], shape `(n, n)`, fp32; None where only the diagonal is kept.
        saliency: E|x ∂L/∂x|, shape `(n,)`, fp64; None where no criterion asks for gradients.
        error: Where the consumer is to make up for errors that are not its own; None otherwise.
    """

    count: int
    mean: Tensor
    square: Tensor
    gram: Tensor | None = None
    saliency: Tensor | None = None
    error: ErrorMoments | None = None

    @classmethod
    def empty(
        cls, size: int, gram: bool = False, device: torch.device | str = "cpu", out: int | None = None
    ) -> Moments:
        """Nothing seen yet; with `out`, of a tap whose consumer makes up for errors of that size."""
        return cls(
            count=0,
            mean=torch.zeros(size, dtype=torch.float64, device=device),
            square=torch.zeros(size, dtype=torch.float64, device=device),
            gram=torch.zeros(size, size, device=device) if gram else None,
            error=None
            if out is None
            else ErrorMoments(torch.zeros(out, device=device), torch.zeros(out, size, device=device)),
        )

    @torch.no_grad()
    def update(self, x: Tensor, error: Tensor | None = None) -> Moments:
        """Take in `x` of shape `(..., n)`, and where there is a error `error` of shape `(..., out)`; returns self."""
        x = x.detach().reshape(-1, x.shape[-1])
        if len(x) == 0:
            return self
        self.count += len(x)
        share = len(x) / self.count
        wide = x.double()
        self.mean.lerp_(wide.mean(0).to(self.mean.device), share)
        self.square.lerp_(wide.square().mean(0).to(self.square.device), share)
        if self.gram is not None:
            x = x.to(self.gram.device, torch.float32)
            self.gram.lerp_(x.T @ x / len(x), share)
        if self.error is not None and error is not None:
            self.error.update(error.reshape(-1, error.shape[-1]), x, share)
        return self

    def merge(self, other: Moments) -> Moments:
        """The moments of both streams together; neither operand changes."""
        return mix([self, other], [float(self.count), float(other.count)])

    def select(self, columns: Sequence[int] | Tensor) -> Moments:
        """The moments of some components only."""
        index = torch.as_tensor(columns, device=self.mean.device)
        gram = None if self.gram is None else self.gram[index][:, index]
        saliency = None if self.saliency is None else self.saliency[index]
        error = None if self.error is None else replace(self.error, cross=self.error.cross[:, index])
        return Moments(self.count, self.mean[index], self.square[index], gram, saliency, error)

    @property
    def variance(self) -> Tensor:
        """Var[x], shape `(n,)`, fp64."""
        return (self.square - self.mean.square()).clamp(min=0)

    def full_gram(self) -> Tensor:
        """The Gram matrix, where it was gathered; a ValueError otherwise."""
        if self.gram is None:
            raise ValueError("these moments were gathered without a Gram matrix")
        return self.gram

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity has come in."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.square).all())


def mix(parts: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """The weighted average of several moments: those of the mixture distribution.

    Args:
        parts: Moments of the same tap, all with or all without a Gram matrix.
        weights: One non-negative weight each; they are normalised to sum to one.
    """
    total = sum(weights)
    if total <= 0:
        raise StructPruneError("There is nothing to mix: every weight is 0.")
    shares = [weight / total for weight in weights]

    def average(tensors: Sequence[Tensor]) -> Tensor:
        # One at a time: a stack of Gram matrices would take as much memory again.
        total = torch.zeros_like(tensors[0])
        for share, tensor in zip(shares, tensors, strict=True):
            total.add_(tensor, alpha=share)
        return total

    grams = [part.gram for part in parts if part.gram is not None]
    saliencies = [part.saliency for part in parts if part.saliency is not None]
    errors = [part.error for part in parts if part.error is not None]
    return Moments(
        count=sum(part.count for part in parts),
        mean=average([part.mean for part in parts]),
        square=average([part.square for part in parts]),
        gram=average(grams) if grams else None,
        saliency=average(saliencies) if saliencies else None,
        error=ErrorMoments(
            average([error.mean for error in errors]),
            average([error.cross for error in errors]),
        )
        if errors
        else None,
    )


def save_moments(stats: Mapping[str, Moments], path: str | Path) -> None:
    """Write moments, by name, to one safetensors file."""
    tensors = {}
    for name, moments in stats.items():
        tensors[f"{name}/count"] = torch.tensor(moments.count)
        tensors[f"{name}/mean"] = moments.mean
        tensors[f"{name}/square"] = moments.square
        for part in OPTIONAL:
            if (tensor := getattr(moments, part)) is not None:
                tensors[f"{name}/{part}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_moments(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Moments]:
    """Read what `save_moments` wrote.

    Args:
        path: The file.
        device: Where to put the tensors.

    Raises:
        StructPruneError: If the file is missing, damaged or not a statistics file.
    """
    try:
        tensors = load_file(path, str(device))
        names = [name.removesuffix("/count") for name in tensors if name.endswith("/count")]
        if not names:
            raise KeyError("count")
        return {
            name: Moments(
                count=int(tensors[f"{name}/count"]),
                mean=tensors[f"{name}/mean"],
                square=tensors[f"{name}/square"],
                gram=tensors.get(f"{name}/gram"),
                saliency=tensors.get(f"{name}/saliency"),
            )
            for name in names
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise StructPruneError(f"{path} is not a readable statistics file ({error}); calibrate again.") from error
