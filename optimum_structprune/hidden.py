"""The space `hidden`: channels of the residual stream go, in the whole model at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .arch.load import block_list, put_block_
from .arch.shrink import shrunk_config
from .arch.spec import HIDDEN, MODEL, ArchSpec, Axis, Stream
from .calibration.collect import observe
from .calibration.evidence import Mixture
from .calibration.passes import BlockPasses
from .calibration.taps import Batch, Tally
from .config import StructPruneConfig
from .heterogeneous import heterogeneous
from .metrics import run_model
from .plan import Plan
from .refit import REFITS
from .surgery import adopt_config_, read_consumer, replace_, slice_tensors, write_consumer_


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def remove_channels_(
    model: PreTrainedModel,
    spec: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    width: int,
) -> Plan:
    """Take channels out of the residual stream, in one step.

    Without refit, the result computes what the model would compute if these channels were zero wherever the stream is
    read. With `least_squares`, whatever reads the stream inside the blocks is refitted to what it gave on the dense
    stream, and every norm is scaled by the share of the energy that is left.

    Args:
        model: The model that is changed, in eval mode.
        spec: Its description.
        config: How to prune.
        batches: Calibration text.
        mixture: How the evidence of the domains is brought together.
        width: Number of channels to keep.
    """
    assert spec.stream is not None
    energies = channel_energies(model, spec.stream, batches, len(mixture.shares))
    scores = mixture.judge_experts(energies.mean(0))
    keep = tuple(sorted(scores.topk(width).indices.tolist()))
    left = torch.ones(len(spec.stream.reads))
    if config.fits:
        mixed = torch.tensor(mixture.shares, dtype=energies.dtype) @ energies.movedim(1, 0).flatten(1)
        left = mixed.view(len(left), -1)[:, list(keep)].mean(1) * width / spec.stream.space.size
        refit_readers_(model, spec, config, batches, mixture, keep)
    factors = {read.tap: float(share) ** 0.5 for read, share in zip(spec.stream.reads, left, strict=True)}
    narrow_(model, spec, keep, factors)
    return Plan(spec.model_type, {(MODEL, HIDDEN): keep})


@torch.no_grad()
def channel_energies(model: PreTrainedModel, stream: Stream, batches: Sequence[Batch], num_domains: int) -> Tensor:
    """Mean of x_j² over tokens wherever the stream is read, relative to the mean over the token's channels, so that
    neither a loud token nor a late block drowns the others.

    Args:
        model: The model.
        stream: Its residual stream.
        batches: Calibration text.
        num_domains: Number of domains.

    Returns:
        Shape `(reads, domains, channels)`; the mean over channels is 1.
    """
    taps = replace(stream.space, into=tuple(Axis(f"{read.tap}.weight", 1) for read in stream.reads))
    tally = Tally([taps], False, num_domains, next(model.parameters()).device)
    names = [read.tap for read in stream.reads]

    def see(name: str, hidden: Tensor) -> None:
        hidden = hidden.double()
        size = hidden.square().mean(-1, keepdim=True).sqrt()
        tally.see(name, hidden / size.clamp(min=torch.finfo(size.dtype).tiny))

    with observe(model, names, see):
        for batch in batches:
            tally.batch = batch
            run_model(model, batch.ids)
    return torch.stack([torch.stack([part.square for part in parts]) for parts in tally.of(taps)]).cpu()


def refit_readers_(
    model: PreTrainedModel,
    spec: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    keep: Sequence[int],
) -> None:
    """Refit whatever reads the stream inside the blocks on what it reads of the dense stream.

    Args:
        model: The model that is changed.
        spec: Its description.
        config: How to prune.
        batches: Calibration text.
        mixture: How the evidence of the domains is brought together.
        keep: Channels that stay.
    """
    assert spec.stream is not None
    passes = BlockPasses(model, spec, batches)
    for layer in range(spec.num_blocks):
        here = [read for read in spec.stream.reads if read.layer == layer]
        # All readers at one place get the same input, so that of the first one stands for all.
        taps = [replace(spec.stream.space, layer=layer, into=read.readers[:1]) for read in here]
        found = [passes.gather(layer, tap, True)[0] for tap in taps]
        passes.advance(layer)
        for read, parts in zip(here, found, strict=True):
            for axis in _matrices(model, read.readers):
                weight, bias = read_consumer(model, axis)
                columns = torch.tensor(keep, device=weight.device)
                moments = mixture.pool(weight, parts)
                damping = float(config.damping)
                write_consumer_(model, axis, columns, *REFITS[config.refit](weight, bias, moments, columns, damping))


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    for axis in axes:
        weight = model.get_parameter(axis.param)
        yield from [axis] if weight.ndim == 2 else (replace(axis, part=part) for part in range(len(weight)))


@torch.no_grad()
def narrow_(model: PreTrainedModel, spec: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]) -> None:
    """Give a model a narrower residual stream, and its norms the weights that make up for it.

    A norm divides by the root of a mean square. Once channels that are zero are gone, the mean over the N' others is
    N / N' times the mean over all N. So the whole stream is scaled by sqrt(N' / N), which brings the mean back and
    leaves epsilon right, and whatever reads it by the inverse: norms in their weights, all else in its own. A norm
    over what a block writes needs nothing but the writers' scale.

    Args:
        model: The model that is changed.
        spec: Its description.
        keep: Channels that stay.
        factors: Further factors of the norms that read the stream, by their full name.

    Raises:
        StructPruneError: If the config class refuses the width, or a tensor does not come out as the config says.
    """
    assert spec.stream is not None
    config = shrunk_config(model.config, spec, {HIDDEN: len(keep)})
    # Buffers that hang on the width, such as the scale of embeddings, have to hold their new values.
    with init_empty_weights(include_buffers=False), heterogeneous():
        narrower = type(model)(config)
    state = _narrow_state(model, spec, keep, factors)
    for path, new in _rebuilt(narrower, spec):
        fresh = {name: buffer for name, buffer in new.named_buffers() if name not in new.state_dict()}
        inside = {name.removeprefix(f"{path}."): state[name] for name in state if name.startswith(f"{path}.")}
        replace_(model.get_submodule(path), new, inside, spec)
        for name, buffer in fresh.items():
            owner, _, leaf = name.rpartition(".")
            like = model.get_submodule(path).get_buffer(name)
            setattr(new.get_submodule(owner), leaf, buffer.to(like.device))
        model.set_submodule(path, new)
    for layer, (old, new) in enumerate(zip(list(block_list(model, spec)), block_list(narrower, spec), strict=True)):
        prefix = spec.block_prefix(layer)
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        replace_(old, new, inside, spec)
        put_block_(model, spec, layer, new)
    adopt_config_(model, config, narrower)


def _rebuilt(model: nn.Module, spec: ArchSpec) -> list[tuple[str, nn.Module]]:
    """The modules outside the blocks that hold a part of the stream."""
    assert spec.stream is not None
    paths = dict.fromkeys(axis.module for axis in spec.stream.space.axes)
    return [(path, model.get_submodule(path)) for path in paths if not path.startswith(f"{spec.blocks}.")]


def _narrow_state(
    model: PreTrainedModel, spec: ArchSpec, keep: Sequence[int], factors: Mapping[str, float]
) -> dict[str, Tensor]:
    stream, tensors = spec.stream, dict(model.state_dict())
    assert stream is not None
    down = (len(keep) / stream.space.size) ** 0.5
    embedding = tensors[stream.embed].data_ptr()
    shared = [name for name, tensor in tensors.items() if tensor.data_ptr() == embedding]
    scale = dict.fromkeys(stream.writers, down)
    if not stream.scaled:
        scale |= dict.fromkeys(shared, down)
    for read in stream.reads:
        if read.norm:
            scale[f"{read.tap}.weight"] = factors.get(read.tap, 1.0) / down
        else:
            scale |= {axis.param: 1 / down for axis in read.readers}
    if len(shared) > 1 and not stream.scaled:
        scale[f"{stream.reads[-1].tap}.weight"] /= down  # for the head, which has got the embedding's scale
    norms = {f"{read.tap}.weight" for read in stream.reads if read.norm}
    for name, factor in scale.items():
        plus = stream.plus if name in norms else 0.0
        tensors[name] = ((tensors[name].float() + plus) * factor - plus).to(tensors[name].dtype)
    plan = Plan(spec.model_type, {(MODEL, HIDDEN): tuple(keep)})
    return slice_tensors(tensors, [stream.space], plan)
