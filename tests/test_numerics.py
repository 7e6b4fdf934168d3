"""Every numerical path at the sizes of real models, on one thread and on several: SmolLM2's FFN has 1,536 channels, a
KV group of SmolLM2 192 columns and one of Llama 3 512. `obs` on such groups is in `criteria/test_criteria.py`.
"""

import pytest
import torch

from optimum_structprune.method.calibrate import Moments, output_energy
from optimum_structprune.method.refit import least_squares, solve_damped, with_damped_factor


FFN = 1536
TOKENS = 2048
DAMPING = 0.01


@pytest.fixture(params=[1, 2])
def threads(request):
    """What is factored is factored otherwise on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


on_threads = pytest.mark.usefixtures("threads")


def inputs(size, tokens=TOKENS, seed=0):
    """Correlated inputs with a mean, as activations are: fp32, shape `(tokens, size)`."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, size, generator=generator)
    return torch.randn(tokens, size, generator=generator) + 0.3 * common + 0.5


def close(actual, expected, relative):
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < relative, error


def fitted(x, weight, keep, bias, error):
    """What `least_squares` stands for, from the inputs themselves in fp64."""
    x, weight = x.double(), weight.double()
    removed = torch.ones(x.shape[1], dtype=torch.bool)
    removed[keep] = False
    left, target = x[:, keep], x[:, removed] @ weight[:, removed].T
    target = target if error is None else target + error.double()
    if bias is not None:
        centre, shift = left.mean(0), target.mean(0)
        left, target = left - centre, target - shift
    gram = left.T @ left / len(x)
    gram.diagonal().mul_(1 + DAMPING)
    change = torch.linalg.solve(gram, left.T @ target / len(x)).T
    refitted = weight[:, keep] + change
    return refitted, None if bias is None else bias.double() + shift - change @ centre


@on_threads
@pytest.mark.parametrize(("error_feedback", "with_bias"), [(False, False), (True, True)])
@pytest.mark.parametrize(("size", "kept"), [(FFN, 1152), (2 * 512, 512)])
def test_the_refit_is_the_least_squares_solution(size, kept, with_bias, error_feedback):
    generator, x = torch.Generator().manual_seed(1), inputs(size)
    weight = torch.randn(16, size, generator=generator)
    bias = torch.randn(16, generator=generator) if with_bias else None
    error = torch.randn(TOKENS, 16, generator=generator) + x[:, :16] if error_feedback else None
    keep = torch.randperm(size, generator=generator)[:kept].sort().values
    moments = Moments.empty(size, gram=True, out=16 if error_feedback else 0)
    for part in range(0, TOKENS, 512):
        moments.update(x[part : part + 512], None if error is None else error[part : part + 512])
    found, shifted = least_squares(weight, bias, moments, keep, DAMPING)
    expected, expected_bias = fitted(x, weight, keep, bias, error)
    close(found, expected, 1e-3)
    if bias is not None:
        close(shifted, expected_bias, 1e-2)


@on_threads
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_singular_gram_matrix_is_solved_with_the_least_damping_that_works(damping):
    x = inputs(FFN, tokens=100)
    x[:, 5] = 0  # a channel that never fires
    gram = Moments.empty(FFN, gram=True).update(x).full_gram()

    def copy(dtype):
        return gram.to(dtype, copy=True)

    factor = with_damped_factor(copy, gram.diagonal(), damping, lambda factor: factor)
    ridge = (factor.double() @ factor.double().T - gram.double()).diagonal() / gram.diagonal().double().clamp(min=1e-6)
    least = max(damping, 1e-8)
    used = float(ridge[torch.arange(FFN) != 5].median())
    assert torch.isfinite(factor).all() and used < 1.1 * least if damping else used < 1e-4
    right = torch.randn(8, FFN, generator=torch.Generator().manual_seed(0)) @ gram
    solved = solve_damped(copy, gram.diagonal(), right, damping)
    assert torch.isfinite(solved).all() and float((solved @ gram - right).norm() / right.norm()) < 0.2


def test_output_energies_are_those_of_the_outputs():
    x, weight = inputs(FFN), torch.randn(576, FFN, generator=torch.Generator().manual_seed(2))
    domains = [Moments.empty(FFN, gram=True).update(part) for part in x.split(TOKENS // 2)]
    for moments, part in zip(domains, x.split(TOKENS // 2), strict=True):
        expected = float((part.double() @ weight.double().T).square().sum(1).mean())
        assert output_energy(weight, moments) == pytest.approx(expected, rel=1e-4)
        moments.update(part, output=part @ weight.T)  # what was seen of the outputs goes before what follows from H
        assert output_energy(weight, moments) == pytest.approx(expected, rel=1e-5)
