"""What a third party registers: a criterion with statistics of its own, and a refit."""

from collections import OrderedDict
from importlib.metadata import EntryPoint

import pytest
import torch
from accelerate import disk_offload
from models import build, config, tokenizer

from optimum_structprune import StructPruneError, StructPruner, register_criterion, registry
from optimum_structprune.config.pruning import REFITS
from optimum_structprune.criteria import CRITERIA, per_unit
from optimum_structprune.registry import Registry


SEEN = []


def places(model, arch, data):
    """The last units are worth most; the run remembers that it was watched."""
    SEEN.append(data.cache.setdefault("watched", len(SEEN)))
    sizes = {axis.module: space.size * axis.per_unit for space in arch.spaces for axis in space.consumers}
    return {name: torch.arange(n).double().expand(len(data.domains), -1) for name, n in sizes.items()}


def check(config, arch, use):
    if not arch.causal:
        raise StructPruneError("watched is for decoders")


def watched(weight, moments, columns_per_unit, options):
    return per_unit(moments.prior.to(weight), columns_per_unit)


def scaled(weight, bias, moments, keep, damping):
    assert moments.gram is not None
    return weight[:, keep] * moments.prior[keep].to(weight), bias


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    SEEN.clear()
    for table in (CRITERIA, REFITS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    register_criterion("watched", whole_model_statistics=places, check=check)(watched)
    REFITS.register("scaled")(scaled)


@pytest.mark.parametrize("more", [{}, {"rounds": 2}, {"allocation": "sensitivity", "round_to": 1}])
def test_scores_choices_and_weights_go_by_the_same_prior(more):
    model = build("llama-tied")
    pruner = StructPruner(config(criterion="watched", refit="scaled", **more))
    small = pruner.prune_model(model, tokenizer())
    for layer in (0, 1):
        kept = pruner.plan.keep[layer, "mlp"]
        assert kept == tuple(range(40 - len(kept), 40))
        weight = model.model.layers[layer].mlp.down_proj.weight[:, kept] * torch.tensor(kept)
        torch.testing.assert_close(small.model.layers[layer].mlp.down_proj.weight, weight)
    assert {*SEEN} == {0}, "with the cache of the run"
    assert "allocation" in more or len(SEEN) == more.get("rounds", 1)


def test_what_it_cannot_judge_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(StructPruneError, match="watched is for decoders"):
        StructPruner(config(criterion="watched")).prune_model(build("bert"), tokenizer())
    with pytest.raises(StructPruneError, match="refit='scaled' is for consumers inside the layers"):
        StructPruner(config(refit="scaled", widths={"hidden": 24})).prune_model(build("llama-tied"), tokenizer())
    offloaded = disk_offload(build("llama-tied"), tmp_path / "disk", execution_device=torch.device("cpu"))
    with pytest.raises(StructPruneError, match="criterion='watched' takes all its layers at once; choose"):
        StructPruner(config(criterion="watched")).prune_model(offloaded, tokenizer(), inplace=True)
    assert SEEN == []


def test_a_registry_takes_a_name_once_and_loads_entry_points_when_asked_for(monkeypatch):
    animals = Registry("animal", "optimum_structprune.test_animals", ("plain",))
    animals.check("plain")  # a built-in name is legal before its module is imported
    with pytest.raises(StructPruneError, match="There is no animal 'other'"):
        animals.get("other")

    @animals.register("cat")
    class Cat:
        pass

    class Lion:
        pass

    assert animals.register("cat")(Cat) is animals.get("cat") is Cat, "registering the same class again is harmless"
    with pytest.raises(StructPruneError, match=r"animal 'cat' is already registered by .*Cat; .*Lion"):
        animals.register("cat")(Lion)
    assert animals.get("cat") is Cat
    insects = Registry("insect", "optimum_structprune.test_insects")
    point = EntryPoint("ordered", "collections:OrderedDict", insects.group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == insects.group else [])
    assert insects.names() == ["ordered"] and insects.get("ordered") is OrderedDict
