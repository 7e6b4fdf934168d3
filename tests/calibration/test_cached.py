"""What runs before the pruned parts of a layer does not run again, and the next layer gets the same."""

import pytest
import torch
from helpers import evidence_of
from models import STRUCTURES, build, config
from torch import nn

from optimum_structprune.arch.load import describe, layer_list
from optimum_structprune.arch.meta import skeleton
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.calibration.cached import CachedOutputs
from optimum_structprune.forward.hooks import hidden_states_of, intercept
from optimum_structprune.forward.metrics import run_model
from optimum_structprune.pruning.sweep import Sweep


# With both kinds gone, both parts of a layer change; one kind alone leaves a part that does not run again.
@pytest.mark.parametrize("kinds", [("mlp",), ("attention",)])
@pytest.mark.parametrize("case", STRUCTURES)
def test_the_next_layer_gets_what_the_smaller_model_gives(case, kinds):
    model, evidence = build(case), evidence_of(config())
    arch = describe(model)
    widths = {kind: arch.of(kind)[0].width // 2 for kind in kinds if any(space.kind == kind for space in arch.spaces)}
    if not widths:
        pytest.skip(f"{case} has none of {kinds}")
    sweep, passes = Sweep(model, arch, evidence.config), evidence.passes(model, arch)
    sweep.run_(passes, evidence.mixture, widths, skeleton(model, shrunk_config(model.config, arch, widths)), "round")
    entering = []
    last = layer_list(model, arch)[-1]
    with intercept([last], lambda _, args, kwargs: entering.append(hidden_states_of(args, kwargs))), torch.no_grad():
        for batch in passes.batches:
            run_model(model, batch.ids)
    for hidden, expected in zip(passes.hidden, entering, strict=True):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


class Part(nn.Linear):
    """A part of a layer that counts how often it runs."""

    ran = 0

    def forward(self, hidden):
        self.ran += 1
        return super().forward(hidden)


class Layer(nn.Module):
    """Two parts, one after the other, the second of which changes the hidden states in place."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = Part(8, 8), nn.LayerNorm(8), Part(8, 8)

    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return hidden.add_(self.second(self.norm(hidden)))


@pytest.mark.parametrize(("pruned", "again"), [("second", 0), ("first", 1)])
@torch.no_grad()
def test_parts_before_the_first_pruned_one_do_not_run(pruned, again):
    layer, x, unchanged = Layer(), torch.randn(2, 3, 8), CachedOutputs(None)
    with unchanged.recording(layer, [f"{pruned}.weight"], lambda: 0):
        layer(x)
    layer.get_submodule(pruned).weight.mul_(2)
    expected = layer(x)
    for count in (again, 1):
        layer.first.ran = layer.second.ran = 0
        with unchanged.replayed(layer, 0, x.device):
            torch.testing.assert_close(layer(x), expected)
        assert (layer.first.ran, layer.second.ran) == (count, 1)
        unchanged.forget()
