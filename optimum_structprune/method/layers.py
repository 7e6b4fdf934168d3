"""Sources of activations: run the layers of a model one at a time, on the stored outputs of the previous layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import convert_to_fp32, recursively_apply, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch import hooks
from ..arch.inference import run_model
from ..arch.modules import layer_list
from ..arch.spec import EXPERT, ArchSpec, Axis, Space
from ..system.errors import StructPruneError
from .calibrate import Moments
from .shrink import check_same


# The largest share of a module's output that may reach the layer's output in another direction.
MAX_DEVIATION = 0.1


class NotSequentialError(StructPruneError):
    """The model's layers cannot be run one by one."""


@dataclass(frozen=True)
class Batch:
    """Samples of one domain that run together. `ids` have the shape `(batch, seq_length)`."""

    domain: int
    ids: Tensor
    counts: bool = True  # False if another process adds these samples to its moments

    def counted(self, x: Tensor) -> Tensor:
        """Flatten an activation of shape `(..., n)` to `(tokens, n)`. Return no tokens if the batch does not count."""
        x = x.reshape(-1, x.shape[-1])
        if not self.counts:
            return x[:0]
        return x


class OneProcess:
    """A process that runs all samples itself."""

    def sum_(self, moments: Moments) -> Moments:
        """Replace moments by the moments of the samples of all processes, and return them."""
        return moments

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the values of the first process."""
        return tensor


class ResidualPath(Protocol):
    """The path from the output of a consumer to the output of its layer."""

    def to_fit(self, x: Tensor, error: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the inputs, the error and the product to fit a consumer to, for an error of the layer's output."""
        ...


