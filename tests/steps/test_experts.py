"""Pruning of whole experts, and the refit of the kept experts toward the output of all experts."""

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


# Families with different experts, gates, biases and shared experts. The last one passes on more than hidden states.
FAMILIES = ["olmoe", "gpt_oss", "qwen2_moe", "deepseek_v2", "deepseek_v3", "granitemoe", "nemotron_h"]
FAMILIES += ["gemma4_text-experts"]
FEW = {"widths": {"expert": 2}, "num_samples": 48}


def prune_experts(model, **fields):
    return prune_model(model, config(**FEW, **fields), tokenizer())


@pytest.mark.parametrize("case", with_long(FAMILIES, ["olmoe", "gpt_oss"]))
def test_the_refit_compensates_for_removed_experts(case):
    model = build(case)
    plain = prune_experts(model, refit="none")
    refitted = prune_experts(model, refit="least_squares")
    ids = token_ids(16, 24, seed=7)  # not among the calibration samples

    @torch.no_grad()
    def states(model):
        return model.model(ids, output_hidden_states=True).hidden_states[2]

    expected = states(model)
    plain_error = (states(plain) - expected).square().mean()
    refitted_error = (states(refitted) - expected).square().mean()
    assert refitted_error < 0.95 * plain_error


@pytest.mark.parametrize("case", with_long(["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "jamba"], ["mixtral"]))
def test_the_reloaded_model_has_the_same_router_loss(case, tmp_path):
    small = prune_model(build(case), config(widths={"expert": 3}, refit="none"), tokenizer())
    small.save_pretrained(tmp_path)
    reloaded = type(small).from_pretrained(tmp_path)

    ids = token_ids()
    loss = small(ids, labels=ids, output_router_logits=True).loss
    reloaded_loss = reloaded(ids, labels=ids, output_router_logits=True).loss
    torch.testing.assert_close(loss, reloaded_loss)


def test_the_refit_changes_only_outputs_of_experts_and_shared_experts():
    model = build("deepseek_v2")
    plain = prune_experts(model, refit="none").state_dict()
    refitted = prune_experts(model, refit="least_squares").state_dict()

    changed = {name for name in plain if not torch.equal(plain[name], refitted[name])}
    prefix = "model.layers.1.mlp"
    assert changed == {f"{prefix}.experts.down_proj", f"{prefix}.shared_experts.down_proj.weight"}


class Sum(nn.Module):
    """Two matrices with separate inputs, whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4, bias=False)
        self.second = nn.Linear(5, 4, bias=False)

    def joint_weight(self):
        return torch.cat([self.first.weight, self.second.weight], 1)


def blocks_of(inputs):
    """Return the matrices of `Sum` as blocks. The second matrix reads every other token."""
    blocks = []
    for name, stride in (("first", 1), ("second", 2)):
        calls = []
        for x in inputs[name]:
            tokens = torch.arange(0, len(x) * stride, stride)
            calls.append((tokens, x))
        blocks.append(Block(Axis(f"{name}.weight", 1), calls.__getitem__))
    return blocks


def random_inputs(tokens=400):
    torch.manual_seed(0)
    shared = torch.randn(2, tokens, 3)  # correlates the inputs of both matrices
    first = [torch.cat([x, torch.randn(tokens, 3)], 1) for x in shared]
    second = [torch.cat([x[::2], torch.randn(tokens // 2, 2)], 1) for x in shared]
    return {"first": first, "second": second}


def test_sweeps_over_the_blocks_solve_for_all_blocks_jointly():
    model = Sum()
    inputs = random_inputs()
    target = [torch.randn(400, 4) for _ in range(2)]
    joint = []
    for first, second in zip(inputs["first"], inputs["second"], strict=True):
        sparse = torch.zeros(len(first), 5)
        sparse[::2] = second
        joint.append(torch.cat([first, sparse], 1))
    expected = torch.linalg.lstsq(torch.cat(joint), torch.cat(target)).solution.T

    original = model.joint_weight().detach()
    residual = [y - x @ original.T for y, x in zip(target, joint, strict=True)]
    refit_blocks_(model, blocks_of(inputs), residual, OneProcess(), prior=0.0, sweeps=40)

    torch.testing.assert_close(model.joint_weight(), expected, atol=1e-4, rtol=1e-3)
    for difference, y, x in zip(residual, target, joint, strict=True):
        torch.testing.assert_close(difference, y - x @ expected.T, atol=1e-4, rtol=1e-3)


def test_a_zero_residual_changes_no_bit():
    model = Sum()
    original = deepcopy(model)
    refit_blocks_(model, blocks_of(random_inputs()), [torch.zeros(400, 4)] * 2, OneProcess())
    assert same_weights(model, original)


def test_the_original_weights_of_all_experts_are_not_held_on_the_device(monkeypatch):
    # Tensors of the fake device have no values, and solving depends on values.
    monkeypatch.setattr(experts, "least_squares", lambda start, *arguments: (start, None))
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(16))

    with card() as memory:
        put_on_card_(model)
        tokens = torch.arange(1, device=CARD)
        inputs = torch.empty(1, 64, device=CARD)
        blocks = [Block(Axis(f"{index}.weight", 1), lambda number: (tokens, inputs)) for index in range(16)]
        model_bytes = memory.now()
        refit_blocks_(model, blocks, [torch.empty(1, 64, device=CARD)], OneProcess())

    assert memory.peak < 1.7 * model_bytes


def with_idle_experts(case):
    """Return a model in which no token chooses experts 1 and 2.

    Channel 0 is always positive, and a multiple of it is subtracted from the logits of these experts.
    """
    model = build(case)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 8.0
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim > 1 and parameter.shape[-2] == 32 and "gate" not in name:
                parameter[..., 0, :] = 0
        for space in describe(model).of("expert"):
            model.get_submodule(space.producers[0].module).weight[1:3, 0] = -1e5
        for name, module in model.named_modules():
            if name.endswith("layernorm"):
                module.weight[0] = 1.0
    return model


@pytest.mark.parametrize("criterion", ["reap", "reap_sum"])
@pytest.mark.parametrize("case", ["olmoe", "qwen2_moe", "granitemoe"])
def test_removing_experts_without_tokens_changes_no_output(case, criterion):
    model = with_idle_experts(case)
    pruner = StructPruner(config(criterion=criterion, widths={"expert": 2}))
    small = pruner.prune_model(model, tokenizer())

    kept_experts = {units for (_, name), units in pruner.result.plan.keep.items() if name == "expert"}
    assert kept_experts == {(0, 3)}
    # Some processors sum the products of fewer experts in another order.
    torch.testing.assert_close(logits(small), logits(model), atol=1e-6, rtol=1e-6)


def test_error_feedback_changes_experts_only_if_layers_run_one_by_one():
    model = build("olmoe")
    plain = prune_experts(model, error_feedback=0.0)
    corrected = prune_experts(model, error_feedback=1.0)

    changed = []
    for layer, corrected_layer in zip(plain.model.layers, corrected.model.layers, strict=True):
        changed.append(not torch.equal(layer.mlp.experts.down_proj, corrected_layer.mlp.experts.down_proj))
    assert changed == [False, True], "no error precedes the first layer"

    with whole_model_at_once():
        at_once = prune_experts(model, error_feedback=1.0).state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(at_once[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_criterion_of_whole_experts_is_refused_for_other_spaces():
    for widths in ({"mlp": 24}, {"expert": 3, "mlp": 24}):
        with pytest.raises(StructPruneError, match="scores whole experts only.*'mlp'.*'reap'"):
            prune_model(build("mixtral"), config(criterion="reap", widths=widths), tokenizer())
