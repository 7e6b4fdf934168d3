"""Gathers the tokens of each expert, their inner activations, and the contribution of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


# Called with the number of a batch, the output of the experts, shape `(tokens, hidden)`, and the output of the layer.
See = Callable[[int, Tensor, Any], None]


class Assignment(NamedTuple):
    """The tokens that chose some experts, in one call. The tokens of one expert are ascending."""

    tokens: Tensor  # the numbers of the tokens, shape `(n,)`
    hidden: Tensor  # their hidden states, shape `(n, hidden)`
    gates: Tensor  # the weight of the expert for each token, shape `(n,)`
    experts: Tensor  # the expert of each token, shape `(n,)`


class Routed:
    """One call of an experts module, with its tokens sorted by expert.

    The tokens are sorted once, so that no expert makes the host wait for a GPU.

    Args:
        domain: The number of the domain.
        hidden: The hidden states that enter, shape `(tokens, hidden)`.
        chosen: The experts that each token chose, shape `(tokens, top_k)`.
        gates: The weights of these experts, shape `(tokens, top_k)`.
        num_experts: The number of experts.
    """

    def __init__(self, domain: int, hidden: Tensor, chosen: Tensor, gates: Tensor, num_experts: int):
        self.domain = domain
        self.hidden = hidden
        self.chosen = chosen
        self.gates = gates
        self._order = chosen.flatten().argsort(stable=True)
        self._experts = chosen.flatten()[self._order]
        boundaries = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
        self._starts: list[int] = torch.searchsorted(self._experts, boundaries).tolist()

    def count(self, expert: int) -> int:
        """Return the number of tokens that chose an expert."""
        return self._starts[expert + 1] - self._starts[expert]

    def of(self, expert: int) -> Assignment:
        """Return the tokens that chose an expert."""
        return self.of_all(range(expert, expert + 1))

    def of_all(self, experts: range) -> Assignment:
        """Return the tokens that chose consecutive experts, sorted by expert."""
        section = slice(self._starts[experts.start], self._starts[experts.stop])
        places = self._order[section]
        tokens = places // self.chosen.shape[1]
        return Assignment(tokens, self.hidden[tokens], self.gates.flatten()[places], self._experts[section])


@torch.no_grad()
def route(source: InMemory | WholeModel, space: Space, see: See | None = None) -> tuple[Routed, ...]:
    """Run the layer of a space on all batches, and return the calls of its experts by batch.

    Args:
        source: The source that runs the layer.
        space: A space of the experts or inside one.
        see: Called for each batch. Where layers do not run alone, the layer's output is None.
    """
    calls: list[Routed] = []
    outputs: list[Tensor] = []
    experts = experts_of(source, space)
    num_experts = next(experts.parameters()).shape[0]  # all parameters are stacked
    batch = source.batches[0]

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, gates = [*args, *kwargs.values()][:3]
        hidden, chosen, gates = [batch.counted(tensor.detach()) for tensor in (hidden, chosen, gates)]
        calls.append(Routed(batch.domain, hidden, chosen, gates, num_experts))

    def after(index: int, output: Any) -> None:
        outputs.append(output)

    with intercept([experts], before, None if see is None else after):
        for index, batch in enumerate(source.batches):
            output = source.output(space.layer, index)
            if see is not None:
                see(index, batch.counted(outputs.pop()), output)
    return tuple(calls)


def experts_of(source: InMemory | WholeModel, space: Space) -> nn.Module:
    """Return the module that holds the experts of a space."""
    return source.model.get_submodule(str(space.experts))


@torch.no_grad()
def inner_activations(experts: nn.Module, space: Space, hidden: Tensor) -> Tensor:
    """Compute the input of an expert's consumer again, for tokens with `hidden` states of shape `(n, hidden)`."""
    axis = space.producers[0]
    leaf = axis.param.rpartition(".")[2]
    weight = experts.get_parameter(leaf)[axis.part].movedim(axis.dim - 1, 0)
    rows = nn.functional.linear(hidden.to(weight.device), weight)
    if f"{leaf}_bias" in dict(experts.named_parameters()):
        rows = rows + experts.get_parameter(f"{leaf}_bias")[axis.part]

    has_gate = getattr(experts, "has_gate", True)
    activate: Any = experts._apply_gate if has_gate else experts.act_fn
    return activate(rows)


def expert_moments(source: InMemory | WholeModel, space: Space, gram: bool) -> Iterator[list[Moments]]:
    """Gather the moments of the input of an expert's consumer, which is hidden inside a stacked forward.

    See `Source.moments`. An expert that no token of any domain chose is scored by its weights alone, as if its inner
    activations were uncorrelated and had the second moment 1.
    """
    if source.routed[0] != space.layer:  # the experts of a layer read the same tokens, whichever is pruned first
        source.routed = (space.layer, route(source, space))
    calls = source.routed[1]
    experts = experts_of(source, space)
    expert = space.consumers[0].part or 0
    device = next(experts.parameters()).device

    num_tokens = torch.tensor(sum(call.count(expert) for call in calls))
    all_reduce_([num_tokens])
    for domain in range(source.num_domains):
        moments = Moments.empty(space.size, gram, device)
        for call in calls:
            if call.domain == domain and call.count(expert):
                moments.update(inner_activations(experts, space, call.of(expert).hidden))
        source.ranks.sum_(moments)
        if not num_tokens:
            moments.square.fill_(1)
            if moments.gram is not None:
                moments.gram.fill_diagonal_(1)
        yield [moments.checked(space.consumers[0].module, domain, may_be_empty=True)]


@torch.no_grad()
def contributions(source: InMemory | WholeModel, space: Space, criterion: Criterion, see: See | None = None) -> Tensor:
    """Compute the contribution of each expert of a space by domain.

    Args:
        source: The source that runs the layer.
        space: The space of whole experts.
        criterion: A criterion of experts; its score is summed or averaged over the tokens of an expert.
        see: See `route`.

    Returns:
        The contributions, shape `(domains, experts)`, fp64, on the CPU; 0 where no token chose the expert.
    """
    calls = route(source, space, see)
    experts = experts_of(source, space)
    total = torch.zeros(source.num_domains, space.size, dtype=torch.float64, device=calls[0].hidden.device)
    count = torch.zeros(source.num_domains, space.size, dtype=torch.float64)
    for call in calls:
        counts = [call.count(expert) for expert in range(space.size)]
        count[call.domain] += torch.tensor(counts)
        for group in _groups(counts, len(call.hidden)):
            chosen = call.of_all(group)
            ones = torch.ones_like(chosen.gates)
            norms = experts(chosen.hidden, chosen.experts[:, None], ones[:, None]).norm(dim=-1)
            sizes = [counts[expert] for expert in group]
            by_expert = zip(group, norms.split(sizes), chosen.gates.split(sizes), strict=True)
            for expert, own_norms, own_gates in by_expert:
                if counts[expert]:
                    total[call.domain, expert] += criterion.score(own_norms, own_gates).double().sum()
    total = total.cpu()
    all_reduce_([total, count])
    return total if criterion.summed else total / count.clamp(min=1)


def _groups(counts: Sequence[int], tokens: int) -> Iterator[range]:
    """Divide experts into consecutive groups that have at most so many tokens together, by their token counts."""
    start = 0
    in_group = 0
    for expert, count in enumerate(counts):
        if in_group and in_group + count > tokens:
            yield range(start, expert)
            start = expert
            in_group = 0
        in_group += count
    if in_group:
        yield range(start, len(counts))
