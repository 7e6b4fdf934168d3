"""Running statistics of the inputs of a consumer, by domain and mixed over the domains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arch.devices import rows_at_once
from ..system.errors import StructPruneError


# The minimum number of rows of a Gram matrix that are computed at a time.
PANEL_ROWS = 512
# Whether torch multiplies bf16 matrices on a GPU into an fp32 product. torch 2.8 and later do.
MM_TAKES_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()
# The number of tokens that are in memory in fp64 at a time on a CPU.
TOKENS_AT_ONCE = 256
FP64_BYTES = 8


@dataclass
class Moments:
    """Count, mean and second moment of the inputs of a consumer, in one domain or in the mixture of several.

    All are running *means*, not sums, so that fp32 does not lose precision with the number of tokens.

    Attributes:
        count: The number of tokens.
        mean: E[x], shape `(n,)`, fp64.
        square: The second moment E[x²] of each component, shape `(n,)`, fp64.
        gram: The Gram matrix E[x xᵀ], shape `(n, n)`, fp32; None if only its diagonal is gathered.
        prior: The criterion's prior of each component, shape `(n,)`; see `Criterion.prior`.
        energy: E‖W x‖² with the consumer's original weight W, shape `()`, fp64; None if the outputs were not observed.
        error_mean: The mean E[e] of the error e that error feedback corrects, shape `(out,)`, fp32; None without it.
        error_cross: The cross-moment E[e xᵀ], shape `(out, n)`, fp32; None without error feedback.
    """

    count: int
    mean: Tensor
    square: Tensor
    gram: Tensor | None = None
    prior: Tensor | None = None
    energy: Tensor | None = None
    error_mean: Tensor | None = None
    error_cross: Tensor | None = None

    @classmethod
    def empty(cls, size: int, gram: bool = False, device: torch.device | str = "cpu", out: int = 0) -> Moments:
        """Return moments of no tokens.

        Args:
            size: The number of inputs n.
            gram: Whether a Gram matrix is collected.
            device: The device of the tensors.
            out: The number of outputs. If it is above 0, moments of the error are collected.
        """
        mean = torch.zeros(size, dtype=torch.float64, device=device)
        moments = cls(0, mean, torch.zeros_like(mean))
        if gram:
            moments.gram = torch.zeros(size, size, device=device)
        if out:
            moments.error_mean = torch.zeros(out, device=device)
            moments.error_cross = torch.zeros(out, size, device=device)
        return moments

    @torch.no_grad()
    def update(self, x: Tensor, error: Tensor | None = None, output: Tensor | None = None) -> Moments:
        """Add inputs to the running means, and return these moments.

        Args:
            x: Inputs of the consumer, shape `(..., n)`.
            error: The error of the layer's output to correct, shape `(..., out)`.
            output: The outputs of the consumer with its original weight, shape `(..., out)`.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if len(x) == 0:
            return self

        self.count += len(x)
        share = len(x) / self.count
        x = x.to(self.mean.device)
        # Products of bfloat16 are exact in fp32 on CUDA.
        if not (x.is_cuda and x.dtype == torch.bfloat16):
            x = x.float()

        self._update_means(x, share)
        if self.gram is not None:
            update_gram_(self.gram, x, share)

        if error is not None and self.error_mean is not None and self.error_cross is not None:
            error = error.reshape(-1, error.shape[-1]).to(self.mean.device)
            self.error_mean.lerp_(error.float().mean(0), share)
            add_product_(self.error_cross, error, x, share)

        if output is not None:
            energy = output.detach().float().square().sum(-1).double().mean().to(self.mean.device)
            if self.energy is None:
                self.energy = energy
            else:
                self.energy.lerp_(energy, share)
        return self

    def _update_means(self, x: Tensor, share: float) -> None:
        """Add inputs of shape `(tokens, n)` to the mean and the second moments, in fp64 for a part at a time."""
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        square = torch.zeros_like(mean)
        for part in x.split(rows_at_once(x.device, FP64_BYTES * x.shape[1], TOKENS_AT_ONCE)):
            precise = part.double()
            token_weights = precise.new_full((len(part),), 1 / len(x))
            mean.add_(token_weights @ precise)
            square.add_(token_weights @ precise.square_())

        self.mean.lerp_(mean, share)
        self.square.lerp_(square, share)

    def select(self, columns: Sequence[int] | Tensor) -> Moments:
        """Return the moments of some components."""
        index = torch.as_tensor(columns, device=self.mean.device)
        selected = Moments(self.count, self.mean[index], self.square[index], error_mean=self.error_mean)
        if self.gram is not None:
            selected.gram = submatrix(self.gram, index, index)
        if self.prior is not None:
            selected.prior = self.prior[index]
        if self.error_cross is not None:
            selected.error_cross = self.error_cross[:, index]
        return selected

    @property
    def variance(self) -> Tensor:
        """Return Var[x], shape `(n,)`, fp64."""
        return (self.square - self.mean.square()).clamp(min=0)

    def full_gram(self) -> Tensor:
        """Return the Gram matrix. Raise a ValueError if it was not gathered."""
        if self.gram is None:
            raise ValueError("these moments were gathered without a Gram matrix")
        return self.gram

    def tensors(self) -> dict[str, Tensor]:
        """Return the gathered tensors by the name of their field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "prior"}

    def checked(self, module: str, domain: int, may_be_empty: bool = False) -> Moments:
        """Return these moments after a check.

        Args:
            module: The module whose inputs these are, for errors.
            domain: The number of the domain, for errors.
            may_be_empty: Whether there may be no tokens.

        Raises:
            StructPruneError: If the moments have no tokens, or one is NaN or infinite.
        """
        if not (self.count or may_be_empty):
            raise StructPruneError(f"{module} never ran during calibration in domain {domain}.")

        # Both tensors are checked at once, because each check makes the host wait for a GPU.
        if not torch.isfinite(torch.stack([self.mean, self.square])).all():
            raise StructPruneError(
                f"NaN or infinite activations at {module} in domain {domain}. Load the model in float32 or bfloat16, "
                "or check its weights."
            )
        return self


def output_energy(weight: Tensor, moments: Moments) -> float:
    """Compute E‖W x‖² of a consumer: from its observed outputs, or else from the Gram matrix or the second moments.

    With second moments alone, components are assumed to be uncorrelated. `weight` has the shape `(out, n)`.
    """
    if moments.energy is not None:
        return float(moments.energy)
    if moments.gram is None:
        return float(weight.square().sum(0) @ moments.square.to(weight))

    # tr(W H Wᵀ) = ⟨W H, W⟩, 256 rows of W at a time.
    parts = [((rows @ moments.gram.to(rows)) * rows).sum(dtype=torch.float64) for rows in weight.split(256)]
    return float(torch.stack(parts).sum())


class Mixer:
    """The mixture of the moments of one consumer over the domains, which are added one after the other.

    The moments of the mixture and of one domain are in memory. Each domain is divided by its output energy, so that a
    domain with large activations does not outweigh the others.

    Args:
        weight: The original weight of the consumer, shape `(out, n)`.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self._sums: dict[str, Tensor] = {}
        self._total = 0.0
        self._count = 0
        self._energy = 0.0
        # Whether any domain so far had tokens, and whether any had outputs that are not all zero.
        self._rank = (False, False)

    @torch.no_grad()
    def add(self, moments: Moments, share: float) -> None:
        """Add a domain with its share of the mixture, and free its matrices."""
        energy = output_energy(self.weight, moments)

        # An expert may get no tokens of a domain, or have no output in it. Such a domain counts only if all domains
        # are like it: the first domain with tokens or outputs replaces the sums so far.
        rank = (moments.count > 0, energy > 0)
        if rank > self._rank:
            self._sums = {}
            self._total = 0.0
            self._count = 0
            self._energy = energy
            self._rank = rank
        if rank != self._rank:
            return

        weight = share
        if energy > 0:
            weight = share * self._energy / energy
        self._total += weight
        self._count += moments.count
        for name, tensor in moments.tensors().items():
            if name in self._sums:
                self._sums[name].add_(tensor, alpha=weight)
            elif name == "gram":  # the largest tensor is not copied
                self._sums[name] = tensor.mul_(weight)
            else:
                self._sums[name] = tensor * weight

        moments.gram = None
        moments.error_cross = None

    def moments(self) -> Moments:
        """Return the moments of the mixture. Call it once, after the last `add`."""
        means = {name: tensor.div_(self._total) for name, tensor in self._sums.items()}
        self._sums = {}
        return Moments(self._count, **means)


