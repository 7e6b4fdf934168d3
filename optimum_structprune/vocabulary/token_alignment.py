"""Translates tokens and predictions of a dense model into the tokens of a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.token_space import named_ids
from ..domains.manifest import ids_in
from ..errors import StructPruneError
from ..forward.metrics import outputs_for
from .tokens import Vocabulary


class TokenAlignment:
    """Spells each token of a dense model by its parts, which are among `size` tokens of another vocabulary.

    The `spellings` by dense token, empty where nothing spells it, form a tree. Its nodes are the beginnings with which
    a longer spelling goes on. The branches of a node are the tokens that begin so, each with the part that follows, or
    `size` where the token ends.
    """

    def __init__(self, spellings: Sequence[tuple[int, ...]], size: int):
        self.spellings, self.size = spellings, size
        self.first = torch.tensor([parts[0] if parts else size for parts in spellings])
        beginnings = dict.fromkeys(parts[:end] for parts in spellings for end in range(1, len(parts)))
        self.nodes = {beginning: number for number, beginning in enumerate(beginnings)}
        branches = [
            (self.nodes[parts[:end]], token, parts[end] if end < len(parts) else size)
            for token, parts in enumerate(spellings)
            for end in range(1, len(parts) + 1)
            if parts[:end] in self.nodes
        ]
        node, self.tokens, self.following = torch.tensor(sorted(branches)).view(-1, 3).long().unbind(1)
        self.counts = node.bincount(minlength=len(self.nodes))
        self.starts = self.counts.cumsum(0) - self.counts

    @classmethod
    def between(
        cls,
        dense: PreTrainedModel,
        dense_tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> TokenAlignment:
        """Gives the parts of a dense model's tokens in the vocabulary of one that has lost some or none."""
        rows, size = (each.config.get_text_config().vocab_size for each in (dense, model))
        theirs, own = (1 + max(each.get_vocab().values()) for each in (dense_tokenizer, tokenizer))
        keep, named = ids_in(dense_tokenizer, tokenizer, min(own, size)), named_ids(dense)
        # Of rows without a token, those stay that the configs name, and then the first ones.
        keep += sorted(sorted(range(theirs, rows), key=lambda row: row not in named)[: max(size - own, 0)])
        if keep != sorted({*keep} - {-1}) or keep[-1] >= rows:  # what is left is in the same order
            raise StructPruneError(
                f"The dense model has a vocabulary of {rows} tokens and the model one of {size}, and by the same ids "
                "they mean other tokens, so their predictions cannot be compared; take the model that was pruned."
            )
        new = {old: number for number, old in enumerate(keep)}
        spellings: list[tuple[int, ...]] = [(new[token],) if token in new else () for token in range(rows)]
        if gone := {*range(min(theirs, rows))} - new.keys():
            vocabulary, unknown = Vocabulary.of(dense_tokenizer), new.get(dense_tokenizer.unk_token_id)
            for token in gone:
                parts = vocabulary.parts(token, new)
                spellings[token] = tuple(new[part] for part in parts) if new.keys() >= {*parts} else ()
                is_read = token in vocabulary.letters or vocabulary.parts(token)
                if not spellings[token] and is_read and unknown is not None:  # letters whose script is gone
                    spellings[token] = (unknown,)
        return cls(spellings, size)

    def is_identity(self) -> bool:
        """Is true if each token is its own only part, under the same id."""
        return self.size == len(self.spellings) and torch.equal(self.first, torch.arange(self.size))

    def align(self, ids: Sequence[int], counted: Sequence[bool], seen: int = 0) -> list[tuple[int, int, int]]:
        """Gives the parts of a text of dense tokens, each with the row of its token and the node before it.

        Rows number the tokens that are counted, from `seen` on; others have -1. The node is what was read of the token
        so far, or for a first part of the token before; -1 if nothing is expected of it.
        """
        spelled, before = [], -1
        for token, counts in zip(ids, counted, strict=True):
            if not (parts := self.spellings[token]):
                raise StructPruneError(f"The token {token} of the dense model cannot be spelled without itself.")
            nodes = [before, *(self.nodes[parts[:end]] for end in range(1, len(parts)))]
            spelled += [(part, seen if counts else -1, node) for part, node in zip(parts, nodes, strict=True)]
            # What else the token may have begun is known where the dense model's expectation of it is.
            before, seen = self.nodes.get(parts, -1) if counts else -1, seen + counts
        return spelled

    @torch.no_grad()
    def expected(self, probabilities: Tensor, rows: Tensor, first: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the probabilities of the next part, shape `(places, size)`, and that one follows, `(places,)`.

        The second is less than 1 inside a token where another one may have ended, behind which nobody has read on.
        The dense model expects `probabilities`, shape `(tokens, dense size)`; `rows` and `nodes` are those of
        `spelled`, and a token begins at places that are `first`.
        """
        device, size = probabilities.device, self.size
        whole = probabilities.new_zeros(len(probabilities), size + 1)
        whole = whole.scatter_add_(1, self.first.to(device).expand_as(probabilities), probabilities)[:, :size]
        whole = whole / whole.sum(1, keepdim=True)
        at = (nodes >= 0).nonzero()[:, 0]
        counts, starts = (each.to(device)[nodes[at]] for each in (self.counts, self.starts))
        branch = torch.arange(int(counts.sum()), device=device)
        branch += (starts + counts - counts.cumsum(0)).repeat_interleave(counts)
        place, token = at.repeat_interleave(counts), self.tokens.to(device)[branch]
        part = self.following.to(device)[branch]
        begun = probabilities.new_zeros(len(rows), size + 1)
        begun.index_put_((place, part), probabilities[(rows - first.long())[place], token], accumulate=True)
        goes_on = begun[:, :size].sum(1)
        share = (goes_on / (goes_on + begun[:, size])).nan_to_num()  # 0 where neither can be
        inside = begun[:, :size] / goes_on.clamp_min(1e-38)[:, None]
        ends = torch.where(first, 1 - share, 0.0)
        return ends[:, None] * whole[rows] + (1 - ends)[:, None] * inside, torch.where(first, 1.0, share)

    def divergence(self, logits: Tensor, dense: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        """Gives the KL divergence from the dense model's words in nats, shape `(tokens,)`, fp32.

        It is summed over the parts of each dense token. Where a token may have ended that was not read, the smaller
        model is taken to be right. The `logits` of the smaller model have the shape `(places, size)`, `rows` and
        `nodes` of what comes next `(places,)`, and the `dense` logits of counted tokens `(tokens, dense size)`.
        """
        rows, nodes = rows.to(logits.device), nodes.to(logits.device)
        first, found = rows.diff(prepend=rows.new_tensor([-1])) != 0, []
        # The probabilities of a large vocabulary take much memory.
        for values, *places in zip(*(each.split(64) for each in (logits, rows, first, nodes)), strict=True):
            start, end = max(int(places[0][0]) - 1, 0), int(places[0][-1]) + 1
            taught = dense[start:end].to(logits.device).float().softmax(-1)
            expected, sure = self.expected(taught, places[0] - start, *places[1:])
            log = values.float().log_softmax(-1)
            found.append(sure * (torch.special.xlogy(expected, expected) - expected * log).sum(-1))
        return logits.new_zeros(len(dense), dtype=torch.float32).index_add(0, rows, torch.cat(found))


@torch.no_grad()
def divergence_from_dense(
    parts: TokenAlignment,
    dense: PreTrainedModel,
    model: PreTrainedModel,
    rows: Iterable[Sequence[int]],
    context: Iterable[int],
) -> Tensor:
    """Sums the KL divergence from the dense model's words in nats, shape `(rows,)`, fp64, on the CPU.

    The first tokens of a row of dense ids, as many as its `context`, are read and not predicted.
    """
    found = []
    for ids, begin in zip(rows, context, strict=True):
        read, tokens, nodes = torch.tensor(parts.align(ids, [place >= begin for place in range(len(ids))])).unbind(1)
        logits, counted = outputs_for(model, read[None])[0, :-1], tokens[1:] >= 0
        expected = outputs_for(dense, torch.tensor([ids]))[0, begin - 1 : -1]
        each = parts.divergence(logits[counted.to(logits.device)], expected, tokens[1:][counted], nodes[1:][counted])
        found.append(each.double().sum().cpu())
    return torch.stack(found)
