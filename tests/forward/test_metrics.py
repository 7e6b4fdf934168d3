"""Measures and margins against their definitions; what the caller has set changes nothing, and is as it was then."""

import random
from contextlib import ExitStack
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
    """What belongs to the caller: random states, switches, and with a model its modes, flags, hooks and setting."""

    def __init__(self, model):
        self.random = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        self.grad = torch.is_grad_enabled()
        self.bars = logging.is_progress_bar_enabled(), logging.get_verbosity()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.precision = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
        self.attention = model.config._attn_implementation
        self.cache = model.config.use_cache
        self.hooks, self.modes = count_hooks(model), modes(model)
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]

    def differences(self, other):
        return [name for name in vars(self) if getattr(self, name) != getattr(other, name)]


@pytest.mark.parametrize(("fields", "inplace"), [
    ({}, True), ({"criterion": "flap"}, False), ({"allocation": "sensitivity"}, True), ({"rounds": 2}, False),
])  # fmt: skip
def test_a_pruning_leaves_the_callers_state_as_it_was(fields, inplace):
    model = build("llama-tied").train()
    model.model.layers[0].mlp.eval()
    model.model.norm.eval()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    before = State(model)
    pruned = prune_model(model, config(**fields), tokenizer(), inplace=inplace)
    assert before.differences(State(model)) == []
    assert (pruned is model) is inplace and before.differences(State(pruned)) == []


def test_the_divergence_is_that_of_torch_without_a_gradient_into_the_teacher():
    generator = torch.Generator().manual_seed(0)
    mine, taught = ((2 * torch.randn(3, 5, 40, generator=generator)).requires_grad_() for _ in range(2))
    expected = torch.nn.functional.kl_div(mine.softmax(-1).log(), taught.softmax(-1), reduction="sum") / 15
    torch.testing.assert_close(divergence(mine, taught), expected)
    assert divergence(mine, mine).item() == pytest.approx(0, abs=1e-6)
    certain = torch.zeros_like(mine)
    certain[..., 0] = 100.0
    (divergence(mine, taught) + divergence(mine, certain)).backward()
    assert taught.grad is None and torch.isfinite(mine.grad).all()


@pytest.mark.parametrize("case", ["llama-tied", "phi", "gemma2"])
@torch.no_grad()
def test_rows_have_the_losses_of_their_logits(case):
    model, rows = build(case), [*token_ids(2, 12, 1)]
    for row, loss in zip(rows, row_losses(model, rows), strict=True):  # phi's head has a bias, gemma2 caps its logits
        expected = -model(row[None]).logits[0, :-1].double().log_softmax(1).gather(1, row[1:, None]).sum()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),  # in the place of a GPU
}


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def settings(**fields):
    return config(sparsity=0.3, round_to=1, **fields)


