"""Training modes around measures, and the caller's state around a whole pruning."""

import random

import numpy
import pytest
import torch
from helpers import count_hooks, modes
from models import build, config, tokenizer
from torch import nn
from transformers.utils import logging

from optimum_structprune import InPlaceError, StructPruner
from optimum_structprune.forward.metrics import evaluating


def mixed(case="llama-tied"):
    """A model in training mode with some submodules in eval mode, as a caller may have put them."""
    model = build(case).train()
    model.model.layers[0].mlp.eval()
    model.model.norm.eval()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_every_submodule_is_back_in_its_mode(fails):
    model = mixed()
    before = modes(model)
    try:
        with evaluating(model):
            assert not any(modes(model).values())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert modes(model) == before and before["model.layers.0.self_attn"] and not before["model.layers.0.mlp"]


def test_what_is_replaced_takes_the_mode_of_its_place_and_what_is_new_that_of_the_model():
    model = mixed()
    with evaluating(model):
        model.model.layers[0].mlp.up_proj = nn.Linear(4, 4)
        model.model.layers[1].mlp.up_proj = nn.Linear(4, 4).eval()
        model.extra = nn.Linear(2, 2).eval()
    assert not model.model.layers[0].mlp.up_proj.training
    assert model.model.layers[1].mlp.up_proj.training and model.extra.training
    with evaluating(model):
        model.model.layers = nn.ModuleList([*model.model.layers][::-1])
    assert not model.model.layers[1].mlp.training and model.model.layers[1].self_attn.training
    assert model.model.layers[0].mlp.training
    frozen = build("llama-tied").eval()
    with evaluating(frozen):
        frozen.extra = nn.Linear(2, 2).train()
    assert not any(modes(frozen).values())


def test_two_models_that_share_modules():
    model = mixed()
    before = modes(model)
    with evaluating(model, model.model):
        pass
    assert modes(model) == before


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


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pruning_leaves_the_callers_state_as_it_was(kind, inplace):
    model = callers_model()
    before = State(model)
    pruned = StructPruner(config(**KINDS[kind])).prune_model(model, tokenizer(), inplace=inplace)
    assert before.differences(State(model)) == []
    assert (pruned is model) is inplace and before.differences(State(pruned)) == []


@pytest.mark.parametrize(("inplace", "error"), [(True, RuntimeError("no")), (False, KeyboardInterrupt())])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pruning_that_fails_leaves_the_callers_state_as_it_was(kind, inplace, error, monkeypatch):
    take_ = StructPruner.take_

    def fail(self, run, step):
        take_(self, run, step)
        raise error

    monkeypatch.setattr(StructPruner, "take_", fail)
    model = callers_model()
    before = State(model)
    with pytest.raises((type(error), InPlaceError)):
        StructPruner(config(**KINDS[kind])).prune_model(model, tokenizer(), inplace=inplace)
    assert before.differences(State(model)) == []
