"""Criteria from gradients of the loss by the inputs of the consumers, with backward passes through the whole model."""

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

from .watching import consumers_of, of_samples


# A function `(embeddings, reduce)`, which runs a batch and returns `reduce(x ∂L/∂x)` of the input x of each module.
Backward = Callable[[Tensor, Callable[[Tensor], Tensor]], dict[str, Tensor]]
# The size of the perturbation of an embedding, as a multiple of the root mean square of the embedding.
NOISE = 0.1


def saliencies(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return Σ|x ∂L/∂x| of the input x of every consumer, per predicted token.

    L is the sum of the next-token losses, so the scale does not depend on the batch size. The activations of a whole
    batch are in memory at once, as in training, but gradients of weights are not computed.

    Returns:
        By module, shape `(domains, n)`, fp64.
    """

    def sum_over_tokens(product: Tensor) -> Tensor:
        return product.abs().flatten(0, -2).sum(0)

    def saliencies_of(batch: Batch, backward: Backward) -> dict[str, Tensor]:
        return backward(_embeddings(model, batch), sum_over_tokens)

    return _per_token(model, arch, batches, saliencies_of)


def contrasts(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return how much the gradients of gates on the inputs of the consumers differ between two views of a sample.

    A gate multiplies one component x of the input at all tokens of a sample, so the gradient of the loss by the gate
    is Σ x ∂L/∂x over these tokens. The first view is the sample. The second view is the sample with noise in the
    embedding of each token; the size of the noise is `NOISE` times the root mean square of the embedding. The labels
    of both views are the tokens of the sample.

    Returns:
        Σ|g(sample) - g(perturbed)| over the samples, per predicted token, by module, shape `(domains, n)`, fp64.
    """
    generator = torch.Generator().manual_seed(0)

    def contrasts_of(batch: Batch, backward: Backward) -> dict[str, Tensor]:
        def sum_by_sample(product: Tensor) -> Tensor:
            return product.reshape(len(batch.ids), -1, product.shape[-1]).sum(1)

        embeddings = _embeddings(model, batch)
        noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
        scale = NOISE * embeddings.square().mean(-1, keepdim=True).sqrt()
        perturbed_embeddings = embeddings + scale * noise

        gradients = backward(embeddings, sum_by_sample)
        perturbed_gradients = backward(perturbed_embeddings, sum_by_sample)
        return {name: (gradients[name] - perturbed_gradients[name]).abs().sum(0) for name in gradients}

    return _per_token(model, arch, batches, contrasts_of)


@torch.no_grad()
def _embeddings(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the embeddings of the tokens of a batch."""
    return model.get_input_embeddings()(batch.ids.to(model.device))


def _per_token(
    model: PreTrainedModel,
    arch: ArchSpec,
    batches: Sequence[Batch],
    statistics_of: Callable[[Batch, Backward], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return the sum of the statistics of all batches by module and domain, divided by the number of predicted tokens.

    Args:
        model: The model.
        arch: Its description.
        batches: The samples.
        statistics_of: A function from a batch and its `Backward` to the statistics of the batch by module.
    """
    check_gradients(arch)
    modules = sorted({axis.module for axis in consumers_of(arch)})
    num_domains = 1 + max(batch.domain for batch in batches)
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(num_domains, dtype=torch.float64)

    with frozen(model):
        for batch in batches:
            num_predicted = batch.ids[:, 1:].numel()
            if batch.counts:
                counts[batch.domain] += num_predicted

            # All processes need the same names of `sums` below, even if the batches of a process count elsewhere.
            backward = partial(_backward, model, modules, batch.ids, num_predicted)
            for name, statistics in statistics_of(batch, backward).items():
                if name not in sums:
                    sums[name] = torch.zeros(num_domains, len(statistics), dtype=torch.float64)
                if batch.counts:
                    sums[name][batch.domain] += statistics.cpu()

    all_reduce_([counts])
    all_reduce_([sums[name] for name in sorted(sums)])
    return {name: total / counts.clamp(min=1)[:, None] for name, total in sums.items()}


@torch.enable_grad()
def _backward(
    model: PreTrainedModel,
    modules: Sequence[str],
    labels: Tensor,
    num_predicted: int,
    embeddings: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return `reduce(x ∂L/∂x)` of the input x of each module, where x ∂L/∂x has the shape `(..., n)`.

    Args:
        model: The model, with frozen weights.
        modules: The names of the modules.
        labels: The tokens of the samples.
        num_predicted: The number of predicted tokens.
        embeddings: The embeddings of the samples.
        reduce: The function that is applied to x ∂L/∂x.
    """
    inputs: dict[str, Tensor] = {}

    def record_input(name: str, x: Tensor) -> None:
        x.retain_grad()
        inputs[name] = x

    # The weights are frozen, so the graph has to begin at the embeddings.
    embeddings = embeddings.detach().requires_grad_()
    with observe(model, modules, record_input):
        mean_loss = model(inputs_embeds=embeddings, labels=labels.to(embeddings.device), use_cache=False).loss
    loss = mean_loss * num_predicted
    loss.backward()

    reduced = {}
    for name, x in inputs.items():
        if x.grad is not None:
            product = x.detach() * x.grad
            reduced[name] = reduce(product.double())
    return reduced


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters of a model inside `with`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_gradients(arch: ArchSpec) -> None:
    """Refuse models that do not predict the next token, and models with experts."""
    if not arch.causal or any(space.experts for space in arch.spaces):
        raise StructPruneError(
            f"Gradients are gathered for original models that predict the next token, not for {arch.model_type!r}; "
            "choose criterion='obs' or 'wanda'."
        )


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
    check_gradients(arch)


@register_criterion("taylor", whole_model_statistics=of_samples(saliencies), check=_check)
def taylor(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return E|x_j · ∂L/∂x_j|, summed over the columns j of each unit.

    This first-order Taylor approximation is eq. 8 of Molchanov et al. (2019), and eq. 5 of LLM-Pruner (Ma et al. 2023)
    applied to activations.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit)


@register_criterion("pip", whole_model_statistics=of_samples(contrasts), check=_check)
def pip(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return E|g_j(sample) - g_j(perturbed sample)|, summed over the columns j of each unit.

    g_j is the gradient of the loss by a gate on x_j. PIP (Cao et al., Findings of EMNLP 2025, arXiv 2501.15278)
    removes the units that distinguish two such views least, in rounds of at most 5 %. Our sources do not state its
    formula, its perturbation or its unit, so this is our interpretation; see `contrasts`.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit)
