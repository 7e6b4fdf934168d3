"""Gather the tokens of each expert, their inner activations, and the contribution of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arch.hooks import intercept
from ..arch.spec import Space
from ..system.processes import all_reduce_
from .calibrate import Moments
from .layers import InMemory
from .loop import Criterion
from .whole_model import WholeModel


# A function of the index of a batch, the output of the experts, shape `(tokens, hidden)`, and the output of the layer.
See = Callable[[int, Tensor, Any], None]


class Assignment(NamedTuple):
    """The tokens of consecutive experts in one call, sorted by expert. The tokens of one expert are ascending.

    Attributes:
        tokens: The indices of the tokens, shape `(n,)`.
        hidden: The hidden states of the tokens, shape `(n, hidden)`.
        gates: The weight of the expert for each token, shape `(n,)`.
        experts: The expert of each token, shape `(n,)`.
    """

    tokens: Tensor
    hidden: Tensor
    gates: Tensor
    experts: Tensor


class Routed:
    """One call of an experts module, with its tokens sorted by expert.

    The tokens are sorted once, so that the host waits for a GPU only once.

    Args:
        domain: The index of the domain.
        hidden: The input hidden states, shape `(tokens, hidden)`.
        expert_ids: The experts that each token chose, shape `(tokens, top_k)`.
        gates: The weights of these experts, shape `(tokens, top_k)`.
        num_experts: The number of experts.
    """

    def __init__(self, domain: int, hidden: Tensor, expert_ids: Tensor, gates: Tensor, num_experts: int):
        self.domain = domain
        self.hidden = hidden
        self.expert_ids = expert_ids
        self.gates = gates
        self._order = expert_ids.flatten().argsort(stable=True)
        self._experts = expert_ids.flatten()[self._order]

        boundaries = torch.arange(num_experts + 1, device=expert_ids.device, dtype=expert_ids.dtype)
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
        indices = self._order[section]
        tokens = indices // self.expert_ids.shape[1]
        return Assignment(
            tokens=tokens,
            hidden=self.hidden[tokens],
            gates=self.gates.flatten()[indices],
            experts=self._experts[section],
        )


@torch.no_grad()
def route(source: InMemory | WholeModel, space: Space, see: See | None = None) -> tuple[Routed, ...]:
    """Run the layer of a space on all batches, and return the calls of its experts by batch.

    Args:
        source: The source that runs the layer.
        space: A space of the experts, or a space inside an expert.
        see: A function to call for each batch. If layers cannot run alone, it gets None as the layer's output.
    """
    calls: list[Routed] = []
    outputs: list[Tensor] = []
    experts = experts_of(source, space)
    # All parameters are stacked over the experts.
    num_experts = next(experts.parameters()).shape[0]
    batch = source.batches[0]

    def on_call(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = list(args) + list(kwargs.values())
        hidden, expert_ids, gates = [batch.counted(tensor.detach()) for tensor in inputs[:3]]
        calls.append(Routed(batch.domain, hidden, expert_ids, gates, num_experts))

    def on_return(index: int, output: Any) -> None:
        if see is not None:
            outputs.append(output)

    with intercept([experts], on_call, on_return):
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
    """Recompute the input of an expert's consumer, for tokens with `hidden` states of shape `(n, hidden)`."""
    axis = space.producers[0]
    attribute = axis.param.rpartition(".")[2]
    weight = experts.get_parameter(attribute)[axis.part].movedim(axis.dim - 1, 0)
    rows = nn.functional.linear(hidden.to(weight.device), weight)

    bias_name = f"{attribute}_bias"
    if bias_name in dict(experts.named_parameters()):
        rows = rows + experts.get_parameter(bias_name)[axis.part]

    activate: Any
    if getattr(experts, "has_gate", True):
        activate = experts._apply_gate
    else:
        activate = experts.act_fn
    return activate(rows)


def expert_moments(source: InMemory | WholeModel, space: Space, gram: bool) -> Iterator[list[Moments]]:
    """Yield the moments of the input of an expert's consumer by domain; see `Source.moments`.

    A hook cannot observe this input, because all experts run in one stacked forward. An expert that no token of any
    domain chose is scored by its weights alone, as if its inner activations were uncorrelated and had the second
    moment 1.
    """
    # Pruning an expert does not change the routing in its layer, so the layer is routed once.
    if source.routed[0] != space.layer:
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
        criterion: A criterion of experts. Its score is summed or averaged over the tokens of an expert.
        see: See `route`.

    Returns:
        The contributions, shape `(domains, experts)`, fp64, on the CPU. The contribution of an expert that no token
        chose is 0.
    """
    calls = route(source, space, see)
    experts = experts_of(source, space)
    total = torch.zeros(source.num_domains, space.size, dtype=torch.float64, device=calls[0].hidden.device)
    count = torch.zeros(source.num_domains, space.size, dtype=torch.float64)

    for call in calls:
        counts = [call.count(expert) for expert in range(space.size)]
        count[call.domain] += torch.tensor(counts)

        # Groups limit the memory of the outputs, because each token runs once for each expert that it chose.
        for group in _groups(counts, len(call.hidden)):
            for expert, norms, gates in _expert_outputs(experts, call, group):
                if counts[expert]:
                    total[call.domain, expert] += criterion.score(norms, gates).double().sum()

    total = total.cpu()
    all_reduce_([total, count])
    if criterion.summed:
        return total
    return total / count.clamp(min=1)


def _expert_outputs(experts: nn.Module, call: Routed, group: range) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert of a group with the norms of its outputs and its gates, by token, shape `(n,)` each."""
    tokens = call.of_all(group)
    ones = torch.ones_like(tokens.gates)
    norms = experts(tokens.hidden, tokens.experts[:, None], ones[:, None]).norm(dim=-1)

    counts = [call.count(expert) for expert in group]
    yield from zip(group, norms.split(counts), tokens.gates.split(counts), strict=True)


def _groups(counts: Sequence[int], max_tokens: int) -> Iterator[range]:
    """Divide experts into consecutive groups with at most `max_tokens` tokens, or one expert.

    `counts` are the numbers of tokens of the experts.
    """
    start = 0
    group_tokens = 0
    for expert, count in enumerate(counts):
        if group_tokens and group_tokens + count > max_tokens:
            yield range(start, expert)
            start = expert
            group_tokens = 0
        group_tokens += count

    if group_tokens:
        yield range(start, len(counts))
