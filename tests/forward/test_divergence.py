"""The divergence is the Kullback-Leibler divergence, and its coarser form a lower bound of it."""

import pytest
import torch

from optimum_structprune.forward.divergence import divergence, divergence_from_likeliest, likeliest


def pair():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(3, 5, 40, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_torch(temperature):
    mine, theirs = pair()
    p, q = torch.softmax(theirs / temperature, -1), torch.softmax(mine / temperature, -1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="sum") / 15 * temperature**2
    torch.testing.assert_close(divergence(mine, theirs, temperature), expected)


def test_top_k_grows_to_the_full_divergence():
    mine, theirs = pair()
    values = [float(divergence(mine, theirs, top_k=k)) for k in (1, 5, 20, 40)]
    assert values == sorted(values) and values[0] > 0
    almost = float(divergence(mine, theirs, top_k=39))
    assert almost == pytest.approx(values[-1], rel=1e-4)


def test_no_divergence_from_itself_and_no_gradient_into_the_teacher():
    mine, theirs = (tensor.requires_grad_() for tensor in pair())
    assert float(divergence(mine, mine, top_k=4)) == pytest.approx(0, abs=1e-6)
    divergence(mine, theirs, top_k=4).backward()
    assert theirs.grad is None and torch.isfinite(mine.grad).all()


def test_a_certain_teacher_gives_finite_gradients():
    mine, _ = pair()
    theirs = torch.zeros_like(mine)
    theirs[..., 0] = 100.0
    divergence(mine.requires_grad_(), theirs, top_k=2).backward()
    assert torch.isfinite(mine.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_are_all_that_top_k_needs(temperature):
    mine, theirs = pair()
    stored = likeliest(theirs, 5, temperature)
    assert [tensor.shape for tensor in stored] == [(3, 5, 5)] * 2
    live = divergence(mine, theirs, temperature, top_k=5)
    assert torch.equal(divergence_from_likeliest(mine, *stored, temperature), live)