@pytest.fixture(scope="module")
def usual():
    pruner = StructPruner(settings())
    return pruner.prune_model(build("llama-tied"), tokenizer()), pruner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_pruning_is_the_same(dtype, mode, usual):
    model, pruner = build("llama-tied"), StructPruner(settings())
    torch.set_default_dtype(dtype)
    with MODES[mode]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        small = pruner.prune_model(model, tokenizer())
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == dtype and before == after
    assert pruner.plan == usual[1].plan and same_weights(small, usual[0])
    # What comes out can be trained.
    torch.set_default_dtype(torch.float32)
    small(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()


@pytest.mark.slow
def test_recovery_and_evaluation_are_too():
    results = []
    for name in ("plain", *MODES):
        with ExitStack() as stack:
            model = build("llama-tied")
            if name in MODES:
                torch.set_default_dtype(torch.bfloat16)
                stack.enter_context(MODES[name]())
            small = StructPruner(settings(recovery=recovery_config(tokens=96))).prune_model(model, tokenizer())
            figures = evaluate(small, tokenizer(), settings().domains, num_samples=4, seq_length=24)
            results.append((small, figures.to_dict()["domains"]))
            torch.set_default_dtype(torch.float32)
    for small, figures in results[1:]:
        assert same_weights(small, results[0][0]) and figures == results[0][1]


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
            assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


class Unsteady(torch.nn.Module):
    """A part of a layer whose output differs from call to call, as on a GPU that adds in any order."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs) * (1 + 1e-4 * self.calls)


@pytest.mark.parametrize(("case", "is_plain"), [("llama-tied", True), ("llama-untied", True), ("gemma2", False)])
def test_one_pass_shows_if_the_head_alone_makes_the_logits(case, is_plain):
    model, ids = build(case), token_ids(1, 8)
    assert plain_head(model, ids) is is_plain
    for layer in model.model.layers:
        layer.mlp = Unsteady(layer.mlp)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
    assert plain_head(model, ids) is is_plain
    assert [layer.mlp.calls for layer in model.model.layers] == [3, 3]
    assert count_hooks(model) == count_hooks(build(case))


def test_the_settings_are_back_after_an_error():
    torch.set_default_dtype(torch.float64)
    with pytest.raises(StructPruneError), torch.inference_mode():
        StructPruner(config(widths={"mlp": 4000})).prune_model(build("llama-tied"), tokenizer())
    assert torch.get_default_dtype() == torch.float64 and torch.is_grad_enabled()


def test_what_a_model_expects_is_the_mean_of_the_roots_of_its_probabilities():
    model, ids = build("llama-tied"), token_ids(3, 16)
    shares = expected_shares(model, ids)
    roots = model.eval()(ids).logits[:, :-1].softmax(-1).sqrt().double().sum((0, 1))
    torch.testing.assert_close(shares, roots / roots.sum())


def losses(documents: int, rows: int, spread: float) -> torch.Tensor:
    """Losses whose logarithm is normal, of which rows of one document share three quarters of the variance."""
    own = torch.randn(documents, 1, dtype=torch.float64) * 0.75**0.5 + torch.randn(documents, rows) * 0.25**0.5
    return 0.1 * (spread * own).exp().flatten()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("documents", "spread"), [(2, 0.3), (3, 0.3), (4, 0.3), (12, 0.5), (18, 0.7), (36, 0.7), (72, 1.0)]
)
def test_it_covers_the_truth_nine_times_in_ten(documents, rows, spread):
    torch.manual_seed(0)
    truth, numbers, trials = 0.1 * exp(spread**2 / 2), torch.arange(documents).repeat_interleave(rows), 400
    samples = [losses(documents, rows, spread) for _ in range(trials)]
    covered = [abs(of.mean() - truth) <= margin_of_error(of, numbers) for of in samples]
    # Of 400 trials, the share is off by 0.015 itself.
    assert 0.87 <= sum(covered) / trials <= 0.97
    if rows > 1:  # over rows it claims too much
        assert sum(abs(of.mean() - truth) <= margin_of_error(of) for of in samples) < sum(covered) - trials / 10


@given(st.lists(st.floats(-1, 3), min_size=2, max_size=20), st.randoms())
def test_values_of_one_document_count_as_one_in_any_order(values, random):
    each = torch.tensor(values, dtype=torch.float64)
    numbers = [number for number in range(len(values)) for _ in range(3)]
    random.shuffle(numbers)
    repeated = margin_of_error(each[numbers], torch.tensor(numbers))
    assert repeated == pytest.approx(margin_of_error(each), rel=1e-6, abs=1e-9)


def test_one_document_has_none_and_values_that_are_alike_have_none_to_speak_of():
    values = torch.randn(40)
    assert isnan(margin_of_error(values[:1])) and margin_of_error(torch.ones(9)) == 0
    result = perplexity_result({"dense": values, "pruned": values + 1}, 40, torch.arange(40) // 40)
    assert result.perplexity.margin is None and result.documents == 1


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95, 1.0])
def test_the_margin_of_a_share_covers_it_where_all_answers_are_alike_too(share):
    for count in (5, 16, 120):
        samples = (torch.rand(200, count, generator=torch.Generator().manual_seed(count)) < share).double()
        assert sum(abs(of.mean() - share) <= margin_of_share(of) for of in samples) >= 170, count


def test_a_ratio_has_a_margin_where_nothing_was_lost_and_a_wider_one_where_it_stands_for_other_kinds():
    before, numbers = torch.randn(12, dtype=torch.float64), torch.arange(12)
    same = perplexity_result({"dense": before, "pruned": before}, 12, numbers)
    assert same.perplexity.margin == pytest.approx(UNSEEN / 12)
    for more in (0.1, 0.5):
        losses = {"dense": before, "pruned": before + more}
        both = [perplexity_result(losses, 12, numbers, spread) for spread in (0.0, KINDS_DIFFER)]
        own, other = (result.perplexity.margin for result in both)
        assert hypot(own, KINDS_DIFFER * (exp(more) - 1)) == pytest.approx(other)


def test_tokens_are_of_the_document_that_ends_behind_them():
    samples = torch.tensor([[1, 5, 5, 2, 6], [1, 6, 6, 6, 6], [1, 6, 2, 7, 2]])
    assert document_numbers(samples, 2).tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 2, 2, 3]]
    assert document_numbers(samples, None)[:, 0].tolist() == [0, 1, 2]
