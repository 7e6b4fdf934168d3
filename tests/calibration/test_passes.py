"""Layer by layer and whole model see the same; hooks are gone on every way out."""

import pytest
import torch
from helpers import batches, count_hooks, evidence_of, logits, pruned_on
from models import NOT_SEQUENTIAL, STRUCTURES, build, config, tokenizer
from torch import nn

from optimum_structprune import StructPruneError
from optimum_structprune.arch.load import describe, layer_list
from optimum_structprune.calibration.passes import LayerPasses, ModelPasses, batches_of, passes_over
from optimum_structprune.domains.load import load_domains
from optimum_structprune.forward.hooks import intercept, observe
from optimum_structprune.forward.layers import NotSequentialError, capture


SEQUENTIAL = [*STRUCTURES, "bert", "modernbert", "llava"]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", SEQUENTIAL)
def test_layer_by_layer_equals_whole_model(case, fixed):
    model = build(case)
    arch = describe(model)
    layers, whole = LayerPasses(model, arch, batches(), fixed=fixed), ModelPasses(model, arch, batches())
    for layer in range(arch.num_layers):
        for space in arch.at(layer):
            if not space.inside:
                torch.testing.assert_close(layers.contributions(layer, space), whole.contributions(layer, space))
                continue
            for left, right in zip(layers.gather(layer, space, True), whole.gather(layer, space, True), strict=True):
                for mine, theirs in zip(left, right, strict=True):
                    assert mine.count == theirs.count and (mine.count > 0 or space.experts)
                    torch.testing.assert_close(mine.gram, theirs.gram, rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-4, atol=1e-5)
        layers.advance(layer)
    assert count_hooks(model) == 0


@pytest.mark.parametrize(("fixed", "passes_of_a_layer"), [(False, 3), (True, 2)])
def test_a_fixed_layer_runs_for_its_spaces_alone(fixed, passes_of_a_layer):
    model, ran = build("llama-tied"), []
    arch = describe(model)
    passes = LayerPasses(model, arch, batches(), fixed=fixed)
    with intercept([layer_list(model, arch)[0]], lambda *_: ran.append(1)):
        for space in arch.at(0):
            list(passes.gather(0, space, True))
        passes.advance(0)
    assert len(ran) == passes_of_a_layer * len(batches()) and len([*arch.at(0)]) == 2


def test_a_batch_holds_one_domain_and_nothing_is_lost():
    domains = load_domains(config(), tokenizer())
    cut = batches_of(domains, 3)
    for index, domain in enumerate(domains):
        mine = torch.cat([batch.ids for batch in cut if batch.domain == index])
        assert torch.equal(mine, domain.samples)
    assert max(len(batch.ids) for batch in cut) <= 3


def test_hooks_are_gone_after_an_exception():
    model = build("llama-tied")
    with pytest.raises(RuntimeError, match="in the middle"), observe(model, ["model.layers.0.mlp"], print):
        assert count_hooks(model) == 1
        raise RuntimeError("in the middle")
    assert count_hooks(model) == 0


def test_observing_a_missing_module_leaves_no_hook():
    model = build("llama-tied")
    with pytest.raises(AttributeError), observe(model, ["model.layers.0.mlp", "model.layers.9.mlp"], print):
        pass
    assert count_hooks(model) == 0


def test_nan_activations_name_the_consumer():
    model = build("llama-tied")
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    arch = describe(model)
    passes = LayerPasses(model, arch, batches())
    passes.advance(0)
    with pytest.raises(StructPruneError, match=r"NaN or infinite activations at model.layers.1.mlp.down_proj"):
        list(passes.gather(1, arch.of("mlp")[1], False))
    assert count_hooks(model) == 0


class Between(nn.ModuleList):
    """Stands in for an architecture that works on the hidden states between its layers."""

    def __getitem__(self, index):
        if isinstance(index, int):
            return super().__getitem__(index)
        return [lambda hidden, layer=layer, **kwargs: layer(hidden + 1, **kwargs) for layer in self]


def between():
    model = build("llama-tied")
    model.model.layers = Between(model.model.layers)
    return model


def test_a_model_that_works_between_its_layers_falls_back():
    model = between()
    arch = describe(model)
    assert isinstance(passes_over(model, arch, batches()), ModelPasses)
    with pytest.raises(NotSequentialError, match="between layers 0 and 1"):
        capture(model, arch, batches()[0].ids, whole=True)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("case", NOT_SEQUENTIAL)
def test_a_family_whose_layers_get_more_than_hidden_states_falls_back(case):
    model = build(case)
    arch = describe(model)
    with pytest.raises(NotSequentialError, match="called with more than hidden states"):
        LayerPasses(model, arch, batches())
    passes = passes_over(model, arch, batches())
    assert isinstance(passes, ModelPasses) and count_hooks(model) == 0
    for space in arch.spaces:
        if space.inside:
            counts = [
                sum(moments.count for moments in by_domain) for by_domain in passes.gather(space.layer, space, True)
            ]
            assert min(counts) > 0
    assert count_hooks(model) == 0


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_model_that_works_between_its_layers_is_pruned(rounds):
    """In every step the passes are those over the whole model, and they run with the model as it is then."""
    model = between()
    made = []

    def recorded(*args):
        made.append(passes_over(*args))
        return made[-1]

    settings = config(rounds=rounds)
    small = pruned_on(evidence_of(settings, run_passes=recorded), model, {"mlp": 24}).model
    assert [type(passes) for passes in made] == rounds * [ModelPasses]
    assert small.config.intermediate_size == 24 and count_hooks(small) == 0
    refitted, plain = (
        (logits(pruned_on(evidence_of(config(refit=refit)), model, {"mlp": 24}).model) - logits(model)).norm()
        for refit in ("least_squares", "none")
    )
    assert refitted < plain
