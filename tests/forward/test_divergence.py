"""The divergence is the Kullback-Leibler divergence, and its coarser form a lower bound of it."""

import pytest
import torch

from optimum_structprune.forward.divergence import divergence, divergence_from_likeliest, hidden_distance, likeliest


def pair():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(3, 5, 40, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_against_torch(direction, temperature):
    mine, theirs = pair()
    p, q = (theirs, mine) if direction == "forward" else (mine, theirs)
    p, q = torch.softmax(p / temperature, -1), torch.softmax(q / temperature, -1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="sum") / 15 * temperature**2
    torch.testing.assert_close(divergence(mine, theirs, temperature, direction), expected)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_grows_to_the_full_divergence(direction):
    mine, theirs = pair()
    values = [float(divergence(mine, theirs, direction=direction, top_k=k)) for k in (1, 5, 20, 40)]
    assert values == sorted(values) and values[0] > 0
    almost = float(divergence(mine, theirs, direction=direction, top_k=39))
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
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_likeliest_are_all_that_top_k_needs(direction, temperature):
    mine, theirs = pair()
    stored = likeliest(theirs, 5, temperature)
    assert [tensor.shape for tensor in stored] == [(3, 5, 5)] * 2
    live = divergence(mine, theirs, temperature, direction, top_k=5)
    assert torch.equal(divergence_from_likeliest(mine, *stored, temperature, direction), live)


def test_the_distance_of_hidden_states_is_relative_and_every_token_counts_alike():
    target = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.ones(2, 7, 1)
    scale[:, 0] = 1000.0
    for teacher in (target, target * scale, target * 1e-3):
        assert float(hidden_distance([teacher * 1.1], [teacher])) == pytest.approx(0.01, rel=1e-3)
    assert float(hidden_distance([target * 1.1, target], [target, target])) == pytest.approx(0.005, rel=1e-3)
    assert torch.isfinite(hidden_distance([target], [torch.zeros_like(target)]))
