"""Gradients by the input of every consumer, compared with autograd."""

import pytest
import torch
from helpers import count_hooks
from models import CASES, RIGID, build, config, token_ids, tokenizer
from structprune_sisters.gradients import saliencies

from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.method.layers import Batch


pytestmark = pytest.mark.nightly
DOWN = "model.layers.1.mlp.down_proj"


def saliency_by_autograd(model, ids):
    """Return |x ∂L/∂x| at `DOWN`, summed over tokens, from a forward pass in which x is a leaf."""
    inputs = []

    def make_leaf(module, args):
        x = args[0].detach().requires_grad_()
        inputs.append(x)
        return (x,)

    handle = model.get_submodule(DOWN).register_forward_pre_hook(make_leaf)
    logits = model(ids).logits
    handle.remove()

    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (x,) = inputs
    (gradient,) = torch.autograd.grad(loss, x)
    return (x * gradient).abs().detach().double().sum((0, 1))


def test_saliencies_equal_the_result_of_autograd():
    model = build("llama-tied")
    first_ids = token_ids(3, 10)
    second_ids = token_ids(2, 10, seed=5)
    batches = [Batch(0, first_ids[:2]), Batch(1, second_ids), Batch(0, first_ids[2:])]

    saliency = saliencies(model, describe(model), batches)[DOWN]

    expected = saliency_by_autograd(model, first_ids) / (3 * 9)
    torch.testing.assert_close(saliency[0], expected, rtol=1e-4, atol=1e-9)
    expected = saliency_by_autograd(model, second_ids) / (2 * 9)
    torch.testing.assert_close(saliency[1], expected, rtol=1e-4, atol=1e-9)


def test_a_domain_that_another_process_counts_has_no_saliency():
    model = build("llama-tied")
    batches = [Batch(0, token_ids()), Batch(1, token_ids(), counts=False)]

    saliency = saliencies(model, describe(model), batches)[DOWN]

    assert saliency[0].min() > 0
    assert torch.equal(saliency[1], torch.zeros(40, dtype=torch.float64))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unchanged_afterwards(fails, monkeypatch):
    model = build("llama-tied")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    if fails:
        monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            saliencies(model, describe(model), [Batch(0, token_ids())])
    else:
        saliencies(model, describe(model), [Batch(0, token_ids())])

    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert count_hooks(model) == 0


ORIGINAL = [
    case for case, (model_type, fields) in CASES.items() if model_type not in RIGID and "experts" not in str(fields)
]


@pytest.mark.parametrize("case", ORIGINAL)
def test_every_dense_family_has_gradients(case):
    model = build(case)
    arch = describe(model)
    saliency_by_module = saliencies(model, arch, [Batch(0, token_ids())])

    modules = set()
    for space in arch.spaces:
        modules.update(axis.module for axis in space.consumers)
    assert set(saliency_by_module) == modules

    for saliency in saliency_by_module.values():
        assert saliency.isfinite().all()
        assert saliency.sum() > 0


def test_taylor_removes_channels_without_influence_on_the_loss():
    model = build("llama-tied")
    idle_channels = set(range(5, 20))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5:20] = 0

    pruner = StructPruner(config(criterion="taylor", rounds=2))
    pruned = pruner.prune_model(model, tokenizer())

    kept_channels = pruner.result.plan.keep[0, "mlp"]
    assert len(kept_channels) == 24
    assert not idle_channels & set(kept_channels)
    assert count_hooks(pruned) == 0


@pytest.mark.parametrize("case", ["bert", "mixtral"])
@pytest.mark.parametrize("inplace", [False, True])
def test_models_without_gradients_are_refused_before_anything_runs(case, inplace):
    with pytest.raises(StructPruneError, match="original models that predict the next token, not for '.*'; choose"):
        StructPruner(config(criterion="taylor")).prune_model(build(case), tokenizer(), inplace=inplace)
