"""Which tokens of a vocabulary stay."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Protocol

import torch
from torch import Tensor

from ..domains.load import Domain
from ..errors import StructPruneError


# The weight of the prior against the counted text: text that was not counted uses other rare tokens.
PRIOR = 0.02


class Tokens(Protocol):
    """What choosing needs to know of a vocabulary."""

    size: int

    @property
    def always(self) -> Collection[int]:
        """The tokens that stay whatever the text is."""

    def parts(self, token: int) -> Sequence[int]:
        """The tokens that take the place of a token; none where it cannot be spelled."""

    def surface(self, token: int) -> str:
        """The text of a token."""


def token_shares(domains: Sequence[Domain], size: int) -> Tensor:
    """The share of each token in the calibration text, domains by their weights, shape `(size,)`, float64."""
    shares = torch.zeros(size, dtype=torch.float64)
    for domain in domains:
        counts = torch.bincount(domain.pool.flatten(), minlength=size)
        shares += domain.weight * counts / counts.sum()
    return shares


def keep_tokens(vocabulary: Tokens, shares: Tensor, number: int, always: Collection[int] = ()) -> tuple[int, ...]:
    """The `number` tokens whose absence would cost most, as ascending ids; each of them can be built from its parts.

    `shares` are those of the tokens in text, shape `(size,)`. What `always` names stays, and so do its parts.
    """
    parts = [() if token in vocabulary.always else tuple(vocabulary.parts(token)) for token in range(vocabulary.size)]
    fixed = _with_parts({*vocabulary.always, *always}, parts)
    if not len(fixed) <= number <= vocabulary.size:
        raise StructPruneError(
            f"vocab={number} is no number of tokens that can stay: {len(fixed)} of {vocabulary.size} always do."
        )
    # A token that may go and has no parts is never read, if there is one of that id at all: it goes first.
    costs = [cost if parts[token] else -1.0 for token, cost in enumerate(_expected(vocabulary, shares).tolist())]
    wholes = [0] * vocabulary.size
    for token in range(vocabulary.size):
        for part in set(parts[token]):
            wholes[part] += 1
    heap = [(costs[token], -token) for token in range(vocabulary.size) if not wholes[token] and token not in fixed]
    heapify(heap)
    kept = set(range(vocabulary.size))
    while len(kept) > number:
        cost, token = heappop(heap)
        kept.remove(-token)
        # A token that goes is spelled by its parts, and a part that nothing is built from any more may go next.
        for part in parts[-token]:
            costs[part] += cost
        for part in set(parts[-token]):
            wholes[part] -= 1
            if not wholes[part] and part not in fixed:
                heappush(heap, (costs[part], -part))
    return tuple(sorted(kept))


def _with_parts(tokens: Collection[int], parts: Sequence[Sequence[int]]) -> set[int]:
    """Tokens with all that they are built from."""
    closed: set[int] = set()
    waiting = list(tokens)
    while waiting:
        if (token := waiting.pop()) not in closed:
            closed.add(token)
            waiting += parts[token]
    return closed


def _expected(vocabulary: Tokens, shares: Tensor) -> Tensor:
    """The share that each token is expected to have in other text, shape `(size,)`.

    A vocabulary is numbered by how often its tokens were needed where it was made, so that the prior falls as the
    number grows; scripts that the text never shows have none.
    """
    scripts = [script(vocabulary.surface(token)) for token in range(vocabulary.size)]
    shown = {scripts[token] for token in shares.nonzero().flatten().tolist()}
    prior = torch.tensor([name in shown for name in scripts]) / (torch.arange(vocabulary.size) + 1000.0)
    return shares + PRIOR * prior / prior.sum()


def script(text: str) -> str:
    """The script of the first letter of a text, as Unicode names it ("LATIN", "CJK"); empty where it has no letter."""
    return next((_script_of(letter) for letter in text if letter.isalpha()), "")


@lru_cache(None)
def _script_of(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
