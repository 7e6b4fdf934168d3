"""Measures and margins equal their definitions. Settings of the caller change no result, and keep their values."""

import random
from math import exp, hypot, isnan

import numpy
import pytest
import torch
from helpers import count_hooks, modes, recovery_config, same_weights
from hypothesis import given
from hypothesis import strategies as st
from models import build, config, token_ids, tokenizer
from transformers.utils import logging

from optimum_structprune import StructPruneError, StructPruner, evaluate, prune_model
from optimum_structprune.domains.packing import document_numbers
from optimum_structprune.forward.metrics import (
    KINDS_DIFFER,
    UNSEEN,
    divergence,
    expected_shares,
    margin_of_error,
    margin_of_share,
    plain_head,
    row_losses,
)
from optimum_structprune.record.figures import perplexity_result


class State:
    """The state that belongs to the caller: random states and switches, and the modes, flags and hooks of a model."""

    def __init__(self, model):
        self.random = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        self.grad = torch.is_grad_enabled()
        self.bars = logging.is_progress_bar_enabled(), logging.get_verbosity()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.precision = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32

        self.attention = model.config._attn_implementation
        self.cache = model.config.use_cache
        self.hooks = count_hooks(model)
        self.modes = modes(model)
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]

    def differences(self, state):
        """Return the names of the attributes in which two states differ."""
        return [name for name in vars(self) if getattr(self, name) != getattr(state, name)]


@pytest.mark.parametrize(("fields", "inplace"), [
    ({}, True), ({"criterion": "flap"}, False), ({"allocation": "sensitivity"}, True), ({"rounds": 2}, False),
])  # fmt: skip
def test_a_pruning_does_not_change_the_callers_state(fields, inplace):
    model = build("llama-tied").train()
    model.model.layers[0].mlp.eval()
    model.model.norm.eval()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    original = State(model)

    pruned = prune_model(model, config(**fields), tokenizer(), inplace=inplace)

    assert original.differences(State(model)) == []
    assert original.differences(State(pruned)) == []
    assert (pruned is model) is inplace


def random_logits():
    """Return the logits of a model and of its teacher, both of which could have a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 5, 40, generator=generator)
    teacher = 2 * torch.randn(3, 5, 40, generator=generator)
    return logits.requires_grad_(), teacher.requires_grad_()


def test_the_divergence_equals_the_divergence_of_torch():
    logits, teacher = random_logits()
    expected = torch.nn.functional.kl_div(logits.softmax(-1).log(), teacher.softmax(-1), reduction="sum") / 15

    torch.testing.assert_close(divergence(logits, teacher), expected)
    assert divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)


def test_the_divergence_has_a_finite_gradient_and_none_into_the_teacher():
    logits, teacher = random_logits()
    certain_teacher = torch.zeros_like(logits)
    certain_teacher[..., 0] = 100.0

    (divergence(logits, teacher) + divergence(logits, certain_teacher)).backward()

    assert teacher.grad is None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("case", ["llama-tied", "phi", "gemma2"])
@torch.no_grad()
def test_rows_have_the_losses_of_their_logits(case):
    """The head of phi has a bias, and gemma2 caps its logits."""
    model = build(case)
    rows = list(token_ids(2, 12, 1))
    losses = row_losses(model, rows)

    for row, loss in zip(rows, losses, strict=True):
        log_probabilities = model(row[None]).logits[0, :-1].double().log_softmax(1)
        expected = -log_probabilities.gather(1, row[1:, None]).sum()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),  # stands for a GPU
}


@pytest.fixture(autouse=True)
def default_dtype():
    """Reset torch's default dtype after each test."""
    yield
    torch.set_default_dtype(torch.float32)


def settings(**fields):
    return config(sparsity=0.3, round_to=1, **fields)


@pytest.fixture(scope="module")
def expected_run():
    """Return the pruned model and the pruner of a run under torch's default settings."""
    pruner = StructPruner(settings())
    return pruner.prune_model(build("llama-tied"), tokenizer()), pruner


