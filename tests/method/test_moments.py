"""Streaming moments, the mixture of the domains, and the refits that they give, against direct computations."""

from itertools import product

import pytest
import torch
from helpers import mix, mixture_of, weighed
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config

from optimum_structprune import StructPruneError
from optimum_structprune.criteria import CRITERIA, parameters_of
from optimum_structprune.method.calibrate import Moments, output_energy
from optimum_structprune.method.refit import least_squares, ridge_strength, solve_damped, with_damped_factor


FFN, TOKENS, DAMPING = 1536, 2048, 0.01
on_threads = pytest.mark.usefixtures("threads")


def streamed(x: torch.Tensor, sizes: list[int] | None = None) -> Moments:
    moments = Moments.empty(x.shape[1], gram=True)
    for part in x.split(len(x) if sizes is None else sizes):
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
    left, right = streamed(x[:cut]), streamed(x[cut:])
    assert_same(mix([left, right], [left.count, right.count]), streamed(x))


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
    assert_same(streamed(x).select([4, 1]), streamed(x[:, [4, 1]]))
    plus, minus = (Moments.empty(6, gram=True, out=4).update(x, sign * errors) for sign in (1, -1))
    torch.testing.assert_close(plus.select([4, 1]).error_cross, plus.error_cross[:, [4, 1]])
    assert mix([plus, minus], [1.0, 1.0]).error_cross.abs().max() < 1e-6
    assert plus.checked("a", 0) is plus
    for bad in ("nan", "inf"):
        with pytest.raises(StructPruneError, match="NaN or infinite activations at a in domain 0"):
            streamed(torch.tensor([[1.0, float(bad)]])).checked("a", 0)


matrices = st.tuples(st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**31)).map(
    lambda case: torch.rand(case[:2], generator=torch.Generator().manual_seed(case[2])) ** 3 + 1e-3
)


@settings(max_examples=40)
@given(contributions=matrices, scale=st.floats(1e-3, 1e3))
def test_domains_that_agree_are_one_domain_whatever_their_scale(contributions, scale):
    alone = weighed(1.0).combined(contributions[:1])
    same = contributions[:1].expand(3, -1) * torch.tensor([[1.0], [scale], [1.0]])
    torch.testing.assert_close(weighed(0.2, 0.3, 0.5).combined(same), alone, rtol=1e-3, atol=1e-5)


def scores_of(shares, criterion, weight, moments, columns_per_unit=1):
    return criterion(
        weight, mixture_of(moments, shares, weight), columns_per_unit, **parameters_of(criterion, config(), layer=0)
    )


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    streams = [scale * torch.randn(40, 6, generator=generator) for scale in (1.0, 7.0)]
    return weight, [streamed(stream) for stream in streams]


@pytest.mark.parametrize("name", ["wanda", "flap", "obs", "magnitude"])
def test_the_mean_of_energies_is_taken_over_moments(parts, name):
    weight, moments = parts
    criterion = CRITERIA.get(name)
    shares = zip((0.3, 0.7), moments, strict=True)
    expected = mix(moments, [share / output_energy(weight, part) for share, part in shares])
    torch.testing.assert_close(mixture_of(moments, (0.3, 0.7), weight).gram, expected.gram)
    found = scores_of((0.3, 0.7), criterion, weight, moments, 2)
    torch.testing.assert_close(found, criterion(weight, expected, 2, **parameters_of(criterion, config(), layer=0)))


def test_a_domain_that_never_came_here_has_no_say(parts):
    weight, moments = parts
    wanda, shares = CRITERIA.get("wanda"), [2 / 7, 5 / 7]
    two = scores_of(shares, wanda, weight, moments)
    silent = Moments.empty(6, gram=True), streamed(torch.zeros(9, 6))
    for place, part in product(range(3), silent):
        of_three, shares_of_three = [*moments], [0.7 * share for share in shares]
        of_three.insert(place, part)
        shares_of_three.insert(place, 0.3)
        torch.testing.assert_close(scores_of(shares_of_three, wanda, weight, of_three), two)


def problem(seed: int, n: int = 12, out: int = 5, count: int = 200):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator) @ torch.randn(n, n, generator=generator) + 0.5
    return torch.randn(out, n, generator=generator), torch.randn(out, generator=generator), x


def correlated(seed: int, n: int, count: int):
    """A weight, shape `(5, n)`, and inputs that share as much as they have of their own, as those of an FFN do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, n // 4, generator=generator) @ torch.randn(n // 4, n, generator=generator)
    own = torch.randn(count, n, generator=generator) * shared.std(0)
    return torch.randn(5, n, generator=generator), shared + own


def test_a_single_token_changes_nothing_but_the_bias():
    for seed in range(20):
        weight, bias, x = problem(seed, n=40, count=1)
        keep = torch.arange(24)
        refitted, shift = least_squares(weight, bias, streamed(x), keep, 0.1)
        assert torch.equal(refitted, weight[:, keep])
        torch.testing.assert_close(x[:, keep] @ refitted.T + shift, x @ weight.T + bias)


def test_strong_damping_returns_the_original_weights_not_zero():
    weight, _, x = problem(4)
    keep = torch.arange(6)
    new, _ = least_squares(weight, None, streamed(x), keep, 1e6)
    torch.testing.assert_close(new, weight[:, keep], rtol=1e-3, atol=1e-3)
    assert ridge_strength(0.1, 50, 1000) == pytest.approx(0.2), "twice the damping with twenty tokens a column"
    assert ridge_strength(0.1, 50, 10**9) == pytest.approx(0.1) and ridge_strength(0.0, 50, 10) == 0.0
    dead = solve_damped(lambda dtype: torch.zeros(3, 3, dtype=dtype), torch.zeros(3), torch.zeros(2, 3), 1e-2)
    assert (dead == 0).all()


@pytest.mark.parametrize("tokens", [60, 90, 150])
def test_with_few_tokens_a_stronger_ridge_loses_less_on_others(tokens):
    damping, keep, lost = 0.1, torch.arange(40), {True: 0.0, False: 0.0}
    for seed in range(20):
        weight, x = correlated(seed, n=60, count=20_000)
        for grown in (True, False):
            strength = ridge_strength(damping, len(keep), tokens) if grown else damping
            refitted, _ = least_squares(weight, None, streamed(x[:tokens]), keep, strength)
            lost[grown] += float((x[10_000:] @ weight.T - x[10_000:, keep] @ refitted.T).square().mean())
    assert lost[True] < 0.95 * lost[False]


@pytest.fixture(params=[1, 2])
def threads(request):
    """What is factored is factored otherwise on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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
