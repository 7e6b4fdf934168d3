"""Gives the tokens that are routed to experts, their inner activations, and how much each expert contributes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arch.hooks import intercept
from ..arch.spec import Space
from ..method.calibrate import Moments
from ..method.layers import InMemory, Source
from ..method.loop import Criterion
from ..system.processes import all_reduce_
from .whole_model import WholeModel


# A function of the number of a batch, what the experts give, shape `(tokens, hidden)`, and the output of the layer.
See = Callable[[int, Tensor, Any], None]


class Routed(NamedTuple):
    """One call of an experts module in a domain.

    `hidden` has the tokens that enter, shape `(tokens, hidden)`; `chosen` and `gates` the experts that each of them
    chose and their weights, shape `(tokens, top_k)`.
    """

    domain: int
    hidden: Tensor
    chosen: Tensor
    gates: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Select the numbers of the tokens that chose an expert, their hidden states, and its weight for each."""
        tokens, slot = torch.where(self.chosen == expert)
        return tokens, self.hidden[tokens], self.gates[tokens, slot]


class WithExperts(Source):
    """Adds to another source what single experts read, which their stacked forward hides.

    In memory is what is routed to the experts of one layer, and the moments of only one expert.
    """

    def __init__(self, source: InMemory | WholeModel):
        self.layers = source
        self.routed: tuple[int, tuple[Routed, ...]] = (-1, ())

    @staticmethod
    def routed_bytes(tokens: int, channels: int, itemsize: int) -> int:
        """The bytes of what enters the experts of a layer, which is kept until all of them are done."""
        return itemsize * tokens * channels

    def at(self, layer: int, changes: bool = False) -> AbstractContextManager[None]:
        return self.layers.at(layer, changes)

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        self.layers.advance_dense(layer, kinds)

    def same_outputs(self, layer: int) -> AbstractContextManager[None]:
        return self.layers.same_outputs(layer)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.layers.state()

    def resume_(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.layers.resume_(tensors, values)

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        if space.experts is None:
            self.routed = -1, ()
            yield from self.layers.moments(layer, space, gram)
            return
        experts = self.layers.model.get_submodule(space.experts)
        if self.routed[0] != layer:  # the experts of a layer read the same tokens, whichever is pruned first
            self.routed = layer, self.route(layer, experts)
        yield from inner_moments(experts, space, self.routed[1], gram, self.layers)

    def contributions(self, layer: int, space: Space, criterion: Criterion, see: See | None = None) -> Tensor:
        """Compute how much each expert of a space contributes, shape `(domains, experts)`; see `route`."""
        experts = self.layers.model.get_submodule(str(space.experts))
        calls = self.route(layer, experts, see)
        return contributions(experts, space.size, calls, self.layers.num_domains, criterion)

    def advance(self, layer: int) -> None:
        self.routed = -1, ()
        self.layers.advance(layer)

    @torch.no_grad()
    def route(self, layer: int, experts: nn.Module, see: See | None = None) -> tuple[Routed, ...]:
        """Run a layer and give the calls of its experts by batch; `see` gets None if layers do not run alone."""
        calls: list[Routed] = []
        outputs: list[Tensor] = []
        batch = self.layers.batches[0]

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = (batch.counted(x.detach()) for x in [*args, *kwargs.values()][:3])
            calls.append(Routed(batch.domain, *tokens))

        with intercept([experts], before, None if see is None else lambda _, output: outputs.append(output)):
            for index, batch in enumerate(self.layers.batches):
                output = self.layers.output(layer, index)
                if see is not None:
                    see(index, batch.counted(outputs.pop()), output)
        return tuple(calls)


@torch.no_grad()
def inner_activations(experts: nn.Module, space: Space, hidden: Tensor) -> Tensor:
    """Compute again what an expert's consumer reads for tokens; `hidden` is `(tokens, hidden)`."""
    axis = space.producers[0]
    leaf = axis.param.rpartition(".")[2]
    weight = experts.get_parameter(leaf)[axis.part].movedim(axis.dim - 1, 0)
    rows = nn.functional.linear(hidden.to(weight.device), weight)
    if f"{leaf}_bias" in dict(experts.named_parameters()):
        rows = rows + experts.get_parameter(f"{leaf}_bias")[axis.part]
    activate = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    return activate(rows)  # type: ignore[operator]  # typed as Tensor | Module


def inner_moments(
    experts: nn.Module, space: Space, calls: Sequence[Routed], gram: bool, source: InMemory | WholeModel
) -> Iterator[list[Moments]]:
    """Gather the moments of one expert's inner activations over the tokens that chose it, domain by domain.

    An expert that no token of any domain chose is scored by its weights alone, as if its inner activations were
    uncorrelated and had the second moment 1.
    """
    device, expert = next(experts.parameters()).device, space.consumers[0].part or 0
    chosen = torch.tensor(sum(int((call.chosen == expert).sum()) for call in calls), device=device)
    all_reduce_([chosen])
    for domain in range(source.num_domains):
        moments = Moments.empty(space.size, gram, device)
        for call in calls:
            if call.domain == domain and len(hidden := call.of(expert)[1]):
                moments.update(inner_activations(experts, space, hidden))
        source.ranks.sum_(moments)
        if not chosen:
            moments.square.fill_(1)
            if moments.gram is not None:
                moments.gram.fill_diagonal_(1)
        yield [moments.checked(space.consumers[0].module, domain, may_be_empty=True)]


@torch.no_grad()
def contributions(
    experts: nn.Module, size: int, calls: Sequence[Routed], num_domains: int, criterion: Criterion
) -> Tensor:
    """Compute how much each expert contributes, shape `(domains, experts)`; 0 if no token chose it."""
    total = torch.zeros(num_domains, size, dtype=torch.float64)
    count = torch.zeros_like(total)
    for call, expert in product(calls, range(size)):
        tokens, hidden, gates = call.of(expert)
        if len(hidden):
            index = torch.full((len(hidden), 1), expert, device=hidden.device)
            norms = experts(hidden, index, torch.ones_like(gates)[:, None]).norm(dim=-1)
            values = criterion.score(norms, gates, call.gates[tokens].sum(1))
            total[call.domain, expert] += float(values.double().sum())
            count[call.domain, expert] += len(hidden)
    all_reduce_([total, count])
    return total if criterion.summed else total / count.clamp(min=1)
