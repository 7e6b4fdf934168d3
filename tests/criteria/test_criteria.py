"""Criteria against their definitions, and what a third party registers: a criterion with statistics, a refit."""

from collections import OrderedDict
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from models import build, config, tokenizer

from optimum_structprune import StructPruneConfig, StructPruneError, StructPruner, register_criterion, registry
from optimum_structprune.arch.load import describe
from optimum_structprune.config.pruning import REFITS
from optimum_structprune.criteria import CRITERIA, parameters_of, per_unit
from optimum_structprune.criteria.obs_drive import producer_norms
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.registry import Registry


SEEN = []


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    return torch.randn(4, 6, generator=generator), x, Moments.empty(6, gram=True).update(x)


def score(name, case, columns_per_unit=1, **fields):
    weight, _, moments = case
    criterion = CRITERIA.get(name)
    return criterion(weight, moments, columns_per_unit, **parameters_of(criterion, config(**fields), layer=0))


def test_magnitude_wanda_and_flap_are_their_definitions(case):
    weight, x, _ = case
    torch.testing.assert_close(score("magnitude", case), weight.norm(dim=0))
    torch.testing.assert_close(score("wanda", case), weight.norm(dim=0) * x.square().mean(0).sqrt())
    expected = weight.square().sum(0) * x.var(0, correction=0)
    torch.testing.assert_close(score("flap", case), expected, rtol=1e-4, atol=1e-5)
    for name in ("magnitude", "wanda"):  # a unit of several columns scores their joint energy
        torch.testing.assert_close(score(name, case, 3), score(name, case).reshape(2, 3).norm(dim=1))
    assert torch.equal(score("random", case, seed=1), score("random", case, seed=1))
    assert not torch.equal(score("random", case, seed=1), score("random", case, seed=2))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "columns_per_unit"), [(6, 1), (6, 2), (6, 3), (384, 192), (1024, 512)])
def test_obs_is_half_the_error_after_the_best_refit_of_the_others(size, columns_per_unit, threads, monkeypatch):
    """For units as large as the groups of real models too."""
    monkeypatch.setattr(StructPruneConfig, "damping", 1e-7)
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x = torch.randn(max(400, 2 * size), size, generator=generator)
    x = x if size > 6 else x @ torch.randn(6, 6, generator=generator) + 1
    weight, moments = torch.randn(16, size, generator=generator), Moments.empty(size, gram=True).update(x)
    torch.set_num_threads(threads)
    try:
        scores = score("obs", (weight, x, moments), columns_per_unit)
    finally:
        torch.set_num_threads(before)
    target = (x @ weight.T).double()
    for unit in range(size // columns_per_unit):
        others = [j for j in range(size) if j // columns_per_unit != unit]
        fitted = x[:, others].double() @ torch.linalg.lstsq(x[:, others].double(), target).solution
        assert float(scores[unit]) == pytest.approx(0.5 * float((target - fitted).square().sum(1).mean()), rel=1e-2)


def test_a_channel_with_larger_producers_scores_higher(case):
    """And the scores stay in the units of a loss, so that they compare over layers."""
    weight, x, moments = case
    losses = score("obs", case)
    even = score("obs_drive", (weight, x, replace(moments, prior=torch.ones(6))))
    torch.testing.assert_close(even, (losses.sqrt() + losses.sqrt().mean()).square() / 4)
    norms = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 1.0])
    larger = score("obs_drive", (weight, x, replace(moments, prior=norms)))
    assert int((larger / even).argmax()) == 2
    torch.testing.assert_close(score("obs_drive", (weight, x, replace(moments, prior=100 * norms))), larger)
    # Groups of columns, and units without producer norms, are scored as by `obs`.
    pairs = score("obs_drive", (weight, x, replace(moments, prior=norms)), 2)
    torch.testing.assert_close(pairs, score("obs", case, 2))
    torch.testing.assert_close(score("obs_drive", case), losses)


