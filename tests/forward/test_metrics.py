"""Training modes around measures, and the caller's state around a whole pruning."""

import random

import numpy
import pytest
import torch
from helpers import count_hooks, counted_by_torch, modes
from models import build, config, tokenizer
from transformers.utils import logging

from optimum_structprune import StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.forward.generation import flops_per_token
from optimum_structprune.forward.metrics import divergence


def mixed(case="llama-tied"):
    """A model in training mode with some submodules in eval mode, as a caller may have put them."""
    model = build(case).train()
    model.model.layers[0].mlp.eval()
    model.model.norm.eval()
    return model


class State:
    """What belongs to the caller: random states, switches, and with a model its modes, flags, hooks and setting."""

    def __init__(self, model):
        self.random = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        self.grad = torch.is_grad_enabled()
        self.bars = logging.is_progress_bar_enabled(), logging.get_verbosity()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.attention = model.config._attn_implementation
        self.cache = model.config.use_cache
        self.hooks, self.modes = count_hooks(model), modes(model)
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]

    def differences(self, other):
        return [name for name in vars(self) if getattr(self, name) != getattr(other, name)]


KINDS = {
    "plain": {},
    "flap": {"criterion": "flap"},
    "global": {"allocation": "global"},
    "sensitivity": {"allocation": "sensitivity"},
    "floor": {"rounds": 2, "max_perplexity_ratio": 1.5},
}


def callers_model():
    model = mixed()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize(("kind", "inplace"), [(kind, number % 2 == 0) for number, kind in enumerate(KINDS)])
def test_a_pruning_leaves_the_callers_state_as_it_was(kind, inplace):
    model = callers_model()
    before = State(model)
    pruned = StructPruner(config(**KINDS[kind])).prune_model(model, tokenizer(), inplace=inplace)
    assert before.differences(State(model)) == []
    assert (pruned is model) is inplace and before.differences(State(pruned)) == []


# --- the divergence is the Kullback-Leibler divergence


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
    certain = torch.zeros_like(mine)
    certain[..., 0] = 100.0
    (divergence(mine, taught) + divergence(mine, certain)).backward()
    assert taught.grad is None and torch.isfinite(mine.grad).all()


# --- what a token costs is what torch counts, for whole families


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gpt2-tied", "opt", "phi", "qwen3", "gemma2"])
def test_operations_are_those_that_torch_counts(case):
    model = build(case)
    arch = describe(model)
    assert flops_per_token(model, arch, 24) == counted_by_torch(model, 24)
