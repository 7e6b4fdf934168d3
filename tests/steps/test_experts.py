"""Whole experts go, and those that stay are refitted toward what all of them gave."""

from copy import deepcopy

import pytest
import torch
from helpers import CARD, card, logits, put_on_card_, same_weights, whole_model_at_once, with_long
from models import build, config, token_ids, tokenizer
from torch import nn

from optimum_structprune import StructPruneError, StructPruner, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import Axis
from optimum_structprune.method.layers import OneProcess
from optimum_structprune.steps import experts
from optimum_structprune.steps.experts import Block, refit_blocks_


# The families whose experts, gates, biases and shared experts differ; the last hands on more than hidden states.
FAMILIES = ["olmoe", "gpt_oss", "qwen2_moe", "deepseek_v2", "deepseek_v3", "granitemoe", "nemotron_h"]
FAMILIES += ["gemma4_text-experts"]
FEW = {"widths": {"expert": 2}, "num_samples": 48}


@pytest.mark.parametrize("case", with_long(FAMILIES, ["olmoe", "gpt_oss"]))
def test_the_refit_makes_up_for_the_experts_that_are_gone(case):
    model, ids = build(case), token_ids(16, 24, seed=7)  # others than were calibrated on
    models = (prune_model(model, config(refit=refit, **FEW), tokenizer()) for refit in ("none", "least_squares"))
    with torch.no_grad():
        states = [each.model(ids, output_hidden_states=True).hidden_states[2] for each in (model, *models)]
    plain, fitted = ((ours - states[0]).square().mean() for ours in states[1:])
    assert fitted < 0.95 * plain


@pytest.mark.parametrize("case", with_long(["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "jamba"], ["mixtral"]))
def test_the_loss_of_the_router_is_the_same_reloaded(case, tmp_path):
    small = prune_model(build(case), config(widths={"expert": 3}, refit="none"), tokenizer())
    small.save_pretrained(tmp_path)
    ids = token_ids()
    both = small, type(small).from_pretrained(tmp_path)
    torch.testing.assert_close(*(one(ids, labels=ids, output_router_logits=True).loss for one in both))


def test_only_what_the_experts_and_the_shared_ones_give_is_refitted():
    model = build("deepseek_v2")
    plain, fitted = (prune_model(model, config(refit=how, **FEW), tokenizer()) for how in ("none", "least_squares"))
    before, after = plain.state_dict(), fitted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = "model.layers.1.mlp"
    assert changed == {f"{prefix}.experts.down_proj", f"{prefix}.shared_experts.down_proj.weight"}


class Sum(nn.Module):
    """Two matrices that read inputs of their own, and whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(5, 4, bias=False)


def blocks_of(inputs):
    """The matrices of `Sum` as blocks; the second one reads every other token."""
    blocks = []
    for name, every in (("first", 1), ("second", 2)):
        read = [(torch.arange(0, len(x) * every, every), x) for x in inputs[name]]
        blocks.append(Block(Axis(f"{name}.weight", 1), read.__getitem__))
    return blocks


def random_inputs(tokens=400):
    torch.manual_seed(0)
    shared = torch.randn(2, tokens, 3)  # so that the inputs of both are correlated
    first = [torch.cat([x, torch.randn(tokens, 3)], 1) for x in shared]
    second = [torch.cat([x[::2], torch.randn(tokens // 2, 2)], 1) for x in shared]
    return {"first": first, "second": second}


def test_sweeps_over_the_blocks_solve_for_all_of_them():
    model, inputs = Sum(), random_inputs()
    target = [torch.randn(400, 4) for _ in range(2)]
    joint = []
    for x, y in zip(inputs["first"], inputs["second"], strict=True):
        sparse = torch.zeros(len(x), 5)
        sparse[::2] = y
        joint.append(torch.cat([x, sparse], 1))
    expected = torch.linalg.lstsq(torch.cat(joint), torch.cat(target)).solution.T
    present = torch.cat([model.first.weight, model.second.weight], 1).detach()
    residual = [t - x @ present.T for t, x in zip(target, joint, strict=True)]
    refit_blocks_(model, blocks_of(inputs), residual, OneProcess(), prior=0.0, sweeps=40)
    torch.testing.assert_close(torch.cat([model.first.weight, model.second.weight], 1), expected, atol=1e-4, rtol=1e-3)
    for left, t, x in zip(residual, target, joint, strict=True):
        torch.testing.assert_close(left, t - x @ expected.T, atol=1e-4, rtol=1e-3)


def test_where_nothing_is_left_to_make_up_for_no_bit_changes():
    model = Sum()
    before = deepcopy(model)
    refit_blocks_(model, blocks_of(random_inputs()), [torch.zeros(400, 4)] * 2, OneProcess())
    assert same_weights(model, before)


def test_a_card_does_not_hold_the_weights_that_all_experts_began_with(monkeypatch):
    # Solving depends on values, which tensors of this card do not have.
    monkeypatch.setattr(experts, "least_squares", lambda start, *others: (start, None))
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(16))
    with card() as found:
        put_on_card_(model)
        read = torch.arange(1, device=CARD), torch.empty(1, 64, device=CARD)
        blocks = [Block(Axis(f"{index}.weight", 1), lambda number: read) for index in range(16)]
        whole = found.now()
        refit_blocks_(model, blocks, [torch.empty(1, 64, device=CARD)], OneProcess())
    assert found.peak < 1.7 * whole


def with_idle_experts(case):
    """No token ever chooses experts 1 and 2: a multiple of channel 0, always positive, is taken from their logits."""
    model = build(case)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 8.0
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim > 1 and parameter.shape[-2] == 32 and "gate" not in name:
                parameter[..., 0, :] = 0
        for space in describe(model).of("expert"):
            model.get_submodule(space.producers[0].module).weight[1:3, 0] = -1e5
        for norm in (module for name, module in model.named_modules() if name.endswith("layernorm")):
            norm.weight[0] = 1.0
    return model


@pytest.mark.parametrize("criterion", ["reap", "reap_sum"])
@pytest.mark.parametrize("case", ["olmoe", "qwen2_moe", "granitemoe"])
def test_experts_that_no_token_chose_go_without_a_trace(case, criterion):
    model = with_idle_experts(case)
    pruner = StructPruner(config(criterion=criterion, widths={"expert": 2}))
    small = pruner.prune_model(model, tokenizer())
    assert {units for (_, name), units in pruner.plan.keep.items() if name == "expert"} == {(0, 3)}
    # Products of fewer experts may be summed in another order, as some processors do.
    torch.testing.assert_close(logits(small), logits(model), atol=1e-6, rtol=1e-6)


def test_error_feedback_reaches_the_experts_where_layers_run_by_themselves():
    model = build("olmoe")
    local, whole = (prune_model(model, config(error_feedback=f, **FEW), tokenizer()) for f in (0.0, 1.0))
    experts = [[layer.mlp.experts.down_proj for layer in each.model.layers] for each in (local, whole)]
    differ = [not torch.equal(*pair) for pair in zip(*experts, strict=True)]
    assert differ == [False, True], "the first layer has no error in front of it"
    with whole_model_at_once():
        at_once = prune_model(model, config(error_feedback=1.0, **FEW), tokenizer()).state_dict()
    for name, tensor in local.state_dict().items():
        torch.testing.assert_close(at_once[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_criterion_of_whole_experts_judges_nothing_else():
    for widths in ({"mlp": 24}, {"expert": 3, "mlp": 24}):
        with pytest.raises(StructPruneError, match="scores whole experts only.*'mlp'.*'reap'"):
            prune_model(build("mixtral"), config(criterion="reap", widths=widths), tokenizer())