def test_every_criterion_has_its_row_with_its_paper():
    page = (Path(__file__).parents[2] / "docs" / "how_it_works.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    for name in CRITERIA.names():
        criterion = CRITERIA.get(name)
        if not criterion.score.__module__.startswith("optimum_structprune."):
            continue  # a plug-in of another test
        assert criterion.name == name and criterion.paper in rows[name], name
        assert criterion.paper or name in ("magnitude", "random")
        assert len(rows[name].split("|")[3].split()) <= 11


@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "phi3", "gpt2-tied", "mixtral", "gpt_oss"])
def test_it_is_the_spread_of_what_producers_give_for_white_inputs(case):
    """Where the norm before them gives independent components of mean square γ², in any layout of the weights."""
    model = build(case)
    arch = describe(model)
    space = next(space for space in arch.at(0) if space.kind == "mlp")
    tap, plus = None, 0.0
    for read in arch.residual.reads if arch.residual else ():
        if read.norm and any(reader.param == space.producers[0].param for reader in read.readers):
            tap, plus = read.tap, arch.residual.norm_offset
    expected = torch.zeros(space.size)
    for axis in space.producers:
        weight = model.get_parameter(axis.param).detach()
        weight, dim = (weight, axis.dim) if axis.part is None else (weight[axis.part], axis.dim - 1)
        if weight.ndim == 2:
            matrix = weight if dim == 0 else weight.T
            gamma = torch.ones(matrix.shape[1])
            if tap is not None:
                gamma = model.get_submodule(tap).weight.detach() + plus
            for unit in range(space.size):
                for row in axis.indices([unit]):
                    expected[unit] += (matrix[row] * gamma).norm()
    torch.testing.assert_close(producer_norms(model, arch, space), expected)


def places(model, arch, data):
    """The last units are worth most; the run remembers that it was watched."""
    SEEN.append(data.cache.setdefault("watched", len(SEEN)))
    sizes = {axis.module: space.size * axis.per_unit for space in arch.spaces for axis in space.consumers}
    return {name: torch.arange(n).double().expand(len(data.domains), -1) for name, n in sizes.items()}


def check(config, arch, use):
    if not arch.causal:
        raise StructPruneError("watched is for decoders")


def watched(weight, moments, columns_per_unit):
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


def test_a_criterion_gets_the_parameters_that_it_declares():
    seen = []

    @register_criterion("declares", parameters=("seed", "num_samples"))
    def declares(weight, moments, columns_per_unit, **parameters):
        seen.append(parameters)
        return weight.square().sum(0)

    StructPruner(config(criterion="declares", seed=5)).prune_model(build("llama-tied"), tokenizer())
    samples = config().num_samples
    assert [(parameters["seed"], parameters["num_samples"]) for parameters in seen] == [(5, samples), (6, samples)]
    assert all(set(parameters) == {"seed", "num_samples"} for parameters in seen)


def test_parameters_that_no_config_has_are_refused_at_registration():
    with pytest.raises(StructPruneError, match="'misspelt' declares the parameter 'sed'.* Did you mean 'seed'"):
        register_criterion("misspelt", parameters=("sed",))(watched)
    with pytest.raises(StructPruneError, match="'whole' judges whole experts and cannot have `parameters`"):
        register_criterion("whole", judges="expert", parameters=("seed",))(watched)
    assert not {"misspelt", "whole"} & set(CRITERIA.names())


def test_a_registry_takes_a_name_once_and_loads_entry_points_when_asked_for(monkeypatch):
    animals = Registry("animal", "optimum_structprune.test_animals", ("plain",))
    assert "plain" in animals.names(), "a built-in name is known before its module is imported"
    with pytest.raises(StructPruneError, match="There is no animal 'other'"):
        animals.get("other")

    @animals.register("cat")
    class Cat:
        pass

    class Lion:
        pass

    assert animals.register("cat")(Cat) is animals.get("cat") is Cat, "registering the same class again is harmless"
    with pytest.raises(StructPruneError, match=r"animal 'cat' is already registered by .*Cat. Choose .*Lion"):
        animals.register("cat")(Lion)
    assert animals.get("cat") is Cat
    insects = Registry("insect", "optimum_structprune.test_insects")
    point = EntryPoint("ordered", "collections:OrderedDict", insects.group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == insects.group else [])
    assert insects.names() == ["ordered"] and insects.get("ordered") is OrderedDict
