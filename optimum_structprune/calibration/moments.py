"""Running sufficient statistics of the input of one consumer, for one domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import StructPruneError


# The fields of Moments that not every run gathers and that files may hold.
OPTIONAL = ("gram", "saliency")


@dataclass
class ErrorMoments:
    """The error that error feedback asks a consumer to make up for, and its cross-moment with the input x.

    Attributes:
        mean: The mean E[e] of the error e, shape `(out,)`, fp32.
        cross: The cross-moment E[e xᵀ], shape `(out, n)`, fp32.
    """

    mean: Tensor
    cross: Tensor

    @torch.no_grad()
    def update(self, error: Tensor, x: Tensor, share: float) -> None:
        """Take in errors, shape `(tokens, out)`, with inputs, shape `(tokens, n)`.

        Args:
            error: The errors.
            x: The inputs of the same tokens.
            share: The share that these tokens have in all tokens so far.
        """
        error, x = (tensor.to(self.cross.device, torch.float32) for tensor in (error, x))
        self.mean.lerp_(error.mean(0), share)
        self.cross.lerp_(error.T @ x / len(x), share)


@dataclass
class Moments:
    """Count, mean and second moment of the inputs of a consumer.

    Kept as running *means*, not sums, so that fp32 does not lose digits however many tokens there are.

    Attributes:
        count: The number of tokens seen.
        mean: The mean E[x], shape `(n,)`, fp64.
        square: The second moment E[x²] of each component, shape `(n,)`, fp64.
        gram: The Gram matrix E[x xᵀ], shape `(n, n)`, fp32; None where only the diagonal is kept.
        saliency: The first-order Taylor term E|x ∂L/∂x|, shape `(n,)`, fp64; None where no gradients are needed.
        error: The error that error feedback asks the consumer to make up for; None where there is none.
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
        """Moments of no tokens.

        Args:
            size: The number of components n.
            gram: Whether a Gram matrix is gathered.
            device: The device that holds them.
            out: The size of the error that the consumer makes up for; None where there is no error feedback.
        """
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
        """Take in inputs `x` of shape `(..., n)`, and with error feedback their `error` of shape `(..., out)`.

        Returns:
            These moments themselves.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if len(x) == 0:
            return self
        self.count += len(x)
        share = len(x) / self.count
        precise = x.double()
        self.mean.lerp_(precise.mean(0).to(self.mean.device), share)
        self.square.lerp_(precise.square().mean(0).to(self.square.device), share)
        if self.gram is not None:
            x = x.to(self.gram.device, torch.float32)
            self.gram.lerp_(x.T @ x / len(x), share)
        if self.error is not None and error is not None:
            self.error.update(error.reshape(-1, error.shape[-1]), x, share)
        return self

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together; neither operand changes."""
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


def mix(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """The weighted average of several moments: those of the mixture distribution.

    Args:
        moments: Moments of the same consumer, all with or all without a Gram matrix.
        weights: One non-negative weight for each; they are normalised to sum to one.
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

    grams = [part.gram for part in moments if part.gram is not None]
    saliencies = [part.saliency for part in moments if part.saliency is not None]
    errors = [part.error for part in moments if part.error is not None]
    return Moments(
        count=sum(part.count for part in moments),
        mean=average([part.mean for part in moments]),
        square=average([part.square for part in moments]),
        gram=average(grams) if grams else None,
        saliency=average(saliencies) if saliencies else None,
        error=ErrorMoments(
            average([error.mean for error in errors]),
            average([error.cross for error in errors]),
        )
        if errors
        else None,
    )


def save_moments(moments_by_name: Mapping[str, Moments], path: str | Path) -> None:
    """Write moments, by name, to one safetensors file."""
    tensors = {}
    for name, moments in moments_by_name.items():
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
        device: The device that takes the tensors.

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
