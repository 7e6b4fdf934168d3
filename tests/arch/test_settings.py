"""Settings of the caller change no result, and keep their values."""

import random

import numpy
import pytest
import torch
from helpers import count_hooks, modes, recovery_config, same_weights
from models import build, config, tokenizer
from transformers.utils import logging

from optimum_structprune import StructPruneError, StructPruner, evaluate, prune_model


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
    assert pruner.result.plan == expected_pruner.result.plan
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


def test_the_callers_settings_return_after_an_error():
    torch.set_default_dtype(torch.float64)
    with pytest.raises(StructPruneError), torch.inference_mode():
        StructPruner(config(widths={"mlp": 4000})).prune_model(build("llama-tied"), tokenizer())

    assert torch.get_default_dtype() == torch.float64
    assert torch.is_grad_enabled()