def mixed(by_domain: Iterable[Sequence[Moments]], shares: Sequence[float], weights: Sequence[Tensor]) -> list[Moments]:
    """Mix the moments of the domains for each consumer.

    Args:
        by_domain: The moments of all consumers by domain.
        shares: The share of each domain in the mixture.
        weights: The original weight of each consumer, shape `(out, n)`.
    """
    mixers = [Mixer(weight) for weight in weights]
    for share, all_moments in zip(shares, by_domain, strict=True):
        for mixer, moments in zip(mixers, all_moments, strict=True):
            mixer.add(moments, share)

    return [mixer.moments() for mixer in mixers]


@torch.no_grad()
def update_gram_(gram: Tensor, x: Tensor, share: float) -> None:
    """Add tokens to a running Gram matrix E[x xᵀ].

    Args:
        gram: The matrix, shape `(n, n)`, which changes.
        x: The inputs, shape `(tokens, n)`.
        share: The share of these tokens among all tokens so far.
    """
    # The matrix is symmetric, so only the part on and above the diagonal is computed, in at most 8 panels.
    step = max(PANEL_ROWS, -(-len(gram) // 8))
    for start in range(0, len(gram), step):
        rows = slice(start, min(start + step, len(gram)))
        columns = slice(start, len(gram))
        add_product_(gram[rows, columns], x[:, rows], x[:, columns], share)
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T


@torch.no_grad()
def add_product_(total: Tensor, x: Tensor, y: Tensor, share: float) -> None:
    """Add the mean of x yᵀ over tokens to a running mean in fp32.

    Args:
        total: The running mean, shape `(m, n)`, which changes.
        x: A tensor of shape `(tokens, m)`.
        y: A tensor of shape `(tokens, n)`.
        share: The share of these tokens among all tokens so far.
    """
    if MM_TAKES_OUT_DTYPE and x.dtype == y.dtype == torch.bfloat16 and x.is_cuda:
        product = torch.mm(x.T, y, out_dtype=torch.float32)
    else:
        product = x.T.float() @ y.float()
    # Adding the product directly would lose precision when few tokens follow many.
    total.lerp_(product.div_(len(x)), share)


@torch.no_grad()
def submatrix(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Copy some rows and columns of a matrix. Complete rows are copied only for a panel at a time."""
    part = matrix.new_empty(len(rows), len(columns))
    for target, panel in zip(part.split(PANEL_ROWS), rows.split(PANEL_ROWS), strict=True):
        target.copy_(matrix[panel].index_select(1, columns))
    return part
