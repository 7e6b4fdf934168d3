"""Gives the tokens that are routed to experts, their inner activations, and how much each expert contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arch.hooks import intercept
from ..arch.spec import Space
from ..method.calibrate import Moments
from ..method.layers import InMemory
from ..method.loop import Criterion
from ..system.processes import all_reduce_
from .whole_model import WholeModel


# A function of the number of a batch, what the experts give, shape `(tokens, hidden)`, and the output of the layer.
See = Callable[[int, Tensor, Any], None]


class Routed(NamedTuple):
    """One call of an experts module in a domain."""

    domain: int
    hidden: Tensor  # the tokens that enter, shape `(tokens, hidden)`
    chosen: Tensor  # the experts that each of them chose, shape `(tokens, top_k)`
    gates: Tensor  # their weights, of the same shape

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Select the numbers of the tokens that chose an expert, their hidden states, and its weight for each."""
        tokens, slot = torch.where(self.chosen == expert)
        return tokens, self.hidden[tokens], self.gates[tokens, slot]


@torch.no_grad()
def route(source: InMemory | WholeModel, space: Space, see: See | None = None) -> tuple[Routed, ...]:
    """Run the layer of a space, and give the calls of its experts by batch.

    `see` gets None in place of the layer's output where layers do not run alone.
    """
    calls: list[Routed] = []
    outputs: list[Tensor] = []
    batch = source.batches[0]

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = (batch.counted(x.detach()) for x in [*args, *kwargs.values()][:3])
        calls.append(Routed(batch.domain, *tokens))

    after = None if see is None else lambda _, output: outputs.append(output)
    with intercept([experts_of(source, space)], before, after):
        for index, batch in enumerate(source.batches):
            output = source.output(space.layer, index)
            if see is not None:
                see(index, batch.counted(outputs.pop()), output)
    return tuple(calls)


def experts_of(source: InMemory | WholeModel, space: Space) -> nn.Module:
    """Find the module that holds the experts of a space."""
    return source.model.get_submodule(str(space.experts))


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


def expert_moments(source: InMemory | WholeModel, space: Space, gram: bool) -> Iterator[list[Moments]]:
    """Gather the moments of what an expert's consumer reads, which a stacked forward hides; see `Source.moments`.

    An expert that no token of any domain chose is scored by its weights alone, as if its inner activations were
    uncorrelated and had the second moment 1.
    """
    if source.routed[0] != space.layer:  # the experts of a layer read the same tokens, whichever is pruned first
        source.routed = space.layer, route(source, space)
    calls = source.routed[1]
    experts, expert = experts_of(source, space), space.consumers[0].part or 0
    device = next(experts.parameters()).device
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
def contributions(source: InMemory | WholeModel, space: Space, criterion: Criterion, see: See | None = None) -> Tensor:
    """Compute how much each expert of a space contributes, shape `(domains, experts)`; 0 if no token chose it."""
    total, experts = torch.zeros(source.num_domains, space.size, dtype=torch.float64), experts_of(source, space)
    count = torch.zeros_like(total)
    for call, expert in product(route(source, space, see), range(space.size)):
        tokens, hidden, gates = call.of(expert)
        if len(hidden):
            index = torch.full((len(hidden), 1), expert, device=hidden.device)
            norms = experts(hidden, index, torch.ones_like(gates)[:, None]).norm(dim=-1)
            total[call.domain, expert] += float(criterion.score(norms, gates).double().sum())
            count[call.domain, expert] += len(hidden)
    all_reduce_([total, count])
    return total if criterion.summed else total / count.clamp(min=1)
