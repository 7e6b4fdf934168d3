"""How far a refit may go: chosen on statistics that it has not seen. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .calibration.stats import Moments
from .refit import Refit


DAMPINGS = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Choice:
    """What was chosen on held-out statistics.

    Attributes:
        damping: The chosen ridge.
        strength: How much of the way from the original kept weights to the refitted ones was gone.
        error: Held-out squared error, relative to that of the refit which the config asks for.
    """

    damping: float
    strength: float
    error: float


def guarded_refit(
    refit: Refit,
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    keep: Tensor,
    damping: float,
    held: Moments,
    factors: Sequence[float] = DAMPINGS,
) -> tuple[Tensor, Tensor | None, Choice]:
    """The damping and strength with the least squared error on held-out statistics.

    Between the original kept weights and the refitted ones the squared error is a parabola, so the best strength for
    one damping, from 0 to 1, takes no search.

    Args:
        refit: The refit.
        weight: W, shape `(out, n)`.
        bias: Shape `(out,)`, or None.
        moments: Of the input, for the refit.
        keep: Kept columns, ascending.
        damping: What the config asks for.
        held: Moments of other tokens, with Gram matrix.
        factors: Tried as multiples of `damping`, beside `damping` itself.

    Returns:
        W', shape `(out, kept)`, the bias, and what was chosen.
    """
    plain = weight[:, keep]
    asked = refit(weight, bias, moments, keep, damping)
    first, reference = (_error(weight, bias, *one, keep, held) for one in ((plain, bias), asked))
    best: tuple[Tensor, Tensor | None, Choice] | None = None
    for ridge in dict.fromkeys([damping, *(damping * factor for factor in factors)]):
        fitted = asked if ridge == damping else refit(weight, bias, moments, keep, ridge)
        last = reference if ridge == damping else _error(weight, bias, *fitted, keep, held)
        middle_bias = bias if bias is None or fitted[1] is None else (bias + fitted[1]) / 2
        middle = _error(weight, bias, (plain + fitted[0]) / 2, middle_bias, keep, held)
        strength = _best_strength(first, middle, last)
        mixed = plain + strength * (fitted[0] - plain)
        shift = fitted[1] if bias is None or fitted[1] is None else bias + strength * (fitted[1] - bias)
        error = _error(weight, bias, mixed, shift, keep, held) / max(reference, 1e-30)
        if best is None or error < best[2].error:
            best = mixed, shift, Choice(ridge, strength, error)
    assert best is not None
    return best


def _best_strength(first: float, middle: float, last: float) -> float:
    """Where a parabola that takes these values at 0, 1/2 and 1 is least in between."""
    curve, slope = 2 * first + 2 * last - 4 * middle, 4 * middle - 3 * first - last
    return 1.0 if curve <= 0 else min(max(-slope / (2 * curve), 0.0), 1.0)


def _error(
    weight: Tensor, bias: Tensor | None, refitted: Tensor, new_bias: Tensor | None, keep: Tensor, held: Moments
) -> float:
    """E‖W x + b + e − W' x_S − b'‖², with e the error that the drift says to make up for, or nothing."""
    left, drift = weight.clone(), held.drift
    left[:, keep] -= refitted
    error = float(((left @ held.full_gram().to(left)) * left).sum())
    if drift is not None:
        error += drift.energy + 2 * float((left * drift.cross.to(left)).sum())
    if new_bias is not None:
        shift = -new_bias if bias is None else bias - new_bias
        error += float(2 * (shift @ (left @ held.mean.to(left))) + shift @ shift)
        error += 0.0 if drift is None else float(2 * (shift @ drift.mean.to(shift)))
    return error
