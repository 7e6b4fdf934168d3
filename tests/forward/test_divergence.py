"""The divergence is the Kullback-Leibler divergence."""

import pytest
import torch

from optimum_structprune.forward.metrics import divergence


def pair():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(3, 5, 40, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_torch(temperature):
    mine, taught = pair()
    p, q = torch.softmax(taught / temperature, -1), torch.softmax(mine / temperature, -1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="sum") / 15 * temperature**2
    torch.testing.assert_close(divergence(mine, taught, temperature), expected)


def test_no_divergence_from_itself_and_no_gradient_into_the_teacher():
    mine, taught = (tensor.requires_grad_() for tensor in pair())
    assert float(divergence(mine, mine)) == pytest.approx(0, abs=1e-6)
    divergence(mine, taught).backward()
    assert taught.grad is None and torch.isfinite(mine.grad).all()


def test_a_certain_teacher_gives_finite_gradients():
    mine, _ = pair()
    taught = torch.zeros_like(mine)
    taught[..., 0] = 100.0
    divergence(mine.requires_grad_(), taught).backward()
    assert torch.isfinite(mine.grad).all()
