"""The criteria of other papers, compared with their formulas."""

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
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"
NAMES = ["slimllm", "pip", "iterative_norm"]


@pytest.fixture(scope="module")
def model():
    return build("llama-tied")


def inputs_of(model, name, ids):
    """Return the input of a module on samples, shape `(batch, seq_length, n)`."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return inputs[0]


def random_problem(units, columns):
    """Return a weight, correlated inputs of a nonzero mean, and the moments of the inputs."""
    generator = torch.Generator().manual_seed(0)
    n = units * columns
    x = torch.randn(300, n, generator=generator) @ torch.randn(n, n, generator=generator) + 1
    weight = torch.randn(7, n, generator=generator)
    return weight, x, Moments.empty(n, gram=True).update(x)


def correlation(first, second):
    """Return the sum of the absolute correlations over tokens of the outputs."""
    first = first - first.mean(0)
    second = second - second.mean(0)
    correlations = (first * second).sum(0) / first.norm(dim=0) / second.norm(dim=0)
    return float(correlations.abs().sum())


def test_slimllm_scores_channels_in_the_principal_directions_of_the_output():
    weight, x, moments = random_problem(6, 1)
    moments.prior = torch.rand(6, dtype=torch.float64)

    scores = slimllm(weight, moments, 1)

    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov((x @ weight.T).T, correction=0))
    importance = torch.sigmoid(eigenvalues.abs() / eigenvalues.abs().mean())
    for j in range(6):
        norm = ((weight[:, j] @ eigenvectors).abs() * importance).norm()
        expected = norm * x[:, j].square().mean().sqrt() + moments.prior[j]
        assert float(scores[j]) == pytest.approx(float(expected), rel=1e-3)


def test_slimllm_scores_groups_by_the_correlation_of_the_output_without_them():
    weight, x, moments = random_problem(4, 3)

    scores = slimllm(weight, moments, 3)

    for unit in range(4):
        x_without_unit = x.clone()
        x_without_unit[:, 3 * unit : 3 * unit + 3] = 0
        expected = -correlation(x_without_unit @ weight.T, x @ weight.T)
        assert float(scores[unit]) == pytest.approx(expected, rel=1e-3)


def test_inflows_are_the_norms_of_the_producers_of_a_channel(model):
    samples = [token_ids(), token_ids(seed=5)]
    norms = inflows(model, describe(model), [Batch(0, samples[0]), Batch(1, samples[1])])

    for domain, ids in enumerate(samples):
        size = inputs_of(model, UP, ids).reshape(-1, 32).square().mean(0).sqrt()
        expected = torch.zeros(40)
        for name in (UP, GATE):
            expected += (model.get_submodule(name).weight.detach() * size).norm(dim=1)
        torch.testing.assert_close(norms[DOWN][domain].float(), expected)

    assert not norms["model.layers.1.self_attn.o_proj"].any()


@pytest.mark.parametrize("per_unit", [1, 2])
def test_removal_effects_are_the_norms_of_the_removed_output(per_unit):
    weight, x, _ = random_problem(6, per_unit)
    removed = [4, 1]

    effects = removal_effects(weight, x, removed, per_unit)

    for unit in (0, 2, 3, 5):
        columns = []
        for removed_unit in removed + [unit]:
            start = per_unit * removed_unit
            columns.extend(range(start, start + per_unit))
        expected = (x[:, columns] @ weight[:, columns].T).norm(dim=1).mean()
        assert float(effects[unit]) == pytest.approx(float(expected), rel=1e-3)


def test_each_sample_of_each_domain_removes_units(model):
    first_ids = token_ids(2)
    second_ids = token_ids(2, seed=5)
    orders = removal_orders(model, describe(model), [Batch(0, first_ids), Batch(1, second_ids)])[DOWN]
    assert torch.equal(orders[0], orders[1])

    # Each of the four samples removes ten of the 40 units.
    weight = model.get_submodule(DOWN).weight.detach()
    removed = []
    for x in torch.cat([inputs_of(model, DOWN, first_ids), inputs_of(model, DOWN, second_ids)]):
        removed_output = x[:, removed] @ weight[:, removed].T
        effects = {}
        for unit in range(40):
            if unit not in removed:
                output = removed_output + x[:, unit, None] * weight[:, unit]
                effects[unit] = float(output.norm(dim=1).mean())
        removed += sorted(effects, key=effects.get)[:10]
    assert orders[0].argsort().tolist() == removed


def gate_gradient(model, embeddings, labels):
    """Return the gradient of the loss of one sample by gates on the input of `DOWN`."""
    gates = torch.ones(40, requires_grad=True)
    handle = model.get_submodule(DOWN).register_forward_pre_hook(lambda module, args: args[0] * gates)
    logits = model(inputs_embeds=embeddings[None]).logits[0, :-1]
    handle.remove()

    loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
    return torch.autograd.grad(loss, gates)[0]


def test_contrasts_are_the_differences_of_the_gradients_of_gates(model):
    ids = token_ids()
    contrast = contrasts(model, describe(model), [Batch(0, ids)])[DOWN][0]

    embeddings = model.get_input_embeddings()(ids).detach()
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    perturbed_embeddings = embeddings + NOISE * embeddings.square().mean(-1, keepdim=True).sqrt() * noise
    expected = torch.zeros(40)
    for row, labels in enumerate(ids):
        gradient = gate_gradient(model, embeddings[row], labels)
        perturbed_gradient = gate_gradient(model, perturbed_embeddings[row], labels)
        expected += (gradient - perturbed_gradient).abs()

    torch.testing.assert_close(contrast.float(), expected / (2 * 11), rtol=1e-3, atol=1e-6)


def model_with_idle_channels():
    """Build a model in which the channels 5 to 19 of the first FFN compute nothing."""
    model = build("llama-tied")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 5:20] = 0
        mlp.gate_proj.weight[5:20] = 0
        mlp.up_proj.weight[5:20] = 0
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("refit", ["none", "least_squares"])
def test_the_criteria_prune_channels_and_groups(name, refit):
    pruner = StructPruner(config(criterion=name, refit=refit, widths={"mlp": 24, "attention": 2}, rounds=2))
    pruned = pruner.prune_model(model_with_idle_channels(), tokenizer())

    kept_channels = pruner.result.plan.keep[0, "mlp"]
    assert len(kept_channels) == 24
    assert not set(range(5, 20)) & set(kept_channels)
    assert len(pruner.result.plan.keep[1, "attention"]) == 2
    assert count_hooks(pruned) == 0


@pytest.mark.parametrize("name", NAMES)
def test_models_with_experts_are_refused_before_anything_runs(name):
    with pytest.raises(StructPruneError, match="choose criterion='obs' or 'wanda'"):
        StructPruner(config(criterion=name)).prune_model(build("mixtral"), tokenizer())


@pytest.mark.parametrize("case", ["gpt2-tied", "phi3", "bert"])
def test_other_layouts_have_statistics_too(case):
    model = build(case)
    arch = describe(model)
    modules = set()
    ffn_modules = set()
    for space in arch.spaces:
        names = [axis.module for axis in space.consumers]
        modules.update(names)
        if space.kind == "mlp":
            ffn_modules.update(names)

    for watch in (inflows, removal_orders):
        statistics = watch(model, arch, batches())
        assert set(statistics) == modules
        for name in ffn_modules:
            assert statistics[name].isfinite().all()
            assert statistics[name].sum() > 0
