"""Streaming moments, the mixture of the domains, and refits agree with direct computations."""

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


FFN = 1536
TOKENS = 2048
DAMPING = 0.01
on_threads = pytest.mark.usefixtures("threads")


def moments_of(x: torch.Tensor, sizes: list[int] | None = None) -> Moments:
    """Return the moments of inputs that arrive in parts of these sizes, or all at once."""
    if sizes is None:
        sizes = len(x)
    moments = Moments.empty(x.shape[1], gram=True)
    for part in x.split(sizes):
        moments.update(part)
    return moments


def assert_same_moments(moments: Moments, expected: Moments) -> None:
    assert moments.count == expected.count
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.square, expected.square, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.gram, expected.gram, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum), seed=st.integers(0, 99))
def test_streamed_moments_equal_direct_ones(sizes, seed):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed)) + 3
    moments = moments_of(x, sizes)

    assert moments.count == len(x)
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    torch.testing.assert_close(moments.square, x.double().square().mean(0))
    torch.testing.assert_close(moments.gram, x.T @ x / len(x))
    torch.testing.assert_close(moments.variance, x.double().var(0, correction=0), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_merged_moments_equal_the_moments_of_all_inputs(cut, seed):
    x = torch.randn(41, 4, generator=torch.Generator().manual_seed(seed))
    first = moments_of(x[:cut])
    second = moments_of(x[cut:])

    assert_same_moments(mix([first, second], [first.count, second.count]), moments_of(x))


def test_a_long_stream_keeps_its_precision():
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


def test_a_selection_holds_a_principal_submatrix_and_its_part_of_the_error():
    x = torch.randn(20, 6)
    errors = torch.randn(20, 4)
    assert_same_moments(moments_of(x).select([4, 1]), moments_of(x[:, [4, 1]]))

    positive = Moments.empty(6, gram=True, out=4).update(x, errors)
    negative = Moments.empty(6, gram=True, out=4).update(x, -errors)
    torch.testing.assert_close(positive.select([4, 1]).error_cross, positive.error_cross[:, [4, 1]])
    assert mix([positive, negative], [1.0, 1.0]).error_cross.abs().max() < 1e-6
    assert positive.checked("a", 0) is positive


def test_nan_or_infinite_activations_are_refused():
    for value in ("nan", "inf"):
        with pytest.raises(StructPruneError, match="NaN or infinite activations at a in domain 0"):
            moments_of(torch.tensor([[1.0, float(value)]])).checked("a", 0)


def random_contributions(domains, units, seed):
    """Return positive contributions of very different sizes, shape `(domains, units)`."""
    return torch.rand(domains, units, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3


matrices = st.builds(random_contributions, st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**31))


@settings(max_examples=40)
@given(contributions=matrices, scale=st.floats(1e-3, 1e3))
def test_domains_that_agree_count_as_one_domain_at_any_scale(contributions, scale):
    domain = contributions[:1]
    three_domains = domain.expand(3, -1) * torch.tensor([[1.0], [scale], [1.0]])

    combined = weighed(0.2, 0.3, 0.5).combined(three_domains)
    torch.testing.assert_close(combined, weighed(1.0).combined(domain), rtol=1e-3, atol=1e-5)


def scores_of(shares, criterion, weight, moments, columns_per_unit=1):
    """Return the scores of a criterion for the mixture of domains with these shares."""
    parameters = parameters_of(criterion, config(), layer=0)
    return criterion(weight, mixture_of(moments, shares, weight), columns_per_unit, **parameters)


@pytest.fixture
def two_domains():
    """Return a weight, and the moments of two domains with inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    streams = [scale * torch.randn(40, 6, generator=generator) for scale in (1.0, 7.0)]
    return weight, [moments_of(stream) for stream in streams]


@pytest.mark.parametrize("name", ["wanda", "flap", "obs", "magnitude"])
def test_each_domain_is_divided_by_its_output_energy(two_domains, name):
    weight, moments = two_domains
    shares = (0.3, 0.7)
    domain_weights = []
    for share, domain in zip(shares, moments, strict=True):
        domain_weights.append(share / output_energy(weight, domain))
    expected = mix(moments, domain_weights)
    torch.testing.assert_close(mixture_of(moments, shares, weight).gram, expected.gram)

    criterion = CRITERIA.get(name)
    scores = scores_of(shares, criterion, weight, moments, 2)
    expected_scores = criterion(weight, expected, 2, **parameters_of(criterion, config(), layer=0))
    torch.testing.assert_close(scores, expected_scores)


def test_a_domain_without_tokens_or_outputs_does_not_count(two_domains):
    weight, moments = two_domains
    wanda = CRITERIA.get("wanda")
    shares = [2 / 7, 5 / 7]
    expected = scores_of(shares, wanda, weight, moments)

    without_tokens = Moments.empty(6, gram=True)
    without_outputs = moments_of(torch.zeros(9, 6))
    for place, silent_domain in product(range(3), (without_tokens, without_outputs)):
        three_domains = list(moments)
        three_domains.insert(place, silent_domain)
        three_shares = [0.7 * share for share in shares]
        three_shares.insert(place, 0.3)
        torch.testing.assert_close(scores_of(three_shares, wanda, weight, three_domains), expected)


def random_problem(seed: int, n: int = 12, out: int = 5, count: int = 200):
    """Return a weight, a bias and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator) @ torch.randn(n, n, generator=generator) + 0.5
    weight = torch.randn(out, n, generator=generator)
    bias = torch.randn(out, generator=generator)
    return weight, bias, x


