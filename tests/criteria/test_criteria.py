"""Criteria match their definitions, and third parties can register criteria, statistics and refits."""

from collections import OrderedDict
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from models import build, config, tokenizer

from optimum_structprune import StructPruneConfig, StructPruneError, StructPruner, register_criterion
from optimum_structprune.arch.load import describe
from optimum_structprune.config.pruning import REFITS
from optimum_structprune.criteria import CRITERIA, parameters_of, per_unit
from optimum_structprune.criteria.obs_drive import producer_norms
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.system import registry
from optimum_structprune.system.registry import Registry


@pytest.fixture
def case():
    """Return random weights of four rows and six columns, random inputs with a mean, and the moments of the inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    weight = torch.randn(4, 6, generator=generator)
    return weight, inputs, Moments.empty(6, gram=True).update(inputs)


def score(name, weight, moments, columns_per_unit=1, **fields):
    criterion = CRITERIA.get(name)
    parameters = parameters_of(criterion, config(**fields), layer=0)
    return criterion(weight, moments, columns_per_unit, **parameters)


def test_magnitude_wanda_and_flap_match_their_definitions(case):
    weight, inputs, moments = case
    magnitude = score("magnitude", weight, moments)
    wanda = score("wanda", weight, moments)
    flap = score("flap", weight, moments)

    torch.testing.assert_close(magnitude, weight.norm(dim=0))
    torch.testing.assert_close(wanda, weight.norm(dim=0) * inputs.square().mean(0).sqrt())
    variance = inputs.var(0, correction=0)
    torch.testing.assert_close(flap, weight.square().sum(0) * variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_a_unit_of_several_columns_has_their_joint_norm(case, name):
    weight, _, moments = case
    by_column = score(name, weight, moments)
    by_unit = score(name, weight, moments, 3)
    torch.testing.assert_close(by_unit, by_column.reshape(2, 3).norm(dim=1))


def test_random_scores_depend_on_the_seed_only(case):
    weight, _, moments = case
    scores = score("random", weight, moments, seed=1)
    assert torch.equal(scores, score("random", weight, moments, seed=1))
    assert not torch.equal(scores, score("random", weight, moments, seed=2))


@pytest.fixture
def set_threads():
    """Return a function that sets the number of threads of torch until the test ends."""
    original = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(original)


# The last two sizes are as large as the groups of real models.
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "columns_per_unit"), [(6, 1), (6, 2), (6, 3), (384, 192), (1024, 512)])
def test_obs_is_half_the_error_after_the_best_refit(size, columns_per_unit, threads, monkeypatch, set_threads):
    monkeypatch.setattr(StructPruneConfig, "damping", 1e-7)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(max(400, 2 * size), size, generator=generator)
    if size == 6:
        inputs = inputs @ torch.randn(6, 6, generator=generator) + 1
    weight = torch.randn(16, size, generator=generator)
    moments = Moments.empty(size, gram=True).update(inputs)

    set_threads(threads)
    scores = score("obs", weight, moments, columns_per_unit)

    target = (inputs @ weight.T).double()
    for unit in range(size // columns_per_unit):
        columns = [column for column in range(size) if column // columns_per_unit != unit]
        remaining = inputs[:, columns].double()
        fitted = remaining @ torch.linalg.lstsq(remaining, target).solution
        error = float((target - fitted).square().sum(1).mean())
        assert float(scores[unit]) == pytest.approx(0.5 * error, rel=1e-2)


def test_obs_drive_scores_a_channel_with_larger_producers_higher(case):
    weight, _, moments = case
    equal = replace(moments, prior=torch.ones(6))
    one_larger = replace(moments, prior=torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 1.0]))
    ratios = score("obs_drive", weight, one_larger) / score("obs_drive", weight, equal)
    assert int(ratios.argmax()) == 2


def test_obs_drive_scores_are_losses_that_compare_across_layers(case):
    weight, _, moments = case
    losses = score("obs", weight, moments)
    scores = score("obs_drive", weight, replace(moments, prior=torch.ones(6)))
    torch.testing.assert_close(scores, (losses.sqrt() + losses.sqrt().mean()).square() / 4)

    norms = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 1.0])
    scores = score("obs_drive", weight, replace(moments, prior=norms))
    scaled = score("obs_drive", weight, replace(moments, prior=100 * norms))
    torch.testing.assert_close(scaled, scores)


def test_obs_drive_equals_obs_for_groups_of_columns_and_without_producer_norms(case):
    weight, _, moments = case
    with_norms = replace(moments, prior=torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(score("obs_drive", weight, with_norms, 2), score("obs", weight, moments, 2))
    torch.testing.assert_close(score("obs_drive", weight, moments), score("obs", weight, moments))


def test_every_criterion_has_a_row_with_its_paper_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "how_it_works.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}

    for name in CRITERIA.names():
        criterion = CRITERIA.get(name)
        # Other tests register criteria too.
        if not criterion.score.__module__.startswith("optimum_structprune."):
            continue

        assert criterion.name == name
        assert criterion.paper in rows[name], name
        assert criterion.paper or name in ("magnitude", "random")
        description = rows[name].split("|")[3]
        assert len(description.split()) <= 11


def norm_weight_in_front_of(model, arch, axis, size):
    """Return the weight of the norm whose output a projection reads, or ones if it reads no norm."""
    reads = arch.residual.reads if arch.residual else ()
    for read in reads:
        if read.norm and any(reader.param == axis.param for reader in read.readers):
            return model.get_submodule(read.tap).weight.detach() + arch.residual.norm_offset
    return torch.ones(size)


@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "phi3", "gpt2-tied", "mixtral", "gpt_oss"])
def test_producer_norms_are_the_spread_of_the_producers_for_white_noise(case):
    """The norm in front of a producer multiplies independent inputs of variance 1 by its weight γ."""
    model = build(case)
    arch = describe(model)
    space = next(space for space in arch.at(0) if space.kind == "mlp")

    expected = torch.zeros(space.size)
    for axis in space.producers:
        matrix = model.get_parameter(axis.param).detach()
        dim = axis.dim
        if axis.part is not None:
            matrix = matrix[axis.part]
            dim -= 1
        # A bias has one dimension, and does not depend on the input.
        if matrix.ndim != 2:
            continue

        if dim == 1:
            matrix = matrix.T
        gamma = norm_weight_in_front_of(model, arch, space.producers[0], matrix.shape[1])
        for unit in range(space.size):
            for row in axis.indices([unit]):
                expected[unit] += (matrix[row] * gamma).norm()

    torch.testing.assert_close(producer_norms(model, arch, space), expected)


FIRST_CALLS = []


def statistics_of_watched(model, arch, data):
    """Return statistics that grow with the number of the unit.

    The cache of the run holds the number of the first call, and `FIRST_CALLS` records it at each call.
    """
    first_call = data.cache.setdefault("watched", len(FIRST_CALLS))
    FIRST_CALLS.append(first_call)

    statistics = {}
    for space in arch.spaces:
        for axis in space.consumers:
            numbers = torch.arange(space.size * axis.per_unit).double()
            statistics[axis.module] = numbers.expand(len(data.domains), -1)
    return statistics


def check_watched(config, arch, use):
    if not arch.causal:
        raise StructPruneError("watched is for decoders")


def watched(weight, moments, columns_per_unit):
    return per_unit(moments.prior.to(weight), columns_per_unit)


def scaled(weight, bias, moments, keep, damping):
    assert moments.gram is not None
    return weight[:, keep] * moments.prior[keep].to(weight), bias


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Register a criterion and a refit for the test."""
    FIRST_CALLS.clear()
    for table in (CRITERIA, REFITS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    register_criterion("watched", whole_model_statistics=statistics_of_watched, check=check_watched)(watched)
    REFITS.register("scaled")(scaled)


@pytest.mark.parametrize("options", [{}, {"rounds": 2}, {"allocation": "sensitivity", "round_to": 1}])
def test_scores_choices_and_weights_use_the_same_statistics(options):
    model = build("llama-tied")
    pruner = StructPruner(config(criterion="watched", refit="scaled", **options))
    small = pruner.prune_model(model, tokenizer())

    for layer in (0, 1):
        units = pruner.result.plan.keep[layer, "mlp"]
        assert units == tuple(range(40 - len(units), 40))
        weight = model.model.layers[layer].mlp.down_proj.weight[:, units]
        expected = weight * torch.tensor(units)
        torch.testing.assert_close(small.model.layers[layer].mlp.down_proj.weight, expected)

    assert set(FIRST_CALLS) == {0}, "all calls share the cache of the run"
    assert "allocation" in options or len(FIRST_CALLS) == options.get("rounds", 1)


def test_a_criterion_or_refit_that_does_not_suit_the_model_is_refused_before_it_runs(tmp_path):
    with pytest.raises(StructPruneError, match="watched is for decoders"):
        StructPruner(config(criterion="watched")).prune_model(build("bert"), tokenizer())

    with pytest.raises(StructPruneError, match="refit='scaled' is for consumers inside the layers"):
        StructPruner(config(refit="scaled", widths={"hidden": 24})).prune_model(build("llama-tied"), tokenizer())

    offloaded = disk_offload(build("llama-tied"), tmp_path / "disk", execution_device=torch.device("cpu"))
    with pytest.raises(StructPruneError, match="criterion='watched' takes all its layers at once. Choose"):
        StructPruner(config(criterion="watched")).prune_model(offloaded, tokenizer(), inplace=True)

    assert FIRST_CALLS == []


def test_a_criterion_receives_the_parameters_that_it_declares():
    received = []

    @register_criterion("declares", parameters=("seed", "num_samples"))
    def declares(weight, moments, columns_per_unit, **parameters):
        received.append(parameters)
        return weight.square().sum(0)

    StructPruner(config(criterion="declares", seed=5)).prune_model(build("llama-tied"), tokenizer())
    samples = config().num_samples
    assert received == [{"seed": 5, "num_samples": samples}, {"seed": 6, "num_samples": samples}]


def test_parameters_that_no_config_has_are_refused_at_registration():
    with pytest.raises(StructPruneError, match="'misspelt' declares the parameter 'sed'.* Did you mean 'seed'"):
        register_criterion("misspelt", parameters=("sed",))(watched)
    with pytest.raises(StructPruneError, match="'whole' judges whole experts and cannot have `parameters`"):
        register_criterion("whole", judges="expert", parameters=("seed",))(watched)
    assert not {"misspelt", "whole"} & set(CRITERIA.names())


class Cat:
    pass


class Lion:
    pass


def test_a_registry_knows_its_built_in_names_before_their_import():
    animals = Registry("animal", "optimum_structprune.test_animals", ("plain",))
    assert "plain" in animals.names()
    with pytest.raises(StructPruneError, match="There is no animal 'other'"):
        animals.get("other")


def test_a_registry_accepts_a_name_once():
    animals = Registry("animal", "optimum_structprune.test_animals")
    animals.register("cat")(Cat)
    assert animals.register("cat")(Cat) is Cat, "registering the same class again is harmless"
    assert animals.get("cat") is Cat

    with pytest.raises(StructPruneError, match=r"animal 'cat' is already registered by .*Cat. Choose .*Lion"):
        animals.register("cat")(Lion)
    assert animals.get("cat") is Cat


def test_a_registry_loads_entry_points(monkeypatch):
    insects = Registry("insect", "optimum_structprune.test_insects")
    point = EntryPoint("ordered", "collections:OrderedDict", insects.group)

    def entry_points(group):
        return [point] if group == insects.group else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert insects.names() == ["ordered"]
    assert insects.get("ordered") is OrderedDict
