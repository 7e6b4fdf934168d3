"""The divergence of two models equals its definition."""

import pytest
import torch

from optimum_structprune.measure.kl import divergence


def random_logits():
    """Return the logits of a model and of its teacher, both of which could have a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 5, 40, generator=generator)
    teacher = 2 * torch.randn(3, 5, 40, generator=generator)
    return logits.requires_grad_(), teacher.requires_grad_()


def test_the_divergence_equals_the_divergence_of_torch():
    logits, teacher = random_logits()
    expected = torch.nn.functional.kl_div(logits.softmax(-1).log(), teacher.softmax(-1), reduction="sum") / 15

    torch.testing.assert_close(divergence(logits, teacher).mean(), expected)
    assert divergence(logits, logits).mean().item() == pytest.approx(0, abs=1e-6)


def test_the_divergence_has_a_finite_gradient_and_none_into_the_teacher():
    logits, teacher = random_logits()
    certain_teacher = torch.zeros_like(logits)
    certain_teacher[..., 0] = 100.0

    (divergence(logits, teacher) + divergence(logits, certain_teacher)).mean().backward()

    assert teacher.grad is None
    assert torch.isfinite(logits.grad).all()


def test_a_temperature_divides_the_logits_of_both_models():
    logits, teacher = random_logits()
    torch.testing.assert_close(divergence(logits, teacher, 2.0), divergence(logits / 2, teacher / 2))


def test_an_alignment_replaces_the_distribution_of_the_teacher_and_weights_positions():
    logits, teacher = random_logits()
    weight = torch.linspace(0, 1, 15).view(3, 5)
    expected = weight * divergence(logits, teacher)

    # The teacher has each token twice.
    doubled = torch.cat([teacher, teacher], -1)

    def align(probabilities, error):
        first, second = probabilities.chunk(2, -1)
        return first + second, error[:, None], weight

    torch.testing.assert_close(divergence(logits, doubled, align=align), expected)


def test_a_token_that_the_teacher_never_predicts_adds_nothing():
    logits, _ = random_logits()
    certain = torch.zeros_like(logits)
    certain[..., 0] = 1

    def align(probabilities, error):
        return certain, error[:, None], torch.ones(3, 5)

    actual = divergence(logits, certain, align=align)
    torch.testing.assert_close(actual, -logits.log_softmax(-1)[..., 0])
