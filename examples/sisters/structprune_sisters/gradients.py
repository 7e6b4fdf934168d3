"""How the loss depends on the input of every consumer: backward passes through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_structprune import StructPruneError, register_criterion
from optimum_structprune.arch.hooks import observe
from optimum_structprune.arch.spec import ArchSpec
from optimum_structprune.config.pruning import StructPruneConfig
from optimum_structprune.criteria import per_unit
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.layers import Batch
from optimum_structprune.system.processes import all_reduce_

from .watching import of_samples


# Gives what a function makes of x ∂L/∂x, by module, for the embeddings of a batch.
Backward = Callable[[Tensor, Callable[[Tensor], Tensor]], dict[str, Tensor]]
# The label of a token that no loss is taken of.
# The size of a perturbation of an embedding, as a multiple of the embedding's own root mean square.
NOISE = 0.1


def saliencies(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Σ|x ∂L/∂x| of every consumer's input x, per predicted token, by module, shape `(domains, n)`, fp64.

    L is the sum of the next-token losses, so that the scale does not depend on the batch size. A whole batch's
    activations are held at a time, as in training, but no gradient of any weight.
    """

    def of_batch(batch: Batch, backward: Backward) -> dict[str, Tensor]:
        return backward(_embedded(model, batch), lambda product: product.abs().flatten(0, -2).sum(0))

    return _per_token(model, arch, batches, of_batch)


def contrasts(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """How much the gradient of a gate on every consumer's input differs between two views of a sample.

    A gate multiplies one component x of the input at all tokens of a sample, so the gradient of the loss by it is
    Σ x ∂L/∂x over these tokens. One view is the sample as it is; in the other, noise of `NOISE` times the embedding's
    own root mean square is added to the embedding of each token. Both are predicted against the same tokens.

    Returns:
        Σ|g(sample) - g(perturbed)| over the samples, per predicted token, by module, shape `(domains, n)`, fp64.
    """
    generator = torch.Generator().manual_seed(0)

    def of_batch(batch: Batch, backward: Backward) -> dict[str, Tensor]:
        def gates(product: Tensor) -> Tensor:
            return product.reshape(len(batch.ids), -1, product.shape[-1]).sum(1)

        plain = _embedded(model, batch)
        noise = torch.randn(plain.shape, generator=generator).to(plain)
        views = (plain, plain + NOISE * plain.square().mean(-1, keepdim=True).sqrt() * noise)
        first, second = (backward(view, gates) for view in views)
        return {name: (first[name] - second[name]).abs().sum(0) for name in first}

    return _per_token(model, arch, batches, of_batch)


@torch.no_grad()
def _embedded(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model.get_input_embeddings()(batch.ids.to(model.device))


def _per_token(
    model: PreTrainedModel,
    arch: ArchSpec,
    batches: Sequence[Batch],
    of_batch: Callable[[Batch, Backward], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What `of_batch` gives by module, added up for each domain and divided by its number of predicted tokens."""
    check_gradients(arch)
    modules = sorted({axis.module for space in arch.spaces for axis in space.consumers})
    domains = 1 + max(batch.domain for batch in batches)
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(domains, dtype=torch.float64)
    with frozen(model):
        for batch in batches:
            if not batch.counts:
                continue
            predicted = batch.ids[:, 1:].numel()
            counts[batch.domain] += predicted
            found = of_batch(batch, partial(_backward, model, modules, batch.ids, predicted))
            for name, sum_of_batch in found.items():
                total = sums.setdefault(name, torch.zeros(domains, len(sum_of_batch), dtype=torch.float64))
                total[batch.domain] += sum_of_batch.cpu()
    all_reduce_([counts, *(sums[name] for name in sorted(sums))])
    return {name: total / counts.clamp(min=1)[:, None] for name, total in sums.items()}


@torch.enable_grad()
def _backward(
    model: PreTrainedModel,
    modules: Sequence[str],
    labels: Tensor,
    predicted: int,
    start: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What `reduce` makes of x ∂L/∂x, shape `(..., n)`, by module, with embeddings `start`."""
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x.retain_grad()
        seen[name] = x

    # The weights are frozen, so the graph has to begin at the embeddings.
    start = start.detach().requires_grad_()
    with observe(model, modules, see):
        loss = model(inputs_embeds=start, labels=labels.to(start.device), use_cache=False).loss
    (loss * predicted).backward()
    return {name: reduce((x.detach() * x.grad).double()) for name, x in seen.items() if x.grad is not None}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of a model takes a gradient inside `with`; afterwards those do that did before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def check_gradients(arch: ArchSpec) -> None:
    """Refuse models whose gradients are not gathered."""
    if not arch.causal or any(space.experts for space in arch.spaces):
        raise StructPruneError(
            f"Gradients are gathered for dense models that predict the next token, not for {arch.model_type!r}; "
            "choose criterion='obs' or 'wanda'."
        )


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
    check_gradients(arch)


@register_criterion("taylor", whole_model_statistics=of_samples(saliencies), check=_check)
def taylor(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """First-order Taylor: the score is E|x_j · ∂L/∂x_j|, summed over the columns j of a unit.

    It is eq. 8 of Molchanov et al. (2019), and eq. 5 of LLM-Pruner (Ma et al. 2023) on activations.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit)


@register_criterion("pip", whole_model_statistics=of_samples(contrasts), check=_check)
def pip(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """The score is E|g_j(sample) - g_j(perturbed sample)|, summed over the columns j of a unit.

    g_j is the gradient of the loss by a gate on x_j. PIP (Cao et al., Findings of EMNLP 2025, arXiv 2501.15278) prunes
    what struggles to distinguish two such views, in rounds of at most 5 %. Its formula, its perturbation and its unit
    were in no source at hand, so this is our interpretation; see `contrasts`.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit)
