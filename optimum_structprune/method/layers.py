"""The source of activations: the layers of a model, run one at a time on the stored outputs of those in front."""

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
from ..arch.inference import input_device as input_device
from ..arch.inference import run_model
from ..arch.modules import layer_list
from ..arch.spec import EXPERT, ArchSpec, Space
from ..errors import StructPruneError
from .calibrate import Moments
from .shrink import check_same


# The largest share of a module's output that may reach the layer's output in another direction than its own.
MAX_DEVIATION = 0.1


class NotSequentialError(StructPruneError):
    """The model's layers cannot be run one by one."""


@dataclass(frozen=True)
class Batch:
    """Samples of one domain that go through the model together; `ids` have the shape `(batch, seq_length)`."""

    domain: int
    ids: Tensor
    counts: bool = True  # false where they run here too, and another process takes them into its moments

    def counted(self, x: Tensor) -> Tensor:
        """The tokens of an activation that are calibrated on, shape `(tokens, n)`. `x` has the shape `(..., n)`."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.counts else x[:0]


class OneProcess:
    """The process runs all samples itself."""

    def sum_(self, moments: Moments) -> Moments:
        """Make moments those of the samples of all processes, and return them."""
        return moments

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The values that the first process has."""
        return tensor


class ResidualPath(Protocol):
    """The path from the output of a consumer into the output of its layer."""

    def to_fit(self, x: Tensor, error: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The inputs, the error to make up for and the product of a consumer, for an error of the layer's output."""
        ...


class Gain(NamedTuple):
    """The residual path of an output that is multiplied by a factor."""

    factor: float

    def to_fit(self, x: Tensor, error: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ResidualPath.to_fit`."""
        return x, error / self.factor, product


class Call(NamedTuple):
    """The arguments of a call of a layer beside the hidden states, which come first or `by_name`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        found: list[Tensor] = []
        recursively_apply(found.append, (self.args, self.kwargs))
        return found


def equal(first: Tensor, second: Tensor) -> bool:
    """Compares shapes and values of two tensors, which may be on different devices."""
    return first is second or (first.shape == second.shape and torch.equal(first, second.to(first.device)))


@torch.no_grad()
def capture(
    model: PreTrainedModel, arch: ArchSpec, ids: Tensor, whole: bool, plain: bool = False
) -> tuple[Tensor, list[Call], bool]:
    """Gives the hidden states that enter the first layer, the recorded calls, and if layers return a tensor alone.

    The calls are those of all layers if `whole`, else of the first; they carry masks and rotary embeddings, which may
    differ by layer type. Layers that are `plain` do so, and need not run. `ids` has the shape `(batch, seq_length)`.
    """
    layers, alone = layer_list(model, arch), list[bool]()
    first: list[Tensor] = []
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name, hidden = "hidden_states" in kwargs, hooks.hidden_states_of(args, kwargs)
        options = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if index and not equal(hidden, outputs[-1]):
            raise NotSequentialError(f"the model changes hidden states between layers {index - 1} and {index}")
        if not index:
            first.append(hidden)
        calls.append(Call(args if by_name else args[1:], options, by_name))
        # What follows the last layer, such as the logits of a large vocabulary, may take more memory than all layers.
        if not whole or len(calls) == arch.num_layers:
            raise hooks.StopForward

    def after(index: int, output: Any) -> None:
        alone.append(isinstance(output, Tensor))
        outputs[:] = [hooks.first_of(output)]

    with hooks.replaying(layers if plain else []), hooks.intercept(layers, before, after), suppress(hooks.StopForward):
        run_model(model, ids)
    return first[0], calls, all(alone)


@torch.no_grad()
def gain_of(source: InMemory, layer: int, name: str) -> float | None:
    """The gain of a module's output in the layer's output, or None if it does not go straight there.

    With noise n added to the module's output, the layer's changes by g · n + r; g is the gain if r is far smaller.
    """
    # Of the first sample alone, so that neither the batch size nor the number of processes changes the gain.
    hidden, noise = source.hidden[0], noise_like(source.hidden[0])
    plain = source.output(layer, 0)[:1].float()
    with hooks.adding(source.module(layer).get_submodule(name), noise.expand(hidden.shape)):
        change = (source.output(layer, 0)[:1].float() - plain).to(noise.device)
    gain = float(source.ranks.broadcast((change * noise).sum() / noise.square().sum()))
    deviation = float(source.ranks.broadcast((change - gain * noise).norm() / noise.norm()))
    return gain if deviation < MAX_DEVIATION * abs(gain) else None


def noise_like(hidden: Tensor) -> Tensor:
    """Noise for the first sample of a batch, as large as the residual stream, so that rounding does not hide it."""
    hidden = hidden[:1]
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    return noise * hidden.float().std()


class Source(Protocol):
    """Gives activations layer by layer; a source that skips some of it derives from this."""

    ranks: OneProcess = OneProcess()
    # What gives the moments of a space inside experts, and what is routed to the experts of a layer, kept for it.
    expert_moments: Callable[[Any, Space, bool], Iterator[list[Moments]]] | None = None
    routed: tuple[int, Any] = (-1, ())

    def at(self, layer: int, changes: bool = False) -> AbstractContextManager[None]:
        """Have the weights of a layer in memory inside `with`, and keep the changes that are made to them."""
        return nullcontext()

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        """Take the dense residual stream through a layer, which has its dense weights.

        Error feedback goes off if none of these kinds writes straight to the residual stream, unless experts go.
        """
        return None

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """Moments of the inputs of the space's consumers: one per consumer, of one domain after the other.

        A Gram matrix of a large model takes gigabytes, so those of a domain are let go before the next is asked for.
        """
        ...

    def same_outputs(self, layer: int) -> AbstractContextManager[None]:
        """Refuse what changes, inside `with`, the outputs of a layer for a few tokens."""
        ...

    def advance(self, layer: int) -> None:
        """Go on to the next layer; `layer` has its final weights."""
        return None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The present hidden states by name, and numbers as JSON takes them; None if nothing is kept."""
        return None

    def resume_(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what another source over the same samples has reached."""
        return None


class InMemory(Source):
    """Runs one layer at a time on the stored outputs of the pruned layers in front of it.

    A model whose layers hand on more than hidden states is refused. In memory are the hidden states of the samples,
    shape `(batch, seq_length, channels)` per batch, in two copies with error feedback or `fixed` layers; the outputs
    of a layer's parts in front of the pruned ones, which need not run again; and the moments of one layer. `fixed`
    layers stay as they are, so their outputs are kept in place of a second pass.
    """

    keep_on: torch.device | None = None  # where the hidden states are kept, if not where the layers run

    def __init__(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        batches: Sequence[Batch],
        error_feedback: float = 0.0,
        fixed: bool = False,
    ):
        self.model, self.arch, self.batches = model, arch, list(batches)
        self.num_domains = 1 + max(batch.domain for batch in batches)
        # The share of the error of the residual stream that consumers make up for.
        self.error_feedback, self.fixed = error_feedback, fixed
        self.hidden: list[Tensor] = []
        self.calls: dict[tuple[int, ...], list[Call]] = {}  # by the shape of a batch
        self.extras: dict[int, tuple[Any, ...] | None] = {}  # what a layer returns beside hidden states, if anything
        self.gains: dict[str, float | None] = {}  # of modules by their names, which are the same in all layers
        self.find_other_path: Callable[[InMemory, int, str], ResidualPath | None] | None = None
        self.outputs: dict[int, Tensor] = {}  # of the present layer by batch, where it is fixed
        self.changed: set[str] = set()  # the parts of the present layer that are pruned
        self.cache: dict[str, dict[int, Any]] = {}  # what others give, by batch
        self.few = capture(model, arch, batches[0].ids[:1, :16], True)  # by which a layer and its cut are compared
        for batch in batches:
            shape = tuple(batch.ids.shape)
            hidden, calls, _ = capture(model, arch, batch.ids, shape not in self.calls, self.few[2])
            recorded, present = self.calls.setdefault(shape, calls)[0].tensors(), calls[0].tensors()
            if len(recorded) != len(present) or not all(map(equal, recorded, present)):
                raise NotSequentialError(f"the layers of {arch.model_type!r} are called with more than hidden states")
            self.hidden.append(hidden.to(device=self.keep_on))
        self.dense = list(self.hidden)

    @torch.no_grad()
    def output(self, layer: int, index: int, hidden: Tensor | None = None) -> Tensor:
        """The output of a layer for one batch, in its own precision; `hidden` takes the place of its inputs."""
        hidden = self.hidden[index] if hidden is None else hidden
        return self._run(layer, hidden, self.calls[tuple(self.batches[index].ids.shape)][layer])

    def _run(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        like = next((module := self.module(layer)).parameters())
        hidden, args, kwargs = send_to_device((hidden, call.args, call.kwargs), like.device)
        if like.dtype == torch.float32:
            hidden, args, kwargs = convert_to_fp32((hidden, args, kwargs))
        with hooks.in_fast_dtype([module]):
            output = module(hidden_states=hidden, **kwargs) if call.by_name else module(hidden, *args, **kwargs)
        self.extras[layer] = output[1:] if isinstance(output, tuple) else None
        return hooks.first_of(output)

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        if self.error_feedback and layer == 0 and EXPERT not in kinds:
            spaces = [space for space in self.arch.at(0) if space.kind in kinds and space.experts is None]
            if not any(self.residual_path(0, axis.module) for space in spaces for axis in space.consumers):
                self.error_feedback = 0.0
        if self.error_feedback:
            self.dense = [self.output(layer, n, dense).to(device=self.keep_on) for n, dense in enumerate(self.dense)]

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        if space.experts is not None and self.expert_moments is not None:
            yield from self.expert_moments(self, space, gram)
            return
        prefix = self.arch.layer_prefix(layer)
        axes = {axis.module.removeprefix(prefix): axis for axis in space.consumers}
        paths = {name: self.residual_path(layer, axis.module) for name, axis in axes.items() if self.error_feedback}
        self.changed |= {axis.param.removeprefix(prefix).partition(".")[0] for axis in space.axes}
        self.cache = {name: kept for name, kept in self.cache.items() if name not in self.changed}
        out, parts = self.hidden[0].shape[-1], self._parts_to_cache(layer)
        for domain in range(self.num_domains):
            moments = {
                name: Moments.empty(space.size * axis.per_unit, gram, self.device, out if paths.get(name) else 0)
                for name, axis in axes.items()
            }
            for index, batch in enumerate(self.batches):
                if batch.domain == domain:
                    self._observe(layer, index, parts, moments, paths)
            yield [self.ranks.sum_(moments[name]).checked(axis.module, domain) for name, axis in axes.items()]

    def _observe(
        self, layer: int, index: int, parts: list[str], moments: dict[str, Moments], paths: dict[str, Any]
    ) -> None:
        """Run a layer on one batch; take the inputs of consumers into their moments, and keep outputs of `parts`."""
        batch, module = self.batches[index], self.module(layer)
        # Those whose error is known only once the layer has run to its end.
        waiting: list[tuple[str, ResidualPath, Tensor, Tensor | None]] = []

        def see(name: str, x: Tensor, product: Tensor | None) -> None:
            x, product = batch.counted(x), None if product is None else batch.counted(product)
            if (path := paths.get(name)) is None:
                moments[name].update(x, output=product)
            else:
                waiting.append((name, path, x, product))

        with (
            hooks.cached_outputs(module, parts, self.changed, self.keep_on) as outputs,
            hooks.observe_products(module, moments, see),
        ):
            output = self.output(layer, index)
        for name, kept in outputs.items():
            self.cache.setdefault(name, {})[index] = kept
        if self.fixed:
            self.outputs[index] = output.to(device=self.keep_on)
        if waiting:
            dense = self.dense[index].to(output.device)
            error = batch.counted(self.error_feedback * (dense.float() - output.float()))
        for name, path, x, product in waiting:
            moments[name].update(*path.to_fit(x, error, product))

    def advance(self, layer: int) -> None:
        if len(self.outputs) == len(self.hidden):
            self.hidden = [self.outputs[index] for index in range(len(self.hidden))]
        elif layer + 1 < self.arch.num_layers:  # nothing that prunes reads what the last layer gives
            self.pass_through(layer)
        self.outputs, self.changed, self.cache, self.routed = {}, set(), {}, (-1, ())

    def pass_through(self, layer: int) -> None:
        """Take the hidden states of all samples through a layer; parts whose outputs are kept do not run again."""
        module = self.module(layer)
        for index in range(len(self.hidden)):
            cached = {name: outputs[index] for name, outputs in self.cache.items() if index in outputs}
            outputs = send_to_device([*cached.values()], next(module.parameters()).device)
            with hooks.replaying([module.get_submodule(name) for name in cached], outputs):
                self.hidden[index] = self.output(layer, index).to(device=self.keep_on)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"hidden.{index}": hidden for index, hidden in enumerate(self.hidden)}
        if self.error_feedback:
            tensors |= {f"dense.{index}": hidden for index, hidden in enumerate(self.dense)}
        return tensors, {"gains": self.gains, "error_feedback": self.error_feedback}

    def resume_(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for name, stored in (("hidden", self.hidden), ("dense", self.dense)):
            for index, before in enumerate(stored):
                stored[index] = tensors.get(f"{name}.{index}", before).to(before.device)
        self.gains, self.error_feedback = dict(values["gains"]), values["error_feedback"]

    @contextmanager
    @torch.no_grad()
    def same_outputs(self, layer: int) -> Iterator[None]:
        hidden, calls, _ = self.few
        before = self._run(layer, hidden, calls[layer])
        yield
        check_same(f"Layer {layer}", before, self._run(layer, hidden, calls[layer]))

    def _parts_to_cache(self, layer: int) -> list[str]:
        """Lists the parts of a layer that are large or change, if outputs in front of the changes are kept."""
        parts = dict(self.module(layer).named_children())
        # A hook cannot see when the layer uses a parameter of no part.
        if self.fixed or not self.changed <= set(parts):
            return []
        sizes = {name: sum(each.numel() for each in part.parameters()) for name, part in parts.items()}
        return [name for name in parts if name in self.changed or sizes[name] >= 0.02 * sum(sizes.values())]

    def residual_path(self, layer: int, module: str) -> ResidualPath | None:
        """The residual path of a module, or None; noise finds it."""
        name = module.removeprefix(self.arch.layer_prefix(layer))
        if name not in self.gains:
            self.gains[name] = gain_of(self, layer, name)
        if (gain := self.gains[name]) is not None:
            return Gain(gain)
        return None if self.find_other_path is None else self.find_other_path(self, layer, name)

    @property
    def device(self) -> torch.device:
        """The device that computes the first layer."""
        return next(self.model.parameters()).device

    def module(self, layer: int) -> nn.Module:
        """The module of a layer, looked up anew each time, since a layer is replaced when it shrinks."""
        return layer_list(self.model, self.arch)[layer]
