"""The criteria of other papers, against their formulas written out."""

import pytest
import torch
from helpers import batches, count_hooks
from models import build, config, token_ids, tokenizer
from structprune_sisters.gradients import NOISE, contrasts
from structprune_sisters.iterative_norm import removal_effects, removal_orders
from structprune_sisters.slimllm import inflows, slimllm

from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.layers import Batch


pytestmark = pytest.mark.nightly
DOWN, UP, GATE = (f"model.layers.1.mlp.{name}_proj" for name in ("down", "up", "gate"))
NAMES = ["slimllm", "pip", "iterative_norm"]


@pytest.fixture(scope="module")
def model():
    return build("llama-tied")


def inputs_of(model, name, ids=None, **given):
    """What a module reads, shape `(batch, seq_length, n)`."""
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        model(ids, **given)
    handle.remove()
    return caught[0]


def case(units, columns):
    generator = torch.Generator().manual_seed(0)
    n = units * columns
    x = torch.randn(300, n, generator=generator) @ torch.randn(n, n, generator=generator) + 1
    return torch.randn(7, n, generator=generator), x, Moments.empty(n, gram=True).update(x)


def pearson(left, right):
    """Over tokens, summed over outputs."""
    left, right = (y - y.mean(0) for y in (left, right))
    return float(((left * right).sum(0) / left.norm(dim=0) / right.norm(dim=0)).abs().sum())


def test_slimllm_scores_channels_in_the_principal_directions_of_the_output():
    weight, x, moments = case(6, 1)
    moments.prior = torch.rand(6, dtype=torch.float64)
    found = slimllm(weight, moments, 1, config())
    values, directions = torch.linalg.eigh(torch.cov((x @ weight.T).T, correction=0))
    importance = torch.sigmoid(values.abs() / values.abs().mean())
    for j in range(6):
        expected = ((weight[:, j] @ directions).abs() * importance).norm() * x[:, j].square().mean().sqrt()
        assert float(found[j]) == pytest.approx(float(expected + moments.prior[j]), rel=1e-3)


def test_slimllm_scores_groups_by_the_similarity_of_what_is_left():
    weight, x, moments = case(4, 3)
    found = slimllm(weight, moments, 3, config())
    for unit in range(4):
        left = x.clone()
        left[:, 3 * unit : 3 * unit + 3] = 0
        assert float(found[unit]) == pytest.approx(-pearson(left @ weight.T, x @ weight.T), rel=1e-3)


def test_inflows_are_the_norms_of_what_drives_a_channel(model):
    first, second = token_ids(), token_ids(seed=5)
    found = inflows(model, describe(model), [Batch(0, first), Batch(1, second)])
    for domain, x in enumerate((inputs_of(model, UP, first), inputs_of(model, UP, second))):
        size = x.reshape(-1, 32).square().mean(0).sqrt()
        expected = sum((model.get_submodule(name).weight * size).norm(dim=1) for name in (UP, GATE))
        torch.testing.assert_close(found[DOWN][domain].float(), expected.detach())
    assert not found["model.layers.1.self_attn.o_proj"].any()


@pytest.mark.parametrize("per_unit", [1, 2])
def test_removal_effects_are_the_norms_of_what_would_be_missing(per_unit):
    weight, x, _ = case(6, per_unit)
    removed = [4, 1]
    found = removal_effects(weight, x, removed, per_unit)
    for unit in range(6):
        columns = [per_unit * one + i for one in {*removed} | {unit} for i in range(per_unit)]
        expected = (x[:, columns] @ weight[:, columns].T).norm(dim=1).mean()
        if unit not in removed:
            assert float(found[unit]) == pytest.approx(float(expected), rel=1e-3)


def test_units_go_sample_by_sample_and_domain_by_domain(model):
    weight = model.get_submodule(DOWN).weight.detach()
    first, second = token_ids(2), token_ids(2, seed=5)
    found = removal_orders(model, describe(model), [Batch(0, first), Batch(1, second)])[DOWN]
    assert torch.equal(found[0], found[1])
    removed: list[int] = []
    for x in (*inputs_of(model, DOWN, first), *inputs_of(model, DOWN, second)):
        missing = x[:, removed] @ weight[:, removed].T
        left = {j: float((missing + x[:, j, None] * weight[:, j]).norm(dim=1).mean()) for j in range(40)}
        removed += sorted({*left} - {*removed}, key=left.__getitem__)[:10]
    assert found[0].argsort().tolist() == removed


def test_contrasts_are_the_differences_of_the_gradients_of_gates(model):
    ids = token_ids()
    found = contrasts(model, describe(model), [Batch(0, ids)])[DOWN][0]
    plain = model.get_input_embeddings()(ids).detach()
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(40)
    for row, labels in enumerate(ids):
        slopes = []
        for view in (plain, plain + NOISE * plain.square().mean(-1, keepdim=True).sqrt() * noise):
            gate = torch.ones(40, requires_grad=True)
            hook = model.get_submodule(DOWN).register_forward_pre_hook(lambda module, args, gate=gate: args[0] * gate)
            logits = model(inputs_embeds=view[row : row + 1]).logits[0, :-1]
            hook.remove()
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            slopes.append(torch.autograd.grad(loss, gate)[0])
        expected += (slopes[0] - slopes[1]).abs()
    torch.testing.assert_close(found.float(), expected / (2 * 11), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("refit", ["none", "least_squares"])
def test_they_prune_channels_and_groups(name, refit, model):
    with torch.no_grad():
        idle = build("llama-tied")
        idle.model.layers[0].mlp.down_proj.weight[:, 5:20] = 0
        idle.model.layers[0].mlp.gate_proj.weight[5:20] = idle.model.layers[0].mlp.up_proj.weight[5:20] = 0
    pruner = StructPruner(config(criterion=name, refit=refit, widths={"mlp": 24, "attention": 2}, rounds=2))
    small = pruner.prune_model(idle, tokenizer())
    kept = pruner.plan.keep
    assert len(kept[0, "mlp"]) == 24 and not set(range(5, 20)) & set(kept[0, "mlp"])
    assert len(kept[1, "attention"]) == 2 and count_hooks(small) == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_they_cannot_judge_is_refused_before_anything_runs(name):
    with pytest.raises(StructPruneError, match="choose criterion='obs' or 'wanda'"):
        StructPruner(config(criterion=name)).prune_model(build("mixtral"), tokenizer())


@pytest.mark.parametrize("case", ["gpt2-tied", "phi3", "bert"])
def test_other_layouts_are_watched_too(case):
    other = build(case)
    arch = describe(other)
    for watch in (inflows, removal_orders):
        found = watch(other, arch, batches())
        assert set(found) == {axis.module for space in arch.spaces for axis in space.consumers}
        channels = [axis.module for space in arch.spaces if space.kind == "mlp" for axis in space.consumers]
        assert all(found[name].isfinite().all() and found[name].sum() > 0 for name in channels)
