"""Sources observe the same activations and contributions as the experts themselves, and runs remove whole experts."""

import pytest
import torch
from helpers import batches, logits, mixture_of, shrunk
from models import STRUCTURES, build, config, token_ids, tokenizer

from optimum_structprune import StructPruner, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.method.expert_source import contributions, expert_moments, inner_activations, route
from optimum_structprune.method.shrink import read_consumer
from optimum_structprune.steps.data import source_of


MIXTURES = [case for case in ["mixtral"] + STRUCTURES if describe(build(case)).of("expert")]


def spaces_inside_experts(arch):
    """Return the spaces inside the experts of the last layer with such spaces."""
    spaces = [space for space in arch.spaces if space.experts and space.inside]
    return [space for space in spaces if space.layer == spaces[-1].layer]


def route_tokens(model, space):
    """Return a source at the layer of a space, and the tokens that each batch routes to its experts."""
    source = source_of(model, describe(model), batches())
    for layer in range(space.layer):
        source.advance(layer)
    return source, route(source, space)


@pytest.mark.parametrize("case", [case for case in MIXTURES if spaces_inside_experts(describe(build(case)))])
def test_inner_activations_and_consumers_result_in_the_output_of_the_experts(case):
    model = build(case)
    spaces = spaces_inside_experts(describe(model))
    experts = model.get_submodule(spaces[0].experts)
    _, calls = route_tokens(model, spaces[0])
    call = calls[0]
    with torch.no_grad():
        expected = experts(call.hidden, call.expert_ids, call.gates)

    output = torch.zeros_like(expected)
    for space in spaces:
        consumer = space.consumers[0]
        weight, bias = read_consumer(model, consumer)
        tokens, hidden, gates, _ = call.of(consumer.part)
        expert_output = torch.nn.functional.linear(inner_activations(experts, space, hidden), weight, bias)
        output.index_add_(0, tokens, expert_output * gates[:, None])

    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def gated_norms(experts, calls, domain, expert):
    """Return the gate times the norm of an expert's output, for each token of a domain that chose this expert."""
    values = []
    for call in calls:
        if call.domain != domain:
            continue
        for token, slot in (call.expert_ids == expert).nonzero().tolist():
            output = experts(call.hidden[token][None], torch.tensor([[expert]]), torch.ones(1, 1))
            values.append(float(call.gates[token, slot] * output.norm()))
    return values


@torch.no_grad()
@pytest.mark.parametrize("name", ["reap", "reap_sum"])
def test_the_contribution_of_an_expert_is_the_norm_of_its_output_times_the_gate(name):
    model = build("olmoe")  # the gates of olmoe do not sum to 1
    space = describe(model).of("expert")[0]
    experts = model.get_submodule(space.experts)
    source, calls = route_tokens(model, space)
    scores = contributions(source, space, CRITERIA.get(name))

    for domain in range(2):
        for expert in range(space.size):
            values = gated_norms(experts, calls, domain, expert)
            expected = sum(values)
            if name == "reap":
                expected = sum(values) / len(values)
            assert float(scores[domain, expert]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", MIXTURES)
def test_a_pruned_mixture_has_the_experts_and_channels_of_the_plan(case):
    model = build(case)
    pruner = StructPruner(config(widths={"expert": 3, "mlp": 24}, refit="none", rounds=2))
    small = pruner.prune_model(model, tokenizer())

    plan = pruner.result.plan
    torch.testing.assert_close(logits(shrunk(model, describe(model), plan)), logits(small), atol=1e-6, rtol=0)
    widths = {name: set(by_layer.values()) for name, by_layer in pruner.result.report.widths.items()}
    assert widths == {"expert": {3}, "mlp": {24}}

    if case == "mixtral":
        channels = {units for (layer, name), units in plan.keep.items() if layer == 0 and name.startswith("mlp/")}
        assert len(channels) == 3, "experts choose their own channels"


def test_the_refit_replaces_a_channel_by_its_twin():
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    rows = experts.gate_up_proj.data
    rows[:, 20:40] = rows[:, :20].clone()
    rows[:, 60:80] = rows[:, 40:60].clone()
    columns = experts.down_proj.data
    columns[:, :, 20:40] = columns[:, :, :20] / 4  # the criterion then keeps the first of the twins

    def first_output(measured):
        """Return the output of the first layer. Later layers route other tokens once their input has changed."""
        with torch.no_grad():
            return measured.model(token_ids(), output_hidden_states=True).hidden_states[1]

    distance = {}
    for refit in ("none", "least_squares"):
        small = prune_model(model, config(refit=refit, num_samples=16), tokenizer())
        distance[refit] = float((first_output(small) - first_output(model)).square().mean())

    assert distance["least_squares"] < 0.2 * distance["none"]


def test_an_expert_without_tokens_is_judged_by_its_weights():
    model = build("mixtral")
    space = describe(model).of("mlp")[1]
    source, calls = route_tokens(model, space)
    source.routed = space.layer, tuple(call for call in calls if not (call.expert_ids == 1).any())

    moments = [domain_moments for (domain_moments,) in expert_moments(source, space, True)]
    assert [domain_moments.count for domain_moments in moments] == [0, 0]

    weight, _ = read_consumer(model, space.consumers[0])
    assert torch.equal(mixture_of(moments, (0.5, 0.5), weight).full_gram(), torch.eye(space.size))