def correlated_problem(seed: int, n: int, count: int):
    """Return a weight, shape `(5, n)`, and inputs with half of their variance in common, as the inputs of an FFN."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, n // 4, generator=generator) @ torch.randn(n // 4, n, generator=generator)
    own = torch.randn(count, n, generator=generator) * common.std(0)
    weight = torch.randn(5, n, generator=generator)
    return weight, common + own


def test_a_single_token_changes_only_the_bias():
    for seed in range(20):
        weight, bias, x = random_problem(seed, n=40, count=1)
        keep = torch.arange(24)
        refitted, shifted = least_squares(weight, bias, moments_of(x), keep, 0.1)

        assert torch.equal(refitted, weight[:, keep])
        torch.testing.assert_close(x[:, keep] @ refitted.T + shifted, x @ weight.T + bias)


def test_strong_damping_returns_the_original_weights_not_zero():
    weight, _, x = random_problem(4)
    keep = torch.arange(6)
    refitted, _ = least_squares(weight, None, moments_of(x), keep, 1e6)

    torch.testing.assert_close(refitted, weight[:, keep], rtol=1e-3, atol=1e-3)


def test_the_ridge_grows_if_tokens_are_few():
    assert ridge_strength(0.1, 50, 1000) == pytest.approx(0.2), "twice the damping with twenty tokens a column"
    assert ridge_strength(0.1, 50, 10**9) == pytest.approx(0.1)
    assert ridge_strength(0.0, 50, 10) == 0.0


def test_a_gram_matrix_of_zeros_has_the_solution_zero():
    solution = solve_damped(lambda dtype: torch.zeros(3, 3, dtype=dtype), torch.zeros(3), torch.zeros(2, 3), 1e-2)
    assert (solution == 0).all()


@pytest.mark.parametrize("tokens", [60, 90, 150])
def test_with_few_tokens_a_stronger_ridge_loses_less_on_unseen_tokens(tokens):
    keep = torch.arange(40)
    strengths = {"constant": 0.1, "grown": ridge_strength(0.1, len(keep), tokens)}
    losses = {"constant": 0.0, "grown": 0.0}
    for seed in range(20):
        weight, x = correlated_problem(seed, n=60, count=20_000)
        unseen = x[10_000:]
        for name, strength in strengths.items():
            refitted, _ = least_squares(weight, None, moments_of(x[:tokens]), keep, strength)
            error = unseen @ weight.T - unseen[:, keep] @ refitted.T
            losses[name] += float(error.square().mean())

    assert losses["grown"] < 0.95 * losses["constant"]


@pytest.fixture(params=[1, 2])
def threads(request):
    """Set the number of threads, which changes how torch factorises a matrix."""
    original = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(original)


def activations(size, tokens=TOKENS, seed=0):
    """Return correlated inputs with a mean, shape `(tokens, size)`, as activations of a model."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, size, generator=generator)
    return torch.randn(tokens, size, generator=generator) + 0.3 * common + 0.5