class Gain(NamedTuple):
    """The residual path of an output that is multiplied by a factor."""

    factor: float

    def to_fit(self, x: Tensor, error: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ResidualPath.to_fit`."""
        return x, error / self.factor, product


class Call(NamedTuple):
    """The arguments of a call of a layer, without the hidden states. These come first, or `by_name`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        tensors: list[Tensor] = []
        recursively_apply(tensors.append, (self.args, self.kwargs))
        return tensors


def equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have equal shapes and values. They may be on different devices."""
    if first is second:
        return True
    return first.shape == second.shape and torch.equal(first, second.to(first.device))


@torch.no_grad()
def capture(
    model: PreTrainedModel, arch: ArchSpec, ids: Tensor, all_layers: bool, plain: bool = False
) -> tuple[Tensor, list[Call], bool]:
    """Run a model on a batch, and record how its layers are called.

    The calls contain masks and rotary embeddings, which may differ by layer type. The forward pass stops at the last
    recorded layer.

    Args:
        model: The model.
        arch: The description of the model.
        ids: The batch, shape `(batch, seq_length)`.
        all_layers: Whether to record all layers instead of the first layer only.
        plain: Whether layers are known to return a bare tensor. They are skipped then.

    Returns:
        The hidden states that enter the first layer, the recorded calls, and whether layers return a bare tensor.

    Raises:
        NotSequentialError: If the model changes hidden states between two layers.
    """
    layers = layer_list(model, arch)
    first: list[Tensor] = []
    calls: list[Call] = []
    outputs: list[Tensor] = []
    are_bare: list[bool] = []

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hooks.hidden_states_of(args, kwargs)
        if index == 0:
            first.append(hidden)
        elif not equal(hidden, outputs[-1]):
            raise NotSequentialError(f"the model changes hidden states between layers {index - 1} and {index}")

        options = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if "hidden_states" in kwargs:
            calls.append(Call(args, options, by_name=True))
        else:
            calls.append(Call(args[1:], options, by_name=False))
        # The logits of a large vocabulary may take more memory than all layers.
        if not all_layers or len(calls) == arch.num_layers:
            raise hooks.StopForward

    def after(index: int, output: Any) -> None:
        are_bare.append(isinstance(output, Tensor))
        outputs[:] = [hooks.first_of(output)]

    skipped_layers: Sequence[nn.Module] = []
    if plain:
        skipped_layers = layers
    with hooks.replaying(skipped_layers), hooks.intercept(layers, before, after), suppress(hooks.StopForward):
        run_model(model, ids)
    return first[0], calls, all(are_bare)


@torch.no_grad()
def gain_of(source: InMemory, layer: int, name: str) -> float | None:
    """Return the gain of a module's output in the layer's output, or None if it takes another path.

    With noise n added to the module's output, the layer's output changes by g · n + r. The gain is g, if the deviation
    r is less than a tenth of g · n.
    """
    # The first sample alone, so that neither the batch size nor the number of processes changes the gain.
    hidden = source.hidden[0]
    noise = noise_like(hidden)
    plain = source.output(layer, 0)[:1].float()
    with hooks.adding(source.module(layer).get_submodule(name), noise.expand(hidden.shape)):
        noisy = source.output(layer, 0)[:1].float()

    change = (noisy - plain).to(noise.device)
    gain = float(source.ranks.broadcast((change * noise).sum() / noise.square().sum()))
    deviation = float(source.ranks.broadcast((change - gain * noise).norm() / noise.norm()))
    if deviation < MAX_DEVIATION * abs(gain):
        return gain
    return None


def noise_like(hidden: Tensor) -> Tensor:
    """Return noise for the first sample of a batch, shape `(1, seq_length, channels)`.

    It is as large as the residual stream, so that rounding does not hide it.
    """
    hidden = hidden[:1]
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    return noise * hidden.float().std()


class Source(Protocol):
    """The activations of a model, layer by layer. Sources derive from this class and override methods as needed."""

    ranks: OneProcess = OneProcess()
    # Computes the moments of a space inside experts.
    expert_moments: Callable[[Any, Space, bool], Iterator[list[Moments]]] | None = None
    # The tokens that are routed to the experts of a layer: the layer, and the tokens of each batch.
    routed: tuple[int, Any] = (-1, ())

    def at(self, layer: int, changes: bool = False) -> AbstractContextManager[None]:
        """Hold the weights of a layer in memory inside `with`. With `changes`, keep its new weights."""
        return nullcontext()

    def advance_original(self, layer: int, kinds: Collection[str]) -> None:
        """Run the original residual stream through a layer, which has its original weights.

        Error feedback is disabled if no consumer of these kinds writes directly to the residual stream, except when
        experts are removed.
        """
        return None

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """Yield the moments of the inputs of a space's consumers, one per consumer, domain by domain.

        A Gram matrix of a large model takes gigabytes, so the moments of a domain are released before the next domain
        runs.
        """
        ...

    def same_outputs(self, layer: int) -> AbstractContextManager[None]:
        """Raise `StructPruneError` if the outputs of a layer for a few tokens change inside `with`."""
        ...

    def advance(self, layer: int) -> None:
        """Advance to the next layer. `layer` has its final weights."""
        return None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the hidden states by name and values that JSON can store, or None without any state."""
        return None

    def resume_(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from the `state` of another source over the same samples."""
        return None


class InMemory(Source):
    """A source that runs one layer at a time on the stored outputs of the pruned layers before it.

    It stores:

    - the hidden states of the samples, shape `(batch, seq_length, channels)` per batch, and a second copy of them with
      error feedback or `fixed` layers,
    - the outputs of the parts of a layer that run before its pruned parts, so that they do not run again, and
    - the moments of one layer.

    Args:
        model: The model.
        arch: The description of the model.
        batches: The samples.
        error_feedback: The share of the error of the residual stream that consumers correct.
        fixed: Whether layers do not change. Their outputs are stored then, which saves a second pass.

    Raises:
        NotSequentialError: If layers pass on more than hidden states.
    """

    keep_on: torch.device | None = None  # the device of the hidden states, if not the device of the layers

    def __init__(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        batches: Sequence[Batch],
        error_feedback: float = 0.0,
        fixed: bool = False,
    ):
        self.model = model
        self.arch = arch
        self.batches = list(batches)
        self.num_domains = 1 + max(batch.domain for batch in batches)
        self.error_feedback = error_feedback
        self.fixed = fixed

        self.hidden: list[Tensor] = []
        self.calls: dict[tuple[int, ...], list[Call]] = {}  # by the shape of a batch
        self.extras: dict[int, tuple[Any, ...] | None] = {}  # a layer's outputs after the hidden states, by layer
        self.gains: dict[str, float | None] = {}  # by the name of a module, which is the same in all layers
        self.find_other_path: Callable[[InMemory, int, str], ResidualPath | None] | None = None

        # The state of the current layer:
        self.outputs: dict[int, Tensor] = {}  # its outputs by batch, if layers are fixed
        self.changed: set[str] = set()  # its pruned parts
        self.cache: dict[str, dict[int, Any]] = {}  # the outputs of its other parts, by batch

        # `same_outputs` compares a layer and its pruned version on a few tokens.
        self.check_batch = capture(model, arch, batches[0].ids[:1, :16], all_layers=True)
        self._enter_first_layer()
        self.original = list(self.hidden)

    def _enter_first_layer(self) -> None:
        """Record the inputs of the first layer for all samples, and the calls of the layers by batch shape."""
        _, _, returns_bare = self.check_batch
        for batch in self.batches:
            shape = tuple(batch.ids.shape)
            is_new = shape not in self.calls
            hidden, calls, _ = capture(self.model, self.arch, batch.ids, all_layers=is_new, plain=returns_bare)

            # Calls are stored once per shape, so their tensors must not depend on the samples.
            stored_tensors = self.calls.setdefault(shape, calls)[0].tensors()
            tensors = calls[0].tensors()
            if len(stored_tensors) != len(tensors) or not all(map(equal, stored_tensors, tensors)):
                raise NotSequentialError(
                    f"the layers of {self.arch.model_type!r} are called with more than hidden states"
                )
            self.hidden.append(hidden.to(device=self.keep_on))

    @torch.no_grad()
    def output(self, layer: int, index: int, hidden: Tensor | None = None) -> Tensor:
        """Return the output of a layer for one batch, in the layer's precision. `hidden` replaces its inputs."""
        if hidden is None:
            hidden = self.hidden[index]
        shape = tuple(self.batches[index].ids.shape)
        return self._run(layer, hidden, self.calls[shape][layer])

    def _run(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        module = self.module(layer)
        like = next(module.parameters())
        hidden, args, kwargs = send_to_device((hidden, call.args, call.kwargs), like.device)
        if like.dtype == torch.float32:
            hidden, args, kwargs = convert_to_fp32((hidden, args, kwargs))

        with hooks.in_fast_dtype([module]):
            if call.by_name:
                output = module(hidden_states=hidden, **kwargs)
            else:
                output = module(hidden, *args, **kwargs)

        self.extras[layer] = None
        if isinstance(output, tuple):
            self.extras[layer] = output[1:]
        return hooks.first_of(output)

    def advance_original(self, layer: int, kinds: Collection[str]) -> None:
        if layer == 0 and EXPERT not in kinds and not self._reaches_stream(kinds):
            self.error_feedback = 0.0
        if self.error_feedback:
            for index, hidden in enumerate(self.original):
                self.original[index] = self.output(layer, index, hidden).to(device=self.keep_on)

    def _reaches_stream(self, kinds: Collection[str]) -> bool:
        """Return whether a consumer of these kinds in the first layer writes to the residual stream."""
        if not self.error_feedback:
            return False
        for space in self.arch.at(0):
            if space.kind in kinds and space.experts is None:
                if any(self.residual_path(0, axis.module) for axis in space.consumers):
                    return True
        return False

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        if space.experts is not None and self.expert_moments is not None:
            yield from self.expert_moments(self, space, gram)
            return

        prefix = self.arch.layer_prefix(layer)
        axes = {axis.module.removeprefix(prefix): axis for axis in space.consumers}
        paths: dict[str, ResidualPath | None] = {}
        if self.error_feedback:
            paths = {name: self.residual_path(layer, axis.module) for name, axis in axes.items()}

        # The parts that this space prunes change, so their outputs cannot be cached any longer.
        self.changed.update(axis.param.removeprefix(prefix).partition(".")[0] for axis in space.axes)
        self.cache = {name: outputs for name, outputs in self.cache.items() if name not in self.changed}
        parts = self._parts_to_cache(layer)

        for domain in range(self.num_domains):
            moments = self._empty_moments(layer, space, axes, paths, gram)
            for index, batch in enumerate(self.batches):
                if batch.domain == domain:
                    self._observe(layer, index, parts, moments, paths)
            yield [self.ranks.sum_(moments[name]).checked(axis.module, domain) for name, axis in axes.items()]

    def _empty_moments(
        self,
        layer: int,
        space: Space,
        axes: Mapping[str, Axis],
        paths: Mapping[str, ResidualPath | None],
        gram: bool,
    ) -> dict[str, Moments]:
        """Return moments of no tokens for the consumers of a space, by the name of the module."""
        # Each layer of a spread model has its own device.
        device = next(self.module(layer).parameters()).device
        channels = self.hidden[0].shape[-1]

        moments = {}
        for name, axis in axes.items():
            outputs = 0
            if paths.get(name) is not None:
                outputs = channels
            moments[name] = Moments.empty(space.size * axis.per_unit, gram, device, outputs)
        return moments

    def _observe(
        self,
        layer: int,
        index: int,
        parts: list[str],
        moments: dict[str, Moments],
        paths: Mapping[str, ResidualPath | None],
    ) -> None:
        """Run a layer on one batch, add the inputs of consumers to their moments, and cache the outputs of `parts`."""
        batch = self.batches[index]
        module = self.module(layer)
        # The error of these consumers is only available after the layer has run.
        waiting: list[tuple[str, ResidualPath, Tensor, Tensor | None]] = []

        def see(name: str, x: Tensor, product: Tensor | None) -> None:
            x = batch.counted(x)
            if product is not None:
                product = batch.counted(product)
            path = paths.get(name)
            if path is None:
                moments[name].update(x, output=product)
            else:
                waiting.append((name, path, x, product))

        with (
            hooks.cached_outputs(module, parts, self.changed, self.keep_on) as outputs,
            hooks.observe_products(module, moments, see),
        ):
            output = self.output(layer, index)
        for name, cached in outputs.items():
            self.cache.setdefault(name, {})[index] = cached
        if self.fixed:
            self.outputs[index] = output.to(device=self.keep_on)

        if waiting:
            original = self.original[index].to(output.device)
            error = batch.counted(self.error_feedback * (original.float() - output.float()))
            for name, path, x, product in waiting:
                inputs, own_error, own_output = path.to_fit(x, error, product)
                moments[name].update(inputs, own_error, own_output)

    def advance(self, layer: int) -> None:
        if len(self.outputs) == len(self.hidden):
            self.hidden = [self.outputs[index] for index in range(len(self.hidden))]
        elif layer + 1 < self.arch.num_layers:  # no pruning reads the outputs of the last layer
            self.pass_through(layer)
        self.outputs = {}
        self.changed = set()
        self.cache = {}
        self.routed = (-1, ())

    def pass_through(self, layer: int) -> None:
        """Run the hidden states of all samples through a layer. Parts with cached outputs do not run again."""
        module = self.module(layer)
        device = next(module.parameters()).device
        for index in range(len(self.hidden)):
            cached = {name: outputs[index] for name, outputs in self.cache.items() if index in outputs}
            parts = [module.get_submodule(name) for name in cached]
            with hooks.replaying(parts, send_to_device(list(cached.values()), device)):
                self.hidden[index] = self.output(layer, index).to(device=self.keep_on)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"hidden.{index}": hidden for index, hidden in enumerate(self.hidden)}
        if self.error_feedback:
            tensors.update({f"original.{index}": hidden for index, hidden in enumerate(self.original)})
        return tensors, {"gains": self.gains, "error_feedback": self.error_feedback}

    def resume_(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for name, stored in (("hidden", self.hidden), ("original", self.original)):
            for index, hidden in enumerate(stored):
                stored[index] = tensors.get(f"{name}.{index}", hidden).to(hidden.device)
        self.gains = dict(values["gains"])
        self.error_feedback = values["error_feedback"]

    @contextmanager
    @torch.no_grad()
    def same_outputs(self, layer: int) -> Iterator[None]:
        hidden, calls, _ = self.check_batch
        masked_output = self._run(layer, hidden, calls[layer])
        yield
        check_same(f"Layer {layer}", masked_output, self._run(layer, hidden, calls[layer]))

    def _parts_to_cache(self, layer: int) -> list[str]:
        """List the parts of a layer that are large or change, or no parts if no outputs can be cached."""
        parts = dict(self.module(layer).named_children())
        # A hook cannot see when the layer uses a parameter of its own.
        if self.fixed or not self.changed <= set(parts):
            return []

        sizes = {}
        for name, part in parts.items():
            sizes[name] = sum(parameter.numel() for parameter in part.parameters())
        min_size = 0.02 * sum(sizes.values())
        return [name for name in parts if name in self.changed or sizes[name] >= min_size]

    def residual_path(self, layer: int, module: str) -> ResidualPath | None:
        """Find the path from a module's output to the residual stream by adding noise. Return None if it has none."""
        name = module.removeprefix(self.arch.layer_prefix(layer))
        if name not in self.gains:
            self.gains[name] = gain_of(self, layer, name)

        gain = self.gains[name]
        if gain is not None:
            return Gain(gain)
        if self.find_other_path is None:
            return None
        return self.find_other_path(self, layer, name)

    def module(self, layer: int) -> nn.Module:
        """Return the module of a layer. It is looked up each time, because a layer is replaced when it shrinks."""
        return layer_list(self.model, self.arch)[layer]
