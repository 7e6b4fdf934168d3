"""Models whose blocks differ in width: pruned ≡ masked, every way to load them, and what people do with them."""

import pytest
import torch
from models import PRUNABLE, build, token_ids
from test_surgery import KEEP, logits, masked
from transformers import AutoModelForCausalLM

from optimum_structprune import Plan
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import legal_sizes, shrunk_config
from optimum_structprune.surgery import adopt_config_, shrink_block_, skeleton


SPACES = [
    (case, name)
    for case in PRUNABLE
    for spec in [describe(build(case))]
    for name in spec.names
    if not spec.uniform and not spec.of(name)[0].uniform and len({space.layer for space in spec.of(name)}) > 1
]


def differing(model, names):
    """A spec, and a plan that keeps more units in every block than in the one before."""
    spec = describe(model)
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for name in names:
        legal = legal_sizes(model.config, spec, name)
        first = min(space.layer for space in spec.of(name))
        for space in spec.of(name):
            width = legal[legal.index(KEEP[name]) + (space.layer - first)] * space.scale
            units = torch.randperm(space.size, generator=generator)[:width].sort().values
            keep[space.layer, space.name] = tuple(units.tolist())
    return spec, Plan(spec.model_type, keep)


def shrunk(model, spec, plan):
    from copy import deepcopy

    small = deepcopy(model)
    new_config = shrunk_config(model.config, spec, plan.widths())
    smaller = skeleton(small, new_config)
    for layer in range(spec.num_blocks):
        shrink_block_(small, spec, layer, plan, smaller)
    adopt_config_(small, new_config, smaller)
    return small


@pytest.mark.parametrize(("case", "name"), SPACES)
def test_pruned_equals_masked_and_reloads(case, name, tmp_path):
    model = build(case)
    spec, plan = differing(model, [name])
    small = shrunk(model, spec, plan)
    assert small.config.is_heterogeneous
    torch.testing.assert_close(logits(small), logits(masked(model, spec, plan)), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), logits(model), atol=1e-3), "pruning changed nothing"
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again), logits(small), atol=1e-6, rtol=0)
    assert again.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    torch.testing.assert_close(logits(remote), logits(small), atol=1e-6, rtol=0)
    widths = {space.layer: space.width for space in describe(again).of(name)}
    assert widths == plan.widths()[name]
