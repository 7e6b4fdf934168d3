"""What the loss says of the input of every consumer, against autograd done by hand."""

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


def directly(model, ids, labels):
    """|x ∂L/∂x| at `DOWN`, summed over tokens, by running the model with x as a leaf."""
    caught = {}

    def catch(module, args):
        caught["x"] = args[0].detach().requires_grad_()
        return (caught["x"],)

    handle = model.get_submodule(DOWN).register_forward_pre_hook(catch)
    logits = model(ids).logits
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (slope,) = torch.autograd.grad(loss, caught["x"])
    return (caught["x"] * slope).abs().detach().double().sum((0, 1))


def test_saliency_is_what_autograd_gives():
    model = build("llama-tied")
    first, second = token_ids(3, 10), token_ids(2, 10, seed=5)
    batches = [Batch(0, first[:2]), Batch(1, second), Batch(0, first[2:])]
    found = saliencies(model, describe(model), batches)[DOWN]
    expected = directly(model, first, first) / (3 * 9)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-9)
    expected = directly(model, second, second) / (2 * 9)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-9)


def test_a_domain_that_another_process_counts_says_nothing_here():
    model = build("llama-tied")
    batches = [Batch(0, token_ids()), Batch(1, token_ids(), counts=False)]
    found = saliencies(model, describe(model), batches)[DOWN]
    assert found[0].min() > 0 and torch.equal(found[1], torch.zeros(40, dtype=torch.float64))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails, monkeypatch):
    model = build("llama-tied")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if fails:
        monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            saliencies(model, describe(model), [Batch(0, token_ids())])
    else:
        saliencies(model, describe(model), [Batch(0, token_ids())])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not frozen.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    assert count_hooks(model) == 0


DENSE = [
    case for case, (model_type, fields) in CASES.items() if model_type not in RIGID and "experts" not in str(fields)
]


@pytest.mark.parametrize("case", DENSE)
def test_every_dense_family_gives_gradients(case):
    model = build(case)
    arch = describe(model)
    found = saliencies(model, arch, [Batch(0, token_ids())])
    assert set(found) == {axis.module for space in arch.spaces for axis in space.consumers}
    assert all(one.isfinite().all() and one.sum() > 0 for one in found.values())


def test_taylor_prunes_and_drops_what_the_loss_does_not_need():
    model = build("llama-tied")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5:20] = 0
    pruner = StructPruner(config(criterion="taylor", rounds=2))
    small = pruner.prune_model(model, tokenizer())
    kept = pruner.plan.keep[0, "mlp"]
    assert len(kept) == 24 and set(range(5, 20)) & set(kept) == set() and count_hooks(small) == 0


@pytest.mark.parametrize("case", ["bert", "mixtral"])
@pytest.mark.parametrize("inplace", [False, True])
def test_models_without_gradients_are_refused_before_anything_runs(case, inplace):
    with pytest.raises(StructPruneError, match="dense models that predict the next token, not for '.*'; choose"):
        StructPruner(config(criterion="taylor")).prune_model(build(case), tokenizer(), inplace=inplace)
