"""Criteria against their definitions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import build, config

from optimum_structprune import StructPruneConfig
from optimum_structprune.arch.load import describe
from optimum_structprune.criteria import CRITERIA, producer_norms
from optimum_structprune.method.calibrate import Moments


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    return torch.randn(4, 6, generator=generator), x, Moments.empty(6, gram=True).update(x)


def score(name, case, columns_per_unit=1, **fields):
    weight, _, moments = case
    return CRITERIA.get(name)(weight, moments, columns_per_unit, config(criterion=name, **fields))


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
    scaled = score("obs_drive", (weight, x, replace(moments, prior=100 * norms)))
    torch.testing.assert_close(scaled, larger)
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


def ffn(model, layer=0):
    arch = describe(model)
    return arch, next(space for space in arch.at(layer) if space.kind == "mlp")


def norms_of(model):
    arch, space = ffn(model)
    return producer_norms(model, arch, space)


@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "phi3", "gpt2-tied", "mixtral", "gpt_oss"])
def test_it_is_the_spread_of_what_producers_give_for_white_inputs(case):
    """Where the norm before them gives independent components of mean square γ², in any layout of the weights."""
    model = build(case)
    arch, space = ffn(model)
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
    torch.testing.assert_close(norms_of(model), expected)
