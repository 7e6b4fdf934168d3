"""Streaming moments against the direct computation."""

import pytest
import torch
from helpers import mix
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_structprune import StructPruneError
from optimum_structprune.method.calibrate import Moments


def streamed(x: torch.Tensor, sizes: list[int], gram: bool = True) -> Moments:
    moments = Moments.empty(x.shape[1], gram)
    for part in x.split(sizes):
        moments.update(part)
    return moments


def assert_same(left: Moments, right: Moments) -> None:
    assert left.count == right.count
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.square, right.square, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.gram, right.gram, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum), seed=st.integers(0, 99))
def test_stream_equals_direct(sizes, seed):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed)) + 3
    moments = streamed(x, sizes)
    assert moments.count == len(x)
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    torch.testing.assert_close(moments.square, x.double().square().mean(0))
    torch.testing.assert_close(moments.gram, x.T @ x / len(x))
    torch.testing.assert_close(moments.variance, x.double().var(0, correction=0), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_merge_equals_concatenation(cut, seed):
    x = torch.randn(41, 4, generator=torch.Generator().manual_seed(seed))
    left, right = streamed(x[:cut], [cut] if cut else []), streamed(x[cut:], [41 - cut])
    assert_same(mix([left, right], [left.count, right.count]), streamed(x, [41]))


def test_a_long_stream_keeps_its_digits():
    # A sum of squares in fp32 would stop growing at 2**24 equal summands; running means do not.
    moments = Moments.empty(1, gram=True)
    moments.count = 2**26
    moments.mean += 1
    moments.square += 1
    moments.gram += 1
    for _ in range(64):
        moments.update(torch.full((2**16, 1), 2.0))
    share = 64 * 2**16 / (2**26 + 64 * 2**16)
    assert float(moments.gram) == pytest.approx(1 + 3 * share, rel=1e-3)
    assert float(moments.square) == pytest.approx(1 + 3 * share, rel=1e-9)


def test_what_is_selected_is_a_principal_submatrix_and_the_error_goes_with_the_rest():
    x, errors = torch.randn(20, 6), torch.randn(20, 4)
    assert_same(streamed(x, [20]).select([4, 1]), streamed(x[:, [4, 1]], [20]))
    plus, minus = (Moments.empty(6, gram=True, out=4).update(x, sign * errors) for sign in (1, -1))
    torch.testing.assert_close(plus.select([4, 1]).error_cross, plus.error_cross[:, [4, 1]])
    assert mix([plus, minus], [1.0, 1.0]).error_cross.abs().max() < 1e-6
    assert plus.checked("a", 0) is plus
    for bad in ("nan", "inf"):
        with pytest.raises(StructPruneError, match="NaN or infinite activations at a in domain 0"):
            streamed(torch.tensor([[1.0, float(bad)]]), [1]).checked("a", 0)