def random_states():
    """Return the states of the random number generators as text."""
    return repr((random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()))


def switches():
    """Return the switches of torch that the modes set."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_settings_of_the_caller_do_not_change_a_pruning(dtype, mode, expected_run):
    expected, expected_pruner = expected_run
    model = build("llama-tied")
    pruner = StructPruner(settings())
    torch.set_default_dtype(dtype)

    with MODES[mode]():
        original = switches()
        small = pruner.prune_model(model, tokenizer())
        assert switches() == original

    assert torch.get_default_dtype() == dtype
    assert pruner.plan == expected_pruner.plan
    assert same_weights(small, expected)

    # The result can be trained.
    torch.set_default_dtype(torch.float32)
    small(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()


def recover_and_evaluate(model):
    """Return a pruned and recovered model, and its figures by domain."""
    recovered = StructPruner(settings(recovery=recovery_config(tokens=96))).prune_model(model, tokenizer())
    evaluation = evaluate(recovered, tokenizer(), settings().domains, num_samples=4, seq_length=24)
    return recovered, evaluation.to_dict()["domains"]


@pytest.mark.slow
def test_settings_of_the_caller_do_not_change_a_recovery_or_an_evaluation():
    expected, expected_figures = recover_and_evaluate(build("llama-tied"))

    for mode in MODES.values():
        model = build("llama-tied")
        torch.set_default_dtype(torch.bfloat16)
        states = random_states()
        with mode():
            recovered, figures = recover_and_evaluate(model)
        assert random_states() == states
        torch.set_default_dtype(torch.float32)

        assert same_weights(recovered, expected)
        assert figures == expected_figures


@pytest.mark.parametrize("is_new", [False, True])
def test_fp32_products_have_full_precision_and_the_callers_setting_returns(is_new, monkeypatch):
    if is_new and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought a setting of each backend")
    precisions = []

    def read(*args, **kwargs):
        precisions.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        raise StructPruneError("read")

    monkeypatch.setattr("optimum_structprune.pruner.CalibrationData.read", read)
    if is_new:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")

    try:
        with pytest.raises(StructPruneError, match="read"):
            StructPruner(config()).prune_model(build("llama-tied"), tokenizer())

        assert precisions == [("highest", False)]
        if is_new:
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        else:
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


class Unsteady(torch.nn.Module):
    """A part of a layer whose output differs from call to call, as on a GPU that adds in any order."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs) * (1 + 1e-4 * self.calls)


@pytest.mark.parametrize(("case", "is_plain"), [("llama-tied", True), ("llama-untied", True), ("gemma2", False)])
def test_one_pass_shows_if_the_head_alone_computes_the_logits(case, is_plain):
    model = build(case)
    ids = token_ids(1, 8)
    assert plain_head(model, ids) is is_plain

    for layer in model.model.layers:
        layer.mlp = Unsteady(layer.mlp)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)

    assert plain_head(model, ids) is is_plain
    assert [layer.mlp.calls for layer in model.model.layers] == [3, 3]
    assert count_hooks(model) == count_hooks(build(case))


def test_the_callers_settings_return_after_an_error():
    torch.set_default_dtype(torch.float64)
    with pytest.raises(StructPruneError), torch.inference_mode():
        StructPruner(config(widths={"mlp": 4000})).prune_model(build("llama-tied"), tokenizer())

    assert torch.get_default_dtype() == torch.float64
    assert torch.is_grad_enabled()


def test_expected_shares_are_means_of_the_roots_of_probabilities():
    model = build("llama-tied")
    ids = token_ids(3, 16)
    shares = expected_shares(model, ids)

    roots = model.eval()(ids).logits[:, :-1].softmax(-1).sqrt().double().sum((0, 1))
    torch.testing.assert_close(shares, roots / roots.sum())