def assert_near(actual, expected, relative):
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < relative, error


def solve_directly(x, weight, keep, bias, error):
    """Return the weight and bias that `least_squares` approximates, from the inputs themselves in fp64."""
    x = x.double()
    weight = weight.double()
    is_removed = torch.ones(x.shape[1], dtype=torch.bool)
    is_removed[keep] = False

    kept_inputs = x[:, keep]
    target = x[:, is_removed] @ weight[:, is_removed].T
    if error is not None:
        target = target + error.double()
    if bias is not None:
        input_mean = kept_inputs.mean(0)
        target_mean = target.mean(0)
        kept_inputs = kept_inputs - input_mean
        target = target - target_mean

    gram = kept_inputs.T @ kept_inputs / len(x)
    gram.diagonal().mul_(1 + DAMPING)
    change = torch.linalg.solve(gram, kept_inputs.T @ target / len(x)).T
    refitted = weight[:, keep] + change
    if bias is None:
        return refitted, None
    return refitted, bias.double() + target_mean - change @ input_mean


@on_threads
@pytest.mark.parametrize(("error_feedback", "with_bias"), [(False, False), (True, True)])
@pytest.mark.parametrize(("size", "num_kept"), [(FFN, 1152), (2 * 512, 512)])
def test_the_refit_is_the_least_squares_solution(size, num_kept, with_bias, error_feedback):
    generator = torch.Generator().manual_seed(1)
    x = activations(size)
    weight = torch.randn(16, size, generator=generator)
    bias = None
    if with_bias:
        bias = torch.randn(16, generator=generator)
    error = None
    moments = Moments.empty(size, gram=True)
    if error_feedback:
        error = torch.randn(TOKENS, 16, generator=generator) + x[:, :16]
        moments = Moments.empty(size, gram=True, out=16)
    keep = torch.randperm(size, generator=generator)[:num_kept].sort().values

    for start in range(0, TOKENS, 512):
        tokens = slice(start, start + 512)
        if error is None:
            moments.update(x[tokens])
        else:
            moments.update(x[tokens], error[tokens])
    refitted, shifted = least_squares(weight, bias, moments, keep, DAMPING)

    expected, expected_bias = solve_directly(x, weight, keep, bias, error)
    assert_near(refitted, expected, 1e-3)
    if bias is not None:
        assert_near(shifted, expected_bias, 1e-2)


@on_threads
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_singular_gram_matrix_is_solved_with_the_least_damping_that_works(damping):
    x = activations(FFN, tokens=100)
    x[:, 5] = 0  # a channel that never fires
    gram = Moments.empty(FFN, gram=True).update(x).full_gram()

    def copy(dtype):
        return gram.to(dtype, copy=True)

    factor = with_damped_factor(copy, gram.diagonal(), damping, lambda factor: factor)
    added = (factor.double() @ factor.double().T - gram.double()).diagonal()
    ridge = added / gram.diagonal().double().clamp(min=1e-6)
    strength = float(ridge[torch.arange(FFN) != 5].median())
    if damping:
        assert torch.isfinite(factor).all()
        assert strength < 1.1 * damping
    else:
        assert strength < 1e-4

    target = torch.randn(8, FFN, generator=torch.Generator().manual_seed(0)) @ gram
    solution = solve_damped(copy, gram.diagonal(), target, damping)
    assert torch.isfinite(solution).all()
    assert float((solution @ gram - target).norm() / target.norm()) < 0.2


def test_output_energies_equal_the_energies_of_the_outputs():
    x = activations(FFN)
    weight = torch.randn(576, FFN, generator=torch.Generator().manual_seed(2))
    domains = [Moments.empty(FFN, gram=True).update(part) for part in x.split(TOKENS // 2)]

    for moments, part in zip(domains, x.split(TOKENS // 2), strict=True):
        expected = float((part.double() @ weight.double().T).square().sum(1).mean())
        assert output_energy(weight, moments) == pytest.approx(expected, rel=1e-4)

        # Observed outputs take precedence over the Gram matrix.
        moments.update(part, output=part @ weight.T)
        assert output_energy(weight, moments) == pytest.approx(expected, rel=1e-5)
