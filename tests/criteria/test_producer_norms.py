"""The norms of the weights that give the channels of a space."""

import pytest
import torch
from models import build

from optimum_structprune.arch.load import describe
from optimum_structprune.criteria.obs import producer_norms
from optimum_structprune.forward.hooks import observe


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
        if read.norm and any(reader.param == space.out[0].param for reader in read.readers):
            tap, plus = read.tap, arch.residual.plus
    expected = torch.zeros(space.size)
    for axis in space.out:
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


@pytest.mark.parametrize("case", ["llama-tied", "gemma2"])
@torch.no_grad()
def test_what_counts_is_what_the_channel_does_and_not_how_it_is_stored(case):
    """A norm that is folded into what reads it changes nothing."""
    model = build(case)
    before = norms_of(model)
    arch, space = ffn(model)
    (read,) = (read for read in arch.residual.reads if any(r.param == space.out[0].param for r in read.readers))
    gamma = model.get_submodule(read.tap).weight
    for reader in read.readers:
        model.get_parameter(reader.param).mul_(gamma + arch.residual.plus)
    gamma.fill_(1 - arch.residual.plus)
    torch.testing.assert_close(norms_of(model), before)


@torch.no_grad()
def test_text_gives_about_the_same():
    """The inputs of producers that follow a norm have a mean square near γ², so no text is needed."""
    model, seen = build("llama-tied"), []
    _, space = ffn(model)
    modules = [axis.module for axis in space.out]
    with observe(model, modules[:1], lambda _, x: seen.append(x.flatten(0, 1))):
        model(torch.randint(3, 96, (16, 48), generator=torch.Generator().manual_seed(0)))
    squares = torch.cat(seen).square().mean(0)
    weights = [model.get_submodule(module).weight for module in modules]
    measured = sum((weight.square() @ squares).sqrt() for weight in weights)
    assert float(torch.corrcoef(torch.stack([norms_of(model), measured]))[0, 1]) > 0.9


def test_only_single_channels_have_producer_norms():
    model = build("mixtral")
    arch = describe(model)
    assert {space.kind for space in arch.spaces if producer_norms(model, arch, space) is None} == {
        "attention",
        "expert",
    }
