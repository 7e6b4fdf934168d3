"""Mixtures of experts: what is observed is what the experts do, and whole experts go as the plan says."""

import pytest
import torch
from helpers import batches, logits, mixture_of, shrunk
from models import STRUCTURES, build, config, token_ids, tokenizer

from optimum_structprune import StructPruner, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.method.shrink import read_consumer
from optimum_structprune.sources.data import source_of
from optimum_structprune.sources.experts import contributions, expert_moments, inner_activations, route


MIXTURES = [case for case in ("mixtral", *STRUCTURES) if describe(build(case)).of("expert")]


def inside_experts(arch):
    """The spaces inside the experts of the last layer that has such spaces."""
    spaces = [space for space in arch.spaces if space.experts and space.inside]
    return [space for space in spaces if space.layer == spaces[-1].layer]


def routed(model, space):
    source = source_of(model, describe(model), batches())
    for layer in range(space.layer):
        source.advance(layer)
    return source, route(source, space)


@pytest.mark.parametrize("case", [case for case in MIXTURES if inside_experts(describe(build(case)))])
def test_inner_activations_and_consumers_make_the_experts_output(case):
    model = build(case)
    spaces = inside_experts(describe(model))
    experts = model.get_submodule(spaces[0].experts)
    call = routed(model, spaces[0])[1][0]
    with torch.no_grad():
        expected = experts(call.hidden, call.expert_ids, call.gates)
    output = torch.zeros_like(expected)
    for space in spaces:
        expert = space.consumers[0].part
        weight, bias = read_consumer(model, space.consumers[0])
        tokens, hidden, gates, _ = call.of(expert)
        own = torch.nn.functional.linear(inner_activations(experts, space, hidden), weight, bias)
        output.index_add_(0, tokens, own * gates[:, None])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["reap", "reap_sum"])
def test_an_experts_contribution_is_made_of_gates_and_norms(name):
    model = build("olmoe")  # whose gates do not sum to 1
    space = describe(model).of("expert")[0]
    experts = model.get_submodule(space.experts)
    source, calls = routed(model, space)
    found = contributions(source, space, CRITERIA.get(name))
    for domain in range(2):
        for expert in range(space.size):
            values = []
            for call in calls:
                if call.domain == domain:
                    for token, slot in (call.expert_ids == expert).nonzero().tolist():
                        output = experts(call.hidden[token][None], torch.tensor([[expert]]), torch.ones(1, 1))
                        values.append(float(call.gates[token, slot] * output.norm()))
            expected = sum(values) if name == "reap_sum" else sum(values) / len(values)
            assert float(found[domain, expert]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", MIXTURES)
def test_experts_and_their_widths_go_as_the_plan_says(case):
    model = build(case)
    pruner = StructPruner(config(widths={"expert": 3, "mlp": 24}, refit="none", rounds=2))
    small = pruner.prune_model(model, tokenizer())
    arch = describe(model)
    torch.testing.assert_close(logits(shrunk(model, arch, pruner.plan)), logits(small), atol=1e-6, rtol=0)
    assert {name: set(at.values()) for name, at in pruner.report.widths.items()} == {"expert": {3}, "mlp": {24}}
    if case == "mixtral":
        kept = {units for (layer, name), units in pruner.plan.keep.items() if layer == 0 and name.startswith("mlp/")}
        assert len(kept) == 3, "experts choose their own channels"


def test_refit_lets_a_channel_stand_in_for_its_twin():
    # The first layer only: later ones route other tokens to other experts once their input has changed.
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    rows, columns = experts.gate_up_proj.data, experts.down_proj.data
    rows[:, 20:40], rows[:, 60:80] = rows[:, :20].clone(), rows[:, 40:60].clone()
    columns[:, :, 20:40] = columns[:, :, :20] / 4  # so the first of the twins is the one to keep
    distance = {}
    for fields in ({"refit": "none"}, {"refit": "least_squares"}):
        small = prune_model(model, config(**fields, num_samples=16), tokenizer())
        with torch.no_grad():
            outputs = [one.model(token_ids(), output_hidden_states=True) for one in (small, model)]
        ours, dense = (output.hidden_states[1] for output in outputs)
        distance[fields["refit"]] = float((ours - dense).square().mean())
    assert distance["least_squares"] < 0.2 * distance["none"]


def test_an_expert_that_no_token_chose_is_judged_by_its_weights():
    model = build("mixtral")
    space = describe(model).of("mlp")[1]
    source, every = routed(model, space)
    source.routed = space.layer, tuple(call for call in every if not (call.expert_ids == 1).any())
    moments = [of_domain for (of_domain,) in expert_moments(source, space, True)]
    weight, _ = read_consumer(model, space.consumers[0])
    assert [part.count for part in moments] == [0, 0]
    assert torch.equal(mixture_of(moments, (0.5, 0.5), weight).full_gram(), torch.eye(space.size))