def random_losses(documents: int, rows: int, spread: float) -> torch.Tensor:
    """Return log-normal losses. Three quarters of the variance are common to the rows of a document."""
    of_documents = torch.randn(documents, 1, dtype=torch.float64) * 0.75**0.5
    of_rows = torch.randn(documents, rows) * 0.25**0.5
    return 0.1 * (spread * (of_documents + of_rows)).exp().flatten()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("documents", "spread"), [(2, 0.3), (3, 0.3), (4, 0.3), (12, 0.5), (18, 0.7), (36, 0.7), (72, 1.0)]
)
def test_the_margin_covers_the_true_mean_nine_times_in_ten(documents, rows, spread):
    torch.manual_seed(0)
    true_mean = 0.1 * exp(spread**2 / 2)
    numbers = torch.arange(documents).repeat_interleave(rows)
    trials = 400
    samples = [random_losses(documents, rows, spread) for _ in range(trials)]

    covered = sum(abs(sample.mean() - true_mean) <= margin_of_error(sample, numbers) for sample in samples)
    # The standard error of the share is 0.015 with 400 trials.
    assert 0.87 <= covered / trials <= 0.97

    if rows > 1:
        # The margin is too small if each row counts as a document.
        covered_by_rows = sum(abs(sample.mean() - true_mean) <= margin_of_error(sample) for sample in samples)
        assert covered_by_rows < covered - trials / 10


@given(st.lists(st.floats(-1, 3), min_size=2, max_size=20), st.randoms())
def test_values_of_one_document_count_as_one_in_any_order(values, shuffler):
    values = torch.tensor(values, dtype=torch.float64)
    numbers = list(range(len(values))) * 3
    shuffler.shuffle(numbers)

    repeated = margin_of_error(values[numbers], torch.tensor(numbers))
    assert repeated == pytest.approx(margin_of_error(values), rel=1e-6, abs=1e-9)


def test_a_single_document_has_no_margin():
    values = torch.randn(40)
    assert isnan(margin_of_error(values[:1]))

    result = perplexity_result({"original": values, "pruned": values + 1}, 40, torch.arange(40) // 40)
    assert result.perplexity.margin is None
    assert result.documents == 1


def test_equal_values_have_a_margin_of_zero():
    assert margin_of_error(torch.ones(9)) == 0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95, 1.0])
def test_the_margin_of_a_share_covers_shares_near_zero_and_one(share):
    for count in (5, 16, 120):
        samples = (torch.rand(200, count, generator=torch.Generator().manual_seed(count)) < share).double()
        covered = sum(abs(sample.mean() - share) <= margin_of_share(sample) for sample in samples)
        assert covered >= 170, count


def test_a_ratio_without_any_loss_has_a_margin():
    losses = torch.randn(12, dtype=torch.float64)
    result = perplexity_result({"original": losses, "pruned": losses}, 12, torch.arange(12))

    assert result.perplexity.margin == pytest.approx(UNSEEN / 12)


def test_a_ratio_for_other_kinds_of_text_has_a_wider_margin():
    dense_losses = torch.randn(12, dtype=torch.float64)
    numbers = torch.arange(12)
    for increase in (0.1, 0.5):
        losses = {"original": dense_losses, "pruned": dense_losses + increase}
        margin = perplexity_result(losses, 12, numbers, 0.0).perplexity.margin
        wider_margin = perplexity_result(losses, 12, numbers, KINDS_DIFFER).perplexity.margin

        assert hypot(margin, KINDS_DIFFER * (exp(increase) - 1)) == pytest.approx(wider_margin)


def test_a_token_belongs_to_the_document_that_ends_after_it():
    samples = torch.tensor([[1, 5, 5, 2, 6], [1, 6, 6, 6, 6], [1, 6, 2, 7, 2]])
    assert document_numbers(samples, 2).tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 2, 2, 3]]
    assert document_numbers(samples, None)[:, 0].tolist() == [0, 1, 2]
